"""glibc's memory for tensors on a CPU. Elsewhere nothing is done.

By default large blocks come from the system and go back to it, page by page: 40 ms for 100 MB that
are written in 8 ms when they are at hand.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
UNLIMITED = 2**31 - 1


def keep_freed_memory() -> None:
    """From now on use freed memory again, whatever its size: the process keeps what it needed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # musl has none
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, UNLIMITED)
