"""glibc's memory for tensors on a CPU. Elsewhere these functions do nothing.

By default large blocks come from the system and go back to it, page by page: 40 ms for 100 MB that
are written in 8 ms when they are at hand. Kept in the heap they lie between small blocks that live
long, such as oneDNN's compiled kernels, and leave gaps. So the first step of a training maps its
large blocks, while what is small and stays fills the heap from below; the others keep the memory.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of malloc.h
LARGE = 2**20  # bytes
UNLIMITED = 2**31 - 1


def map_large_blocks() -> None:
    """Take blocks of a MiB and more from the system, and give them back when they are freed."""
    mallopt(M_MMAP_THRESHOLD, LARGE)


def keep_freed_memory() -> None:
    """From now on use freed memory again, whatever its size: the process keeps what it needed."""
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, UNLIMITED)


def mallopt(parameter: int, value: int) -> None:
    if sys.platform.startswith("linux"):
        function = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if function is not None:
            function(parameter, value)
