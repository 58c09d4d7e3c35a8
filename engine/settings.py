"""Settings of the trainer: plain values, checked once."""

import dataclasses
import math
from functools import cached_property

import torch

from data.sampler import random_generator
from engine.optimizer import SCHEDULES, check_optimizer, learning_rate, scaled_lr
from nets.yolo import MAX_STRIDE
from utils.distributed import gather_objects, is_main, world_size
from utils.errors import UserError
from utils.gpu import check_bf16

PERIOD = 10  # steps of one size, as in darknet
INPUT_COLUMNS = ("input_height", "input_width")  # of a step, in TensorBoard


@dataclasses.dataclass(frozen=True)
class MultiScale:
    """Which size the network's input has at a step: a function of seed and step alone.

    input_shape: (height, width). share: sizes lie between 1 / (1 + share) and 1 + share times
    that, darknet's random=1 being .4. They are all multiples of 32 there of the longer side; the
    shorter one has the same factor and is rounded to a multiple of 32, at least 32. So they are
    few, 9 for .4 at 416: cuDNN chooses its algorithms for each once.
    Every multiple is as likely as another, and stays so to the last epoch: unlike a mosaic, a
    resized image is a natural one. Validation is always at input_shape.
    Raises UserError for a share outside 0..1, or one that leaves input_shape as the only size.
    """

    input_shape: tuple[int, int]
    share: float
    seed: int

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise UserError(
                f"multi_scale is {self.share}; give a share from 0 (never) to below 1, such as 0.4."
            )
        if len(self.sizes) == 1:
            height, width = self.input_shape
            enough = math.ceil(1000 * MAX_STRIDE / max(height, width)) / 1000
            more = f"at least {enough}, " if enough < 1 else ""
            raise UserError(
                f"multi_scale {self.share} changes nothing: the next multiple of {MAX_STRIDE} is "
                f"further from input_shape {height} {width}. Give 0, {more}or a larger input_shape."
            )

    @cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """All (height, width), small to large."""
        longer, reach = max(self.input_shape) // MAX_STRIDE, 1 + self.share
        slack = 1e-9  # 160 is within a share of .25 of 128, whatever the rounding
        first, last = math.ceil(longer / reach - slack), math.floor(longer * reach + slack)
        return tuple(self._scaled(count / longer) for count in range(first, last + 1))

    def size_at(self, step: int) -> tuple[int, int]:
        """(height, width) of a step, counted over all epochs from 0."""
        # Four numbers, the last not 0 and not that of an epoch's order: no other draw has this key.
        rng = random_generator(self.seed, step // PERIOD, 0, 2)
        return self.sizes[rng.integers(len(self.sizes))]

    def _scaled(self, factor: float) -> tuple[int, int]:
        height, width = (
            MAX_STRIDE * max(1, round(side * factor / MAX_STRIDE)) for side in self.input_shape
        )
        return height, width

    def __str__(self) -> str:
        (low, left), (high, right) = self.sizes[0], self.sizes[-1]
        return (
            f"input: every {PERIOD} steps one of {len(self.sizes)} sizes, "
            f"{low} x {left} to {high} x {right}"
        )


@dataclasses.dataclass(frozen=True)
class Phase:
    """Consecutive epochs with one batch size (images a process), backbone frozen or not."""

    last_epoch: int
    batch_size: int
    frozen: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Everything the trainer needs besides model, loss and data; the defaults are train.py's.

    Attributes:
        phases: Frozen and unfrozen epochs.
        width: Channel multiplier of the network, which scales the default learning rate.
        lr: Learning rate at a total batch of 64; None is the optimizer's default.
        weight_decay: Of convolution weights; None is the optimizer's default.
        patience: Stop after this many epochs without a better validation AP50; 0 is never.
        ema_decay: 0 disables the EMA.
        multi_scale: None keeps one input size.
    """

    phases: tuple[Phase, ...]
    width: float
    optimizer: str
    lr: float | None
    momentum: float
    weight_decay: float | None
    schedule: str
    patience: int
    accumulate: int
    clip_norm: float
    ema_decay: float
    amp_dtype: torch.dtype | None
    multi_scale: MultiScale | None
    strong_share: float
    num_workers: int
    log_period: int
    eval_period: int
    save_period: int
    seed: int

    def __post_init__(self):
        check_optimizer(self.optimizer)
        if self.schedule not in SCHEDULES:
            raise UserError(f"schedule {self.schedule!r} is unknown. Use {' or '.join(SCHEDULES)}.")
        for name, high in (("momentum", 1), ("ema_decay", 1), ("strong_share", 1.0001)):
            if not 0 <= getattr(self, name) < high:
                raise UserError(f"{name} is {getattr(self, name)}; give a number from 0 to 1.")
        for name in ("lr", "weight_decay", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"{name} is {value}; give a number of 0 or more.")

    @property
    def epochs(self) -> int:
        """The last epoch of the last phase."""
        return self.phases[-1].last_epoch

    def __str__(self) -> str:
        lines = []
        for phase in self.phases:
            initial, minimal = self.rates(phase)
            what = "frozen backbone" if phase.frozen else "all layers"
            lines.append(
                f"to epoch {phase.last_epoch}: {what}, batch {phase.batch_size}, {self.optimizer}, "
                f"lr {initial:.2e} to {minimal:.2e} ({self.schedule})"
            )
        if self.multi_scale is not None:
            lines.append(str(self.multi_scale))
        return "\n".join(lines)

    def input_size(self, step: int) -> tuple[int, int] | None:
        """(height, width) that the images of a step are resized to; None: they never are."""
        return None if self.multi_scale is None else self.multi_scale.size_at(step)

    def input_columns(self, step: int) -> dict[str, float]:
        """The same for the log; nothing where the size never changes."""
        size_hw = self.input_size(step)
        return {} if size_hw is None else dict(zip(INPUT_COLUMNS, size_hw, strict=True))

    @property
    def largest_input(self) -> tuple[int, int] | None:
        """The largest of all `input_size`."""
        return None if self.multi_scale is None else self.multi_scale.sizes[-1]

    def phases_from(self, epoch: int) -> list[Phase]:
        """The phases that are left after so many epochs."""
        return [phase for phase in self.phases if epoch < phase.last_epoch]

    def phases_to_dry_run(self, epoch: int, *, on_gpu: bool) -> list[Phase]:
        """The phases from `epoch` on whose memory is tried before anything is learnt.

        That of an unfrozen phase after a frozen one; on a GPU also that of inputs which grow. A
        CPU would gain nothing by it: there the system ends a process without a word.
        """
        grows = on_gpu and self.multi_scale is not None
        unfreezes = self.phases[0].frozen
        return [
            phase for phase in self.phases_from(epoch) if grows or (unfreezes and not phase.frozen)
        ]

    def rates(self, phase: Phase) -> tuple[float, float]:
        """(initial, minimal) learning rate of a phase, for all images of one update."""
        images = phase.batch_size * self.accumulate * world_size()
        return scaled_lr(self.optimizer, self.lr, images, self.width)

    def learning_rate(self, progress: float, phase: Phase) -> float:
        """The learning rate after `progress` epochs, a fraction within an epoch."""
        initial, minimal = self.rates(phase)
        return learning_rate(
            progress,
            epochs=self.epochs,
            schedule=self.schedule,
            initial=initial,
            minimal=minimal,
        )


def epochs_for(images: int) -> int:
    """Epochs for a training set of so many images: 300 up to 1,000 of them, then fewer.

    300 sqrt(1000 / images), at least 30: 200 images are seen 60,000 times, 17,000 images 1.2
    million times, where the same 300 epochs would be 5 million.
    """
    return max(30, min(300, round(300 * math.sqrt(1000 / images))))


def plan_phases(
    *, epochs: int, batch_size: int, freeze_epochs: int, freeze_batch_size: int
) -> tuple[Phase, ...]:
    """The frozen phase, if any, then the unfrozen one up to `epochs`."""
    frozen = Phase(min(freeze_epochs, epochs), freeze_batch_size, frozen=True)
    unfrozen = Phase(epochs, batch_size, frozen=False)
    return (*([frozen] if freeze_epochs else []), *([unfrozen] if freeze_epochs < epochs else []))


def amp_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast type for auto, bf16, fp16 or off; None is full precision.

    Raises UserError for another name, for fp16 on the CPU, whose kernels lack it, and for bf16 on
    a GPU before Ampere.
    """
    if name == "auto":
        if device.type != "cuda":
            return None
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
    if name not in kinds or (name == "fp16" and device.type == "cpu"):
        raise UserError(f"amp {name!r} on {device.type}: use auto, bf16 or off (fp16 on a GPU).")
    if name == "bf16" and device.type == "cuda" and torch.cuda.is_available():
        check_bf16(torch.cuda.get_device_capability(device))
    return kinds[name]


def agree_on_precision(settings: TrainingSettings) -> TrainingSettings:
    """The settings with the precision of the least capable rank, for gradients of one kind.

    A collective call. A precision that differs is printed.
    """
    found = gather_objects(settings.amp_dtype)
    least = min(found, key=(None, torch.float16, torch.bfloat16).index)
    if len(set(found)) > 1 and is_main():
        names = [str(dtype or torch.float32).removeprefix("torch.") for dtype in found]
        chosen = str(least or torch.float32).removeprefix("torch.")
        print(f"precision: {chosen} on every rank, since the ranks have {', '.join(names)}")
    return dataclasses.replace(settings, amp_dtype=least)


def detection_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of weights and activations in detection, for the words of `amp_dtype`.

    auto: float16 on a GPU, else float32. Not bfloat16 as in training: nothing here needs its
    range, since the activations of a network with BN folded in stay far below 65504, and float16
    rounds 8 times finer, as fine as TF32, in which GPUs compute float32 convolutions anyway. GPUs
    before Ampere have it, too. Raises UserError as `amp_dtype`.
    """
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return amp_dtype(name, device) or torch.float32
