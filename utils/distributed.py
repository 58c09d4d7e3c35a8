"""torch.distributed behind a few functions that also work in a single process."""

import inspect
import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.errors import UserError, report
from utils.gpu import gpu_fault

PATIENCE = timedelta(days=1)


def rank() -> int:
    """This process's number among all; 0 in a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together; 1 in a single process."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum `values` over all ranks, in place; in a single process they stay.

    A collective call: every rank makes it, with one shape and dtype.
    """
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def data_parallel(model: nn.Module) -> DistributedDataParallel:
    """The model, whose backward pass adds up the ranks' gradients.

    BN statistics stay each rank's own; `broadcast_buffers` shares rank 0's where they are used.
    """
    known = inspect.signature(DistributedDataParallel).parameters  # renamed after torch 2.11
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {name: False}
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **options)


def select_device(name: str) -> torch.device:
    """The device for a name such as "cpu", "cuda" or "cuda:1".

    Under torchrun each process takes the GPU of its LOCAL_RANK.

    Args:
        name: "" means CUDA when it can be used, else the CPU. If a GPU seems to be meant, a warning
            gives the reason and the cure.

    Raises:
        UserError: For an unknown name, or a device that this machine lacks or cannot use.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    name = name or _default_device(local_rank)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is unknown. Use cpu, cuda or cuda:N.") from None
    if device.type == "cuda":
        if device.index is not None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(
                f"device {name!r}: under torchrun each process takes its own; use cuda."
            )
        index = device.index if device.index is not None else local_rank
        if fault := gpu_fault(index):
            raise UserError(f"device {name!r} cannot be used: {fault} Or use --device cpu.")
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


def _default_device(local_rank: int) -> str:
    """CUDA where it can be used, else the CPU, and a warning if a GPU seems to be meant."""
    fault = gpu_fault(local_rank)
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if torch.cuda.is_available() and (several or not fault):
        return "cuda"  # several ranks: other GPUs may do, and a rank on the CPU cannot join them
    if fault and local_rank == 0:
        print(f"warning: the CPU is used: {fault}", file=sys.stderr)
    return "cpu"


@contextmanager
def process_group(device: torch.device, *, timeout: timedelta | None = None) -> Iterator[None]:
    """Join torchrun's process group for the duration of the block; nothing in a single process.

    An error in the block is printed and ends the process at once. torchrun then ends the others.

    Args:
        device: This rank's, as `select_device` has it.
        timeout: How long a collective waits for the other ranks; default: torch's.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    store, number, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore("ranks", store)
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=number,
        world_size=size,
        timeout=timeout,
        device_id=device if on_gpu else None,
    )
    try:
        yield
    except BaseException as error:
        _end_process(error, store)
    dist.destroy_process_group()


def _end_process(error: BaseException, store: dist.Store) -> NoReturn:
    """End this process after an error, which is printed if it is the first among all ranks.

    Without destroy_process_group: on NCCL it would wait for kernels that need the other ranks. A
    later error of another rank is, as a rule, a collective that lost its partner.
    """
    try:
        first = store.compare_set("first to fail", "", str(rank())).decode()
    except RuntimeError:  # without torchrun rank 0 keeps the store: both are gone
        first = "0"
    status = 1
    if first == str(rank()):
        status = report(error)
    else:
        print(f"rank {rank()} ends: an error on rank {first} came first", file=sys.stderr)
    for worker in multiprocessing.active_children():
        worker.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def patient_group() -> Iterator[dist.ProcessGroup | None]:
    """A group of all ranks whose collectives wait for up to a day; None in a single process.

    For work that one rank does while the others wait, such as reading the data. It is a group of
    its own on the CPU: the usual timeout would end a rank that waits, and NCCL keeps a waiting
    GPU busy. All ranks meet at the end of the block, before any of them uses the usual group.
    """
    if world_size() == 1:
        yield None
        return
    group: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
    yield group
    dist.barrier(group)


@contextmanager
def first_of_machine_first(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Local rank 0 runs the block first, then the node's other ranks.

    They find on the machine's disk what it leaves there.

    Args:
        group: Of all ranks; None: the usual one.
    """
    waits = world_size() > 1 and int(os.environ["LOCAL_RANK"]) > 0
    if waits:
        dist.barrier(group)
    yield
    if world_size() > 1 and not waits:
        dist.barrier(group)


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


def broadcast_object(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Rank 0's value on every rank; `group` has all ranks, None is the usual one."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=group)
    return box[0]
