"""torch.distributed behind a few functions that also work in a single process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.errors import UserError


def rank() -> int:
    """This process's number among all; 0 in a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together; 1 in a single process."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of every rank's `values`, written into them; in a single process they stay.

    A collective call: every rank makes it, with one shape and dtype.
    """
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def select_device(name: str) -> torch.device:
    """The device for a name such as "cpu", "cuda", "cuda:1"; "" means CUDA when it is there.

    Under torchrun each process takes the GPU of its LOCAL_RANK.
    Raises UserError for an unknown name or a device that this machine lacks.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is unknown. Use cpu, cuda or cuda:N.") from None
    if device.type == "cuda":
        if device.index is not None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(
                f"device {name!r}: under torchrun each process takes its own; use cuda."
            )
        index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", 0))
        if index >= torch.cuda.device_count():
            raise UserError(
                f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA "
                "devices. Use --device cpu, or install a CUDA build of torch."
            )
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    if device.type != "cpu":
        raise UserError(f"device {name!r} is not supported. Use cpu, cuda or cuda:N.")
    return device


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join torchrun's process group for the time of the block; nothing in a single process."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def first_of_machine_first() -> Iterator[None]:
    """The block is run by the first process of each machine, then by its others: what the first
    one leaves on the machine's disk is there for them."""
    waits = world_size() > 1 and int(os.environ["LOCAL_RANK"]) > 0
    if waits:
        dist.barrier()
    yield
    if world_size() > 1 and not waits:
        dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_buffers(module: nn.Module) -> None:
    """Give every rank rank 0's buffers, such as BN statistics."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]
