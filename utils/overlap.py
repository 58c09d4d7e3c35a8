"""Reading and writing beside the network: a thread before it and a thread behind it."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

Item = TypeVar("Item")


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The items, each made by a thread while the one before it is in use.

    An error of theirs is raised where the item would have come.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(_take, iterator)
        while taken := coming.result():
            coming = pool.submit(_take, iterator)
            yield taken[0]


def _take(iterator: Iterator[Item]) -> tuple[Item, ...]:
    """The next item alone in a tuple; an empty one at the end."""
    return tuple(islice(iterator, 1))


class Behind:
    """Calls made by a thread, in order, the next one waiting for the last. A context manager.

    An error of a call is raised by the call after it, or at the end of the block.
    """

    def __enter__(self) -> "Behind":
        self._pool = ThreadPoolExecutor(1)
        self._last: Future | None = None
        return self

    def __call__(self, work: Callable[..., object], *arguments: Any) -> None:
        """Have `work(*arguments)` done."""
        self._wait()
        self._last = self._pool.submit(work, *arguments)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self._pool.shutdown()

    def _wait(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()
