"""One optimisation step. Nothing in it waits for the device."""

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.loader import to_input
from engine.figures import HostFigures
from engine.guard import BatchNormRollback, StateRollback
from engine.optimizer import Ema
from utils.distributed import world_size
from utils.heap import keep_freed_memory
from weights.checkpoint import cpu_copy


class TrainStep:
    """Forward, loss, backward, guard, clipping, optimizer and EMA for one batch.

    amp_dtype None means full precision; float16 brings a gradient scaler. clip_norm 0 clips
    nothing. A batch with a non-finite loss changes neither weights, optimizer, BN statistics nor
    the loss's state; one with a non-finite gradient neither weights nor optimizer. `network` is
    what runs the forward: the model, or DDP around it.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        loss: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: Ema | None,
        device: torch.device,
        amp_dtype: torch.dtype | None,
        clip_norm: float,
    ):
        self.model, self.network, self.loss = model, model, loss
        self.optimizer, self.ema, self.device = optimizer, ema, device
        self.amp_dtype, self.clip_norm = amp_dtype, clip_norm
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
        self.rollbacks = (BatchNormRollback(model), StateRollback(loss))
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        if device.type == "cpu":
            keep_freed_memory()

    def __call__(
        self,
        images: Tensor,
        targets: Tensor,
        *,
        group_size: int = 1,
        update: bool = True,
        cells: bool = False,
        size_hw: tuple[int, int] | None = None,
    ) -> HostFigures:
        """Learn from uint8 (B, 3, H, W) images and (N, 6) targets.

        group_size: over how many batches the gradient is accumulated; `update` at the last.
        cells: look at the confidence loss by groups of cells, too. size_hw: the images are
        resized to it on the device; targets are fractions and stay. None leaves them as they are.
        """
        for rollback in self.rollbacks:
            rollback.snapshot()
        with all_reduce_if(update, self.network):
            terms = self._backward(
                images, targets, group_size=group_size, cells=cells, size_hw=size_hw
            )
        finite = on_every_rank(terms["total"].detach().isfinite())
        for rollback in self.rollbacks:
            rollback.restore_unless(finite)
        self.finite = self.finite & finite
        norm = skipped = torch.zeros_like(terms["total"])
        if update:
            norm = self._update()
            skipped = ~self.finite
            self.finite = torch.ones_like(self.finite)
        return HostFigures(dict(terms, grad_norm=norm, finite=finite, skipped=skipped))

    def dry_run(
        self, images: Tensor, targets: Tensor, size_hw: tuple[int, int] | None = None
    ) -> None:
        """A step's forward and backward that leave no trace, to learn whether memory suffices."""
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        loss_state = copy.deepcopy(self.loss.state_dict())
        to_come = state_to_come(self.optimizer)
        self._backward(images, targets, size_hw=size_hw)
        del to_come
        self.optimizer.zero_grad(set_to_none=True)
        self.loss.load_state_dict(loss_state)
        for buffer, saved in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(saved)

    def state(self) -> dict[str, Any]:
        """What a resume needs of model, loss, optimizer, EMA and scaler, on the CPU."""
        return {
            "raw_model": cpu_copy(self.model.state_dict()),
            "ema": {"updates": self.ema.updates if self.ema is not None else 0},
            "optimizer": cpu_copy(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "loss": cpu_copy(self.loss.state_dict()),
        }

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Take over a checkpoint's `state`, and its model as the EMA's."""
        self.model.load_state_dict(checkpoint["raw_model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(checkpoint["model"])
            self.ema.updates = checkpoint["ema"]["updates"]
        self.optimizer.load_state_dict(cpu_copy(checkpoint["optimizer"]))
        if checkpoint["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.loss.load_state_dict(checkpoint["loss"])

    def _backward(
        self,
        images: Tensor,
        targets: Tensor,
        *,
        group_size: int = 1,
        cells: bool = False,
        size_hw: tuple[int, int] | None = None,
    ) -> dict[str, Tensor]:
        images = to_input(images, self.device, size_hw)
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            outputs = self.network(images)
        terms = self.loss(outputs, targets.to(self.device, non_blocking=True), cells=cells)
        self.scaler.scale(terms["total"] / group_size).backward()
        return terms

    def _update(self) -> Tensor:
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm or float("inf"))
        self.finite = self.finite & norm.isfinite()
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # skips by itself
            self.scaler.update()
        else:
            # Fused optimizers skip by it; torch's GradScaler sets it so, but its stubs lack it.
            self.optimizer.found_inf = (~self.finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return norm


def all_reduce_if(wanted: bool, network: nn.Module) -> AbstractContextManager[None]:
    """In the block a backward pass through DDP adds up the ranks' gradients, or leaves each rank
    its own, to be added up with those of the next batches."""
    if wanted or not isinstance(network, DistributedDataParallel):
        return nullcontext()
    return network.no_sync()


def state_to_come(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Memory like that of Adam's two moments, which its first update makes; SGD's is there."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    without = [p for p in parameters if p.requires_grad and p not in optimizer.state]
    return [torch.empty_like(p) for p in without for _ in range(2)]


def blank_batch(batch_size: int, input_shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Black images, and one object to learn."""
    images = torch.zeros((batch_size, 3, *input_shape), dtype=torch.uint8)
    return images, torch.tensor([[0, 0, 0.5, 0.5, 0.2, 0.2]])


def on_every_rank(flag: Tensor) -> Tensor:
    """A bool scalar that is true where it is true on all ranks."""
    if world_size() == 1:
        return flag
    flag = flag.float()
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return flag > 0
