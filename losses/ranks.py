"""Sums over the processes of a distributed training."""

import torch.distributed as dist
from torch import Tensor


def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of every rank's `values`, written into them; in a single process they stay.

    A collective call: every rank makes it, with one shape and dtype.
    """
    if ranks() > 1:
        dist.all_reduce(values)
    return values
