"""The training loop: `Trainer.fit`, an epoch of it, and a step: forward, loss, backward, update.

What is written of a run, and when, is in engine/record.py. Nothing in a step waits for the device.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.dataset import VocDataset
from data.loader import TrainingLoader, to_input
from data.sampler import EpochBatchSampler
from data.voc import Sample
from engine.guard import NonFiniteGuard, Rollback
from engine.optimizer import Ema, build_optimizer
from engine.process import random_states, restore_random_states, stop_on_signal
from engine.record import RunRecord
from engine.runlog import RunLog
from engine.settings import Phase, TrainingSettings
from engine.statistics import StepStatistics
from nets.cpu import use_fast_mish
from nets.yolo import YoloV4
from utils.distributed import data_parallel, rank, world_size
from utils.heap import keep_freed_memory
from weights.checkpoint import cpu_copy


class Trainer:
    """Trains a model with a loss on a data set.

    Args:
        metadata: Of every checkpoint (weights/checkpoint.py).
        log: The run's folder; None on ranks that write nothing.
        resume: A checkpoint with training state, to continue its run.
    """

    def __init__(
        self,
        *,
        model: YoloV4,
        loss: nn.Module,
        train_set: VocDataset,
        val_samples: Sequence[Sample],
        settings: TrainingSettings,
        metadata: Mapping[str, Any],
        device: torch.device,
        log: RunLog | None = None,
        resume: Mapping[str, Any] | None = None,
    ):
        if device.type == "cpu":
            use_fast_mish(model)
        self.model, self.train_set, self.settings = model, train_set, settings
        self.step = TrainStep(
            model=model,
            loss=loss,
            optimizer=build_optimizer(
                settings.optimizer,
                model,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay,
            ),
            ema=Ema(model, settings.ema_decay) if settings.ema_decay else None,
            device=device,
            amp_dtype=settings.amp_dtype,
            clip_norm=settings.clip_norm,
        )
        # fp16 skips updates while its gradient scaler looks for its scale.
        limit = 30 if settings.amp_dtype == torch.float16 else 5
        self.record = RunRecord(
            self.step,
            settings=settings,
            metadata=metadata,
            val_samples=val_samples,
            guard=NonFiniteGuard(limit=limit, conf_loss=metadata["conf_loss"]),
            log=log,
        )
        self.stop_requested = False
        if resume is not None:
            self.record.restore(resume)

    def fit(self) -> bool:
        """Train to the last epoch, or until `patience` ends it. False when SIGINT or SIGTERM did.

        Raises UserError when only non-finite steps come or have come.
        """
        self._dry_run()
        with stop_on_signal(self._request_stop):
            for phase in self.settings.phases_from(self.record.epoch):
                loader = self._begin_phase(phase)
                while self.record.epoch < phase.last_epoch and not self._stops:
                    self._train_epoch(phase, loader)
        return self.record.finish()

    def _train_epoch(self, phase: Phase, loader: TrainingLoader) -> None:
        """One epoch, or the rest of one that was interrupted."""
        record, batches = self.record, self._begin_epoch(phase, loader)
        with record.progress_bar() as bar:
            for (images, targets), indices in zip(loader, batches, strict=True):
                record.before_step(images, targets)
                self._set_learning_rate(phase)
                statistics = self.step(images, targets, **self._step_options())
                record.after_step(statistics, self.train_set.image_paths(indices), bar)
                if record.save_between_steps(stop=self.stop_requested):
                    return
        record.end_epoch(stop=self.stop_requested)

    @property
    def _stops(self) -> bool:
        return self.stop_requested or self.record.no_longer_improves

    def _request_stop(self) -> None:
        self.stop_requested = True

    def _dry_run(self) -> None:
        """Out of memory, unfrozen or at the largest input, must come now, not after hours."""
        states, device = random_states(), self.step.device
        ahead = self.settings.phases_to_dry_run(self.record.epoch, on_gpu=device.type == "cuda")
        for phase in ahead:
            self._freeze(phase.frozen)
            shape = (phase.batch_size, 3, *self.record.metadata["input_shape"])
            images = torch.zeros(shape, dtype=torch.uint8)
            targets = torch.tensor([[0, 0, 0.5, 0.5, 0.2, 0.2]])
            self.step.dry_run(images, targets, self.settings.largest_input)
        restore_random_states(states)

    def _begin_phase(self, phase: Phase) -> TrainingLoader:
        self._freeze(phase.frozen)
        self.step.network = self.model
        if world_size() > 1:
            self.step.network = data_parallel(self.model)
        sampler = EpochBatchSampler(
            len(self.train_set),
            phase.batch_size,
            seed=self.settings.seed,
            rank=rank(),
            world_size=world_size(),
            repeats=self.train_set.repeats,
        )
        return TrainingLoader(
            self.train_set,
            sampler,
            num_workers=self.settings.num_workers,
            for_gpu=self.step.device.type == "cuda",
        )

    def _freeze(self, frozen: bool) -> None:
        """A frozen backbone takes no gradient and, in eval mode, keeps its BN statistics."""
        self.model.train()
        self.step.loss.train()
        self.model.backbone.requires_grad_(not frozen).train(not frozen)

    def _begin_epoch(self, phase: Phase, loader: TrainingLoader) -> list[list[int]]:
        """Which images make the batches that are left of the epoch."""
        self._freeze(phase.frozen)
        record, sampler = self.record, loader.sampler
        mosaic = record.epoch < self.settings.strong_share * self.settings.epochs
        self.train_set.set_epoch(record.epoch, mosaic=mosaic)
        record.begin_epoch(steps=len(sampler))
        sampler.set_epoch(record.epoch, record.epoch_step)
        return list(sampler)

    def _set_learning_rate(self, phase: Phase) -> None:
        progress = self.record.epoch + self.record.epoch_step / self.record.steps
        for group in self.step.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate(progress, phase)

    def _step_options(self) -> dict[str, Any]:
        """What the next step is besides its batch: `TrainStep.__call__`."""
        settings, record = self.settings, self.record
        first = record.epoch_step - record.epoch_step % settings.accumulate
        group_size = min(settings.accumulate, record.steps - first)
        looks = record.global_step % settings.log_period == 0 or record.epoch_step == 0
        return {
            "size_hw": settings.input_size(record.global_step),
            "cells": looks,
            "group_size": group_size,
            "update": record.epoch_step + 1 == first + group_size,
        }


class TrainStep:
    """Forward, loss, backward and update for one batch.

    A batch with a non-finite loss changes neither weights, optimizer, BN statistics nor the loss's
    state; one with a non-finite gradient neither weights nor optimizer. `network` is what runs the
    forward: the model, or DDP around it.

    Args:
        ema: None keeps no average.
        amp_dtype: Of autocast; None means full precision, float16 brings a gradient scaler.
        clip_norm: Of the gradient; 0 clips nothing.
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
        self.rollback = Rollback(model, loss)
        self.finite = torch.ones((), dtype=torch.bool, device=device)  # since the last update
        if device.type == "cpu":
            keep_freed_memory()

    def __call__(
        self,
        images: Tensor,
        targets: Tensor,
        *,
        group_size: int = 1,
        update: bool = True,
        **options: Any,
    ) -> StepStatistics:
        """Learn from a batch.

        Args:
            group_size: Over how many batches the gradient is accumulated.
            update: Whether this is the last of them.
            **options: size_hw and cells, as `forward` takes them.
        """
        self.rollback.snapshot()
        # What DDP.no_sync() sets: ranks add up their gradients only where an update follows.
        self.network.require_backward_grad_sync = update  # type: ignore[assignment]
        terms = self.forward(images, targets, **options)
        self.scaler.scale(terms["total"] / group_size).backward()
        finite = on_every_rank(terms["total"].detach().isfinite())
        self.rollback.restore_unless(finite)
        self.finite = self.finite & finite
        norm = skipped = torch.zeros_like(terms["total"])
        if update:
            norm = self.update()
            skipped, self.finite = ~self.finite, torch.ones_like(self.finite)
        return StepStatistics(dict(terms, grad_norm=norm, finite=finite, skipped=skipped))

    def forward(
        self,
        images: Tensor,
        targets: Tensor,
        *,
        size_hw: tuple[int, int] | None = None,
        cells: bool = False,
    ) -> dict[str, Any]:
        """The loss terms of a batch.

        Args:
            images: uint8 (B, 3, H, W).
            targets: (N, 6), as `collate` makes them.
            size_hw: The images are resized to it on the device; None leaves them as they are.
            cells: Whether to look at the confidence loss by groups of cells, too.
        """
        images = to_input(images, self.device, size_hw)
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            outputs = self.network(images)
        return self.loss(outputs, targets.to(self.device, non_blocking=True), cells=cells)

    def update(self) -> Tensor:
        """Change the weights by the gradients and forget these. Returns the gradients' norm."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm or float("inf"))
        self.finite = self.finite & norm.isfinite()
        # Fused optimizers skip by it. GradScaler.step() would set it from the gradients alone, and
        # update where the loss is infinite and they are not. torch's stubs lack it.
        self.optimizer.found_inf = (~self.finite).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.scaler.is_enabled():
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return norm

    def dry_run(
        self, images: Tensor, targets: Tensor, size_hw: tuple[int, int] | None = None
    ) -> None:
        """A step's forward and backward that leave no trace, to learn whether memory suffices."""
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        loss_state = copy.deepcopy(self.loss.state_dict())
        to_come = state_to_come(self.optimizer)
        self.forward(images, targets, size_hw=size_hw)["total"].backward()
        del to_come
        self.optimizer.zero_grad(set_to_none=True)
        self.loss.load_state_dict(loss_state)
        for buffer, saved in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(saved)

    def averaged(self) -> nn.Module:
        """What is evaluated, and a checkpoint's model: the EMA where there is one."""
        return self.ema.module if self.ema is not None else self.model

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


def state_to_come(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Memory like that of Adam's two moments, which its first update makes; SGD's is there."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    without = [p for p in parameters if p.requires_grad and p not in optimizer.state]
    return [torch.empty_like(p) for p in without for _ in range(2)]


def on_every_rank(flag: Tensor) -> Tensor:
    """A bool scalar that is true where it is true on all ranks."""
    if world_size() == 1:
        return flag
    flag = flag.float()
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return flag > 0
