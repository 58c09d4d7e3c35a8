"""Running out of memory: how it is recognized, and batches that shrink until they fit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from tqdm import tqdm

from utils.errors import UserError

Result = TypeVar("Result")
# Of the RuntimeErrors (torch.AcceleratorError is one) that CUDA, cuDNN, cuBLAS and the CPU raise.
TEXTS = (
    "out of memory",
    "unable to find an engine",  # cuDNN found no workspace
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "can't allocate memory",
    "not enough memory",  # the CPU of Windows
)
# The cure in training.
LESS_MEMORY = (
    "Start again with half the --batch_size (double --accumulate keeps the update), --recompute, a "
    "smaller --input_shape or less --multi_scale; on a CPU also with fewer --num_workers or a "
    "smaller --cache_gb."
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the computer has run out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in TEXTS)


@contextmanager
def memory_cure(cure: str) -> Iterator[None]:
    """Raise a UserError with this cure if memory runs out in the block."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"the memory is not enough. {cure} {error}") from None


class FittingBatch:
    """A batch size that is halved, and printed, whenever memory runs out."""

    def __init__(self, size: int):
        self.size = size

    def run(self, work: Callable[[int], Result]) -> Result:
        """Call `work(size)`, again from its start with half the size whenever memory runs out.

        Raises:
            UserError: If memory runs out at size 1.
        """
        while True:
            try:
                return work(self.size)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(error)
            torch.cuda.empty_cache()  # not above: there the error still holds the batch's tensors

    def _halve(self, error: Exception) -> None:
        if self.size == 1:
            raise UserError(
                "the memory is not enough for a single image. End other programs that use it, or "
                f"use --device cpu. {error}"
            ) from None
        tqdm.write(f"out of memory at batch {self.size}: going on with {self.size // 2}")
        self.size //= 2
