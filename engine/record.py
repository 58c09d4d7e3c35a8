"""How far a run has come, and what it writes of it: log, evaluations, checkpoints."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm import tqdm

from data.voc import Sample
from engine.console import progress_bar, progress_text, slow_start
from engine.guard import NonFiniteGuard
from engine.process import random_states, restore_random_states
from engine.runlog import RunLog, batch_image, detections_image
from engine.settings import TrainingSettings
from engine.statistics import EpochStatistics, StepStatistics, memory_gb
from metrics.evaluator import Evaluation, evaluate
from utils.distributed import broadcast_buffers, is_main
from weights.checkpoint import cpu_copy, save_checkpoint

if TYPE_CHECKING:
    from engine.trainer import TrainStep

# Of last.pt: it gets older than LONGEST_WAIT seconds only while an evaluation runs. Without
# --save_period it is also saved at the end of an epoch if that takes at most SAVE_SHARE of the
# time.
LONGEST_WAIT = 300
SAVE_SHARE = 0.05


class RunRecord:
    """Counts epochs and steps, and is told by the trainer's loop what happens between them.

    Attributes:
        epoch: Finished epochs.
        epoch_step: Finished steps of the running epoch.
        steps: Steps of the running epoch, in all.
        global_step: Finished steps of the run.
        metrics: Of the last evaluation, and best_AP50 with its best_epoch.
    """

    def __init__(
        self,
        step: "TrainStep",
        *,
        settings: TrainingSettings,
        metadata: Mapping[str, Any],
        val_samples: Sequence[Sample],
        guard: NonFiniteGuard,
        log: RunLog | None,
    ):
        self.step, self.settings, self.metadata = step, settings, metadata
        self.val_samples, self.guard, self.log = val_samples, guard, log
        self.statistics = EpochStatistics(guard)
        self.epoch = self.epoch_step = self.steps = self.global_step = 0
        self.metrics: dict[str, Any] = {"best_AP50": -1.0, "best_epoch": 0}
        self.conf_threshold = 0.5  # until an evaluation has measured one
        self.warned = False
        self.last_save = time.monotonic()
        self.save_seconds = 0.0  # that the last saving took

    @property
    def no_longer_improves(self) -> bool:
        """Whether `patience` epochs have gone by without a better AP50."""
        patience = self.settings.patience
        best = self.metrics.get("best_epoch", self.epoch)
        return bool(patience) and self.epoch - best >= patience

    def finish(self) -> bool:
        """Whether all epochs are done, or no more are needed.

        Raises UserError where all updates were skipped.
        """
        finished = self.epoch == self.settings.epochs or self.no_longer_improves
        if finished:
            self.guard.check_learnt()
        return finished

    def begin_epoch(self, steps: int) -> None:
        """An epoch of so many steps begins, or goes on."""
        if self.epoch_step and self.steps != steps:
            self._say("the number of images or processes has changed: this epoch begins again")
            self.epoch_step = 0
        self.steps = steps

    def progress_bar(self) -> tqdm:
        """The bar of the running epoch."""
        epochs = self.settings.epochs
        return progress_bar(self.epoch, epochs, done=self.epoch_step, steps=self.steps)

    def before_step(self, images: Tensor, targets: Tensor) -> None:
        """Draw the first batch of the run."""
        if self.global_step == 0 and self.log is not None:
            image = batch_image(images, targets, self.metadata["class_names"])
            self.log.image("train_batch", image, self.global_step)

    def after_step(self, statistics: StepStatistics, image_paths: Sequence[str], bar: tqdm) -> None:
        """Count the step; log and show the statistics of the step before it."""
        self.epoch_step += 1
        self.global_step += 1
        message = self.statistics.push(statistics, image_paths)
        self._tell(message, step=self.global_step - 1)
        bar.update()
        if self.statistics.last:
            text = progress_text(
                self.statistics,
                lr=self.step.optimizer.param_groups[0]["lr"],
                input_size=self.settings.input_size(self.global_step - 1),
                device=self.step.device,
            )
            bar.set_postfix_str(text, refresh=False)

    def save_between_steps(self, *, stop: bool) -> bool:
        """Save last.pt in mid-epoch when it is due or a stop is asked for. True means stop."""
        whole_group = self.epoch_step % self.settings.accumulate == 0
        due = stop or time.monotonic() - self.last_save > LONGEST_WAIT
        if not (due and whole_group) or self.epoch_step == self.steps:
            return False
        self._tell(self.statistics.flush(), step=self.global_step)
        self._wait()
        self._save_last()
        return stop

    def end_epoch(self, *, stop: bool) -> None:
        """Measure, log and save what the finished epoch has reached."""
        self._wait()
        self._tell(self.statistics.flush(), step=self.global_step)
        self.epoch, self.epoch_step = self.epoch + 1, 0
        last = self.epoch == self.settings.epochs
        self.statistics.join_ranks()
        broadcast_buffers(self.step.averaged())  # each rank has seen other images
        evaluation = None
        if self.epoch % self.settings.eval_period == 0 or last:
            evaluation = self._evaluate()
        if self.log is not None:
            self._say(self.log.epoch(self._row(evaluation)))
        if evaluation is not None:
            self._keep_best(evaluation)
            self._warn_of_slow_start()
        self.statistics = EpochStatistics(self.guard)
        if last or stop or self.no_longer_improves or self._save_is_due():
            self._save_last()
        if self.no_longer_improves and not last:
            self._say(
                f"stopped early: no better AP50 in the {self.settings.patience} epochs since epoch "
                f"{self.metrics['best_epoch']} (--patience)"
            )

    def _wait(self) -> None:
        """Until all is written that was saved before: no more than one epoch's is in memory."""
        if self.log is not None:
            self.log.behind.wait()

    def _evaluate(self) -> Evaluation:
        known = ("class_names", "anchors", "scale_xy", "input_shape")
        return evaluate(
            self.step.averaged(),
            samples=self.val_samples,
            loss=self.step.loss,
            device=self.step.device,
            batch_size=self.settings.phases[-1].batch_size,
            num_workers=self.settings.num_workers,
            progress=is_main(),
            **{name: self.metadata[name] for name in known},
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
        if improved:
            self.log.behind(save_checkpoint, self.log.folder / "best.pt", self._checkpoint())
        self.log.behind(self._draw, self.log, evaluation, self.global_step)

    def _draw(self, log: RunLog, evaluation: Evaluation, step: int) -> None:
        log.evaluation(evaluation, self.metadata["conf_loss"], step)
        names, threshold = self.metadata["class_names"], evaluation.conf_threshold
        image = detections_image(self.val_samples, evaluation.detections, names, threshold)
        log.image("val_detections", image, step)

    def _warn_of_slow_start(self) -> None:
        if self.log is not None and not self.warned:
            best, epochs = self.metrics["best_AP50"], self.settings.epochs
            self.warned = bool(note := slow_start(self.log.rows, epochs=epochs, best_ap50=best))
            self._say(note)

    def _row(self, evaluation: Evaluation | None) -> dict[str, Any]:
        """A line of metrics.csv."""
        row = {"epoch": self.epoch, "step": self.global_step, **self.statistics.row()}
        row |= {
            "lr": self.step.optimizer.param_groups[0]["lr"],
            "skipped_steps": self.guard.skipped,
            "memory_gb": memory_gb(self.step.device),
        }
        return row if evaluation is None else row | evaluation.row()

    def _checkpoint(self) -> dict[str, Any]:
        return {
            **self.metadata,
            "model": cpu_copy(self.step.averaged().state_dict()),
            "conf_threshold": float(self.conf_threshold),
            "epoch": self.epoch,
            "metrics": self.metrics,
        }

    def _save_is_due(self) -> bool:
        period = self.settings.save_period
        waited = time.monotonic() - self.last_save
        return self.epoch % period == 0 if period else SAVE_SHARE * waited >= self.save_seconds

    def _save_last(self) -> None:
        self.last_save = time.monotonic()
        if self.log is None:
            return
        state = {
            **self.step.state(),
            "schedule": {
                "epoch_step": self.epoch_step,
                "steps": self.steps,
                "figures": dict(self.statistics.state),
                "skipped_steps": self.guard.skipped,
                "updates": self.guard.made,
            },
            "random": random_states(),
            "step": self.global_step,
        }
        self.log.behind(self._write_last, self.log.folder / "last.pt", self._checkpoint() | state)

    def _write_last(self, path: Path, checkpoint: Mapping[str, Any]) -> None:
        save_checkpoint(path, checkpoint)
        self.save_seconds = time.monotonic() - self.last_save

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on where a last.pt was saved."""
        self.step.restore(checkpoint)
        schedule = checkpoint["schedule"]
        self.epoch, self.global_step = checkpoint["epoch"], checkpoint["step"]
        self.epoch_step, self.steps = schedule["epoch_step"], schedule["steps"]
        self.statistics.state.update(schedule["figures"])
        self.guard.skipped, self.guard.made = schedule["skipped_steps"], schedule.get("updates", 1)
        self.metrics, self.conf_threshold = checkpoint["metrics"], checkpoint["conf_threshold"]
        restore_random_states(checkpoint["random"])

    def _tell(self, message: str, *, step: int) -> None:
        """Print the guard's message on the step that was read, and log its cells if any."""
        self._say(message)
        if self.statistics.last_groups and self.log is not None:
            read = self.statistics.last | self.settings.input_columns(step - 1)
            self._say(self.log.step(step, read, self.statistics.last_groups))

    @staticmethod
    def _say(message: str) -> None:
        if message and is_main():
            tqdm.write(message)
