"""Read and write in parallel with the network: one thread before it and one behind it."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

Item = TypeVar("Item")


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The items, each made by a thread while the one before it is in use.

    An error in making an item is raised in its place.
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
    """Calls made by a thread, in order. A context manager, which ends when all are done.

    An error of a call is raised by a later call, or at the end of the block.

    Args:
        limit: Calls that may be under way or wait; one more waits until the first is done.
    """

    def __init__(self, limit: int = 1):
        self.limit = limit
        self._pool = ThreadPoolExecutor(1)
        self._calls: deque[Future] = deque()

    def __enter__(self) -> "Behind":
        return self

    def __call__(self, work: Callable[..., object], *arguments: Any) -> None:
        """Queue `work(*arguments)`, once fewer than `limit` calls are left."""
        self.wait(self.limit - 1)
        self._calls.append(self._pool.submit(work, *arguments))

    def wait(self, left: int = 0) -> None:
        """Wait until at most `left` calls are left."""
        while self._calls and (len(self._calls) > left or self._calls[0].done()):
            self._calls.popleft().result()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown()
