"""Ctrl-C and SIGTERM as a wish to stop, so that a long training loses nothing."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from utils.distributed import world_size


@contextmanager
def stop_on_signal(request_stop: Callable[[], None]) -> Iterator[None]:
    """In the block the first SIGINT or SIGTERM calls `request_stop`; a second one kills.

    Ranks would stop at different steps and wait for each other, so only in a single process.
    """
    if world_size() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, _frame) -> None:
        signal.signal(number, previous[signal.Signals(number)])
        request_stop()

    previous = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    for kind in previous:
        signal.signal(kind, on_signal)
    try:
        yield
    finally:
        for kind, handler in previous.items():
            signal.signal(kind, handler)
