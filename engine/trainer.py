"""The training loop: phases, epochs, evaluation, checkpoints. It receives model and loss."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.dataset import VocDataset
from data.loader import TrainingLoader
from data.sampler import EpochBatchSampler
from data.voc import Sample
from engine.console import progress_bar, progress_text, slow_start
from engine.figures import EpochFigures, memory_gb
from engine.guard import NonFiniteGuard
from engine.images import batch_image, detections_image
from engine.optimizer import Ema, build_optimizer
from engine.randomness import random_states, restore_random_states
from engine.runlog import RunLog
from engine.settings import Phase, TrainingSettings
from engine.step import TrainStep, blank_batch
from engine.stop import stop_on_signal
from metrics.evaluator import Evaluation, evaluate
from nets.cpu import use_fast_mish
from nets.yolo import YoloV4
from utils.distributed import broadcast_buffers, is_main, rank, world_size
from utils.errors import UserError
from weights.checkpoint import cpu_copy, save_checkpoint

SAVE_SECONDS = 300  # last.pt is never older than this


class Trainer:
    """Trains a model with a loss on a data set and keeps the run's folder.

    metadata: of every checkpoint (weights/checkpoint.py). log: None on ranks
    that write nothing. resume: a checkpoint with training state, to continue its run.
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
        self.model, self.loss, self.device = model, loss, device
        self.train_set, self.val_samples = train_set, val_samples
        self.settings, self.metadata, self.log = settings, metadata, log
        self.ema = Ema(model, settings.ema_decay) if settings.ema_decay else None
        self.optimizer = build_optimizer(
            settings.optimizer,
            model,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        self.step = TrainStep(
            model=model,
            loss=loss,
            optimizer=self.optimizer,
            ema=self.ema,
            device=device,
            amp_dtype=settings.amp_dtype,
            clip_norm=settings.clip_norm,
        )
        limit = 30 if settings.amp_dtype == torch.float16 else 5
        self.guard = NonFiniteGuard(limit=limit, conf_loss=metadata["conf_loss"])
        self.figures = EpochFigures(self.guard)
        self.epoch = self.epoch_step = self.global_step = 0  # finished ones
        self.steps = 0  # of the running epoch
        self.metrics: dict[str, Any] = {"best_AP50": -1.0, "best_epoch": 0}
        self.conf_threshold = 0.5  # until an evaluation has measured one
        self.stop_requested = self.warned = False
        self.last_save = time.monotonic()
        if resume is not None:
            self._restore(resume)

    def fit(self) -> bool:
        """Train to the last epoch, or until `patience` ends it. False when SIGINT or SIGTERM did.

        Raises UserError when memory runs out, or only non-finite steps come or have come.
        """
        try:
            self._dry_run()
            with stop_on_signal(self._request_stop):
                for phase in self.settings.phases:
                    if self.epoch < phase.last_epoch and not self._stops:
                        self._run_phase(phase)
        except torch.OutOfMemoryError as error:
            raise UserError(
                "the GPU's memory is not enough. Start again with half the --batch_size (double "
                "--accumulate keeps the update), with --recompute, a smaller --input_shape or less "
                "--multi_scale. "
                f"{error}"
            ) from None
        finished = self.epoch == self.settings.epochs or self._no_longer_improves
        if finished:
            self.guard.check_learnt()
        return finished

    @property
    def _no_longer_improves(self) -> bool:
        """Whether `patience` epochs have gone by without a better AP50."""
        patience = self.settings.patience
        return (
            bool(patience) and self.epoch - self.metrics.get("best_epoch", self.epoch) >= patience
        )

    @property
    def _stops(self) -> bool:
        return self.stop_requested or self._no_longer_improves

    def _request_stop(self) -> None:
        self.stop_requested = True

    def _dry_run(self) -> None:
        """Out of memory, unfrozen or at the largest input, must come now, not after hours."""
        states, on_gpu = random_states(), self.device.type == "cuda"
        for phase in self.settings.phases_to_dry_run(self.epoch, on_gpu=on_gpu):
            self._freeze(phase.frozen)
            images, targets = blank_batch(phase.batch_size, self.metadata["input_shape"])
            self.step.dry_run(images, targets, self.settings.largest_input)
        restore_random_states(states)

    def _run_phase(self, phase: Phase) -> None:
        self._freeze(phase.frozen)
        if world_size() > 1:
            # BN statistics are rank 0's, and are shared when they are used: at an evaluation.
            self.step.network = DistributedDataParallel(self.model, broadcast_buffers=False)
        sampler = EpochBatchSampler(
            len(self.train_set),
            phase.batch_size,
            seed=self.settings.seed,
            rank=rank(),
            world_size=world_size(),
            repeats=self.train_set.repeats,
        )
        loader = TrainingLoader(
            self.train_set,
            sampler,
            num_workers=self.settings.num_workers,
            pin_memory=self.device.type == "cuda",
        )
        while self.epoch < phase.last_epoch and not self._stops:
            self._run_epoch(phase, sampler, loader)
        self.step.network = self.model

    def _freeze(self, frozen: bool) -> None:
        """A frozen backbone takes no gradient and, in eval mode, keeps its BN statistics."""
        self.model.train()
        self.loss.train()
        self.model.backbone.requires_grad_(not frozen).train(not frozen)

    def _run_epoch(self, phase: Phase, sampler: EpochBatchSampler, loader: TrainingLoader) -> None:
        self._freeze(phase.frozen)
        mosaic = self.epoch < self.settings.strong_share * self.settings.epochs
        self.train_set.set_epoch(self.epoch, mosaic=mosaic)
        if self.epoch_step and self.steps != len(sampler):
            self._say("the number of images or processes has changed: this epoch begins again")
            self.epoch_step = 0
        self.steps = len(sampler)
        sampler.set_epoch(self.epoch, self.epoch_step)
        epochs = self.settings.epochs
        with progress_bar(self.epoch, epochs, done=self.epoch_step, steps=self.steps) as bar:
            for (images, targets), indices in zip(loader, list(sampler), strict=True):
                self._run_step(images, targets, indices, steps=len(sampler), phase=phase)
                self._show(bar)
                if self._save_between_steps(len(sampler)):
                    return
        self._tell(self.figures.flush(), step=self.global_step)
        self.epoch, self.epoch_step = self.epoch + 1, 0
        self._end_epoch()

    def _run_step(
        self, images: Tensor, targets: Tensor, indices: list[int], *, steps: int, phase: Phase
    ) -> None:
        """One batch: set the learning rate, learn, take in the figures of the step before."""
        if self.global_step == 0 and self.log is not None:
            image = batch_image(images, targets, self.metadata["class_names"])
            self.log.image("train_batch", image, self.global_step)
        lr = self.settings.learning_rate(self.epoch + self.epoch_step / steps, phase)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        first = self.epoch_step - self.epoch_step % self.settings.accumulate
        group_size = min(self.settings.accumulate, steps - first)
        update = self.epoch_step + 1 == first + group_size
        cells = self.global_step % self.settings.log_period == 0 or self.epoch_step == 0
        size_hw = self.settings.input_size(self.global_step)
        figures = self.step(
            images, targets, group_size=group_size, update=update, cells=cells, size_hw=size_hw
        )
        self.epoch_step += 1
        self.global_step += 1
        samples = self.train_set.samples
        paths = [samples[index % len(samples)].image_path for index in indices]
        self._tell(self.figures.push(figures, paths), step=self.global_step - 1)

    def _save_between_steps(self, steps: int) -> bool:
        """Save last.pt in mid-epoch when it is due or a stop is asked for. True means stop."""
        whole_group = self.epoch_step % self.settings.accumulate == 0
        due = self.stop_requested or time.monotonic() - self.last_save > SAVE_SECONDS
        if not (due and whole_group) or self.epoch_step == steps:
            return False
        self._tell(self.figures.flush(), step=self.global_step)
        self._save_last()
        return self.stop_requested

    def _end_epoch(self) -> None:
        """Measure, log and save what the finished epoch has reached."""
        last = self.epoch == self.settings.epochs
        self.figures.join_ranks()
        broadcast_buffers(self._weights())  # each rank has seen other images
        evaluation = None
        if self.epoch % self.settings.eval_period == 0 or last:
            known = ("class_names", "anchors", "scale_xy", "input_shape")
            evaluation = evaluate(
                self._weights(),
                samples=self.val_samples,
                loss=self.loss,
                device=self.device,
                batch_size=self.settings.phases[-1].batch_size,
                num_workers=self.settings.num_workers,
                progress=is_main(),
                **{name: self.metadata[name] for name in known},
            )
        if self.log is not None:
            self._say(self.log.epoch(self._row(evaluation)))
        if evaluation is not None:
            self._keep_best(evaluation)
            self._warn_of_slow_start()
        self.figures = EpochFigures(self.guard)
        if self.epoch % self.settings.save_period == 0 or last or self._stops:
            self._save_last()
        if self._no_longer_improves and not last:
            self._say(
                f"stopped early: no better AP50 in the {self.settings.patience} epochs since epoch "
                f"{self.metrics['best_epoch']} (--patience)"
            )

    def _keep_best(self, evaluation: Evaluation) -> None:
        self.conf_threshold = evaluation.conf_threshold
        best, found = max(self.metrics["best_AP50"], -1.0), evaluation.metrics()
        improved = not found["AP50"] <= best  # NaN, without any ground truth, counts as better
        best = found["AP50"] if improved else best
        best_epoch = self.epoch if improved else self.metrics.get("best_epoch", self.epoch)
        self.metrics = {**found, "best_AP50": best, "best_epoch": best_epoch}
        if self.log is None:
            return
        self.log.evaluation(evaluation, self.metadata["conf_loss"], self.global_step)
        image = detections_image(
            self.val_samples,
            evaluation.detections,
            self.metadata["class_names"],
            self.conf_threshold,
        )
        self.log.image("val_detections", image, self.global_step)
        if improved:
            save_checkpoint(self.log.folder / "best.pt", self._checkpoint())

    def _warn_of_slow_start(self) -> None:
        if self.log is not None and not self.warned:
            best, epochs = self.metrics["best_AP50"], self.settings.epochs
            self.warned = bool(note := slow_start(self.log.rows, epochs=epochs, best_ap50=best))
            self._say(note)

    def _weights(self) -> nn.Module:
        """What a checkpoint carries as its model: the EMA where there is one."""
        return self.ema.module if self.ema is not None else self.model

    def _row(self, evaluation: Evaluation | None) -> dict[str, Any]:
        """A line of metrics.csv."""
        row = {"epoch": self.epoch, "step": self.global_step, **self.figures.row()}
        row |= {
            "lr": self.optimizer.param_groups[0]["lr"],
            "skipped_steps": self.guard.skipped,
            "memory_gb": memory_gb(self.device),
        }
        return row if evaluation is None else row | evaluation.row()

    def _checkpoint(self) -> dict[str, Any]:
        return {
            **self.metadata,
            "model": cpu_copy(self._weights().state_dict()),
            "conf_threshold": float(self.conf_threshold),
            "epoch": self.epoch,
            "metrics": self.metrics,
        }

    def _save_last(self) -> None:
        self.last_save = time.monotonic()
        if self.log is None:
            return
        state = {
            **self.step.state(),
            "schedule": {
                "epoch_step": self.epoch_step,
                "steps": self.steps,
                "figures": dict(self.figures.state),
                "skipped_steps": self.guard.skipped,
                "updates": self.guard.made,
            },
            "random": random_states(),
            "step": self.global_step,
        }
        save_checkpoint(self.log.folder / "last.pt", self._checkpoint() | state)

    def _restore(self, checkpoint: Mapping[str, Any]) -> None:
        self.step.restore(checkpoint)
        schedule = checkpoint["schedule"]
        self.epoch, self.global_step = checkpoint["epoch"], checkpoint["step"]
        self.epoch_step, self.steps = schedule["epoch_step"], schedule["steps"]
        self.figures.state.update(schedule["figures"])
        self.guard.skipped, self.guard.made = schedule["skipped_steps"], schedule.get("updates", 1)
        self.metrics, self.conf_threshold = checkpoint["metrics"], checkpoint["conf_threshold"]
        restore_random_states(checkpoint["random"])

    def _show(self, bar: tqdm) -> None:
        """Advance the bar; its figures are those of the step before."""
        bar.update()
        if self.figures.last:
            text = progress_text(
                self.figures,
                lr=self.optimizer.param_groups[0]["lr"],
                input_size=self.settings.input_size(self.global_step - 1),
                device=self.device,
            )
            bar.set_postfix_str(text, refresh=False)

    def _tell(self, message: str, *, step: int) -> None:
        """Print the guard's message on the step that was read, and log its cells if any."""
        self._say(message)
        if self.figures.last_groups and self.log is not None:
            figures = self.figures.last | self.settings.input_figures(step - 1)
            self._say(self.log.step(step, figures, self.figures.last_groups))

    @staticmethod
    def _say(message: str) -> None:
        if message and is_main():
            tqdm.write(message)
