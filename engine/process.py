"""Of the running process: its random generators, and signals as a wish to stop."""

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from utils.distributed import world_size


def seed_everything(seed: int, *, deterministic: bool) -> None:
    """Seed python and torch; with `deterministic`, avoid torch's faster algorithms that vary.

    An operation that has no other form only warns. The data need no seed of their own: each
    sample has a generator of its seed, epoch and index.
    """
    random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:  # cuBLAS reads it when it is first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if deterministic != torch.are_deterministic_algorithms_enabled():  # setting it takes seconds
        torch.use_deterministic_algorithms(deterministic, warn_only=True)


def random_states() -> dict[str, Any]:
    """The states of python's and torch's generators, as plain types and tensors."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Inverse of `random_states`; CUDA states are restored where there are as many devices."""
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


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
