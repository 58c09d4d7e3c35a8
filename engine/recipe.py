"""What a training is told about how to learn: plain values, checked once."""

import dataclasses
import math

import torch

from engine.distributed import world_size
from engine.optimizer import SCHEDULES, check_optimizer, scaled_lr
from utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Phase:
    """Consecutive epochs with one batch size (pictures a process), backbone frozen or not."""

    last_epoch: int
    batch_size: int
    frozen: bool


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the weights are learnt. lr None means the optimizer's own; ema_decay 0 means no EMA."""

    phases: tuple[Phase, ...]
    optimizer: str = "sgd"
    lr: float | None = None
    momentum: float = 0.937
    weight_decay: float | None = None
    schedule: str = "cosine"
    accumulate: int = 1
    clip_norm: float = 10.0
    ema_decay: float = 0.9998
    amp_dtype: torch.dtype | None = None
    strong_share: float = 0.7
    num_workers: int = 0
    log_period: int = 10
    eval_period: int = 1
    save_period: int = 1
    seed: int = 0

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
        return "\n".join(lines)

    def rates(self, phase: Phase) -> tuple[float, float]:
        """(initial, minimal) learning rate of a phase, for all pictures of one update."""
        pictures = phase.batch_size * self.accumulate * world_size()
        return scaled_lr(self.optimizer, self.lr, pictures)


def plan_phases(
    *, epochs: int, batch_size: int, freeze_epochs: int, freeze_batch_size: int
) -> tuple[Phase, ...]:
    """The frozen phase, if any, then the unfrozen one up to `epochs`."""
    frozen = Phase(min(freeze_epochs, epochs), freeze_batch_size, frozen=True)
    unfrozen = Phase(epochs, batch_size, frozen=False)
    return (*([frozen] if freeze_epochs else []), *([unfrozen] if freeze_epochs < epochs else []))


def amp_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast type for auto, bf16, fp16 or off; None is full precision.

    Raises UserError for another name, or fp16 on the CPU, whose kernels lack it.
    """
    if name == "auto":
        if device.type != "cuda":
            return None
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
    if name not in kinds or (name == "fp16" and device.type == "cpu"):
        raise UserError(f"amp {name!r} on {device.type}: use auto, bf16 or off (fp16 on a GPU).")
    return kinds[name]
