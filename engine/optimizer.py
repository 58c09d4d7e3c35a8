"""Optimizers with the original fork's parameter groups, its learning rates, and the EMA."""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from utils.errors import UserError

NOMINAL_BATCH = 64
MIN_LR_RATIO = 0.01
SCHEDULES = ("cosine", "step")
# Of the squared gradient's mean. The first steps from scratch have gradients ten times as long as
# later ones, and torch's .999 remembers them for the whole of a short run: steps stay too short.
ADAM_BETA2 = 0.99


class Defaults(NamedTuple):
    """What an optimizer has where the user gives nothing."""

    lr: float  # for 64 images per update
    low: float  # clamps of the scaled rate
    high: float
    weight_decay: float
    high_by_default: float  # the upper clamp where lr is not given


# SGD and Adam have the original fork's values. AdamW, which it lacks, may go higher: at .001, the
# fork's limit for Adam, BCCD reaches AP50 .73 in 60 epochs, at .005 .82 in 40. By default it ends
# at .005 whatever the batch, and narrow networks start from more: see `scaled_lr`.
OPTIMIZERS = {
    "sgd": Defaults(1e-2, 5e-4, 5e-2, 5e-4, 5e-2),
    "adam": Defaults(1e-3, 3e-4, 1e-3, 0.0, 1e-3),
    "adamw": Defaults(2e-2, 3e-4, 2e-2, 5e-2, 5e-3),
}


def check_optimizer(name: str) -> None:
    """Raise UserError if there is no optimizer of this name."""
    if name not in OPTIMIZERS:
        raise UserError(f"optimizer {name!r} is unknown. Use one of: {', '.join(OPTIMIZERS)}.")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Convolution weights with decay; BN weights and all biases without."""
    decayed = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    ids = {id(parameter) for parameter in decayed}
    others = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def build_optimizer(
    name: str, model: nn.Module, *, momentum: float = 0.937, weight_decay: float | None = None
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, Adam or AdamW (momentum is beta1), fused on every device.

    The fused forms take `found_inf`, a device scalar that skips a step without a sync.

    Args:
        name: sgd, adam or adamw.
        momentum: Of SGD; beta1 of Adam and AdamW.
        weight_decay: Of convolution weights; None is the optimizer's default.

    Raises:
        UserError: If the name is unknown.
    """
    check_optimizer(name)
    decay = OPTIMIZERS[name].weight_decay if weight_decay is None else weight_decay
    groups = parameter_groups(model, decay)
    lr = torch.finfo(torch.float32).tiny  # set before every step by the schedule
    if name == "sgd":
        nesterov = momentum > 0
        optimizer = torch.optim.SGD(groups, lr, momentum=momentum, nesterov=nesterov, fused=True)
        # The fused form cannot begin with some parameters later than with others, as happens
        # when the backbone unfreezes. A zero buffer gives the same first step as none.
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return kind(groups, lr, betas=(momentum, ADAM_BETA2), fused=True)


def scaled_lr(
    name: str, lr: float | None, batch_size: int, width: float = 1.0
) -> tuple[float, float]:
    """(initial, minimal) learning rate for a batch: lr * batch / 64, clamped as the fork does.

    lr None means the optimizer's own; AdamW's is divided by sqrt(width). Adam moves every weight
    by the rate, so that a filter of n inputs, whose norm is the same at every width, is turned by
    rate * sqrt(n): that stays the same. The minimum is .01 x, with limits of .01 x.
    """
    check_optimizer(name)
    own = OPTIMIZERS[name]
    high = own.high
    if lr is None:
        lr, high = own.lr, own.high_by_default
        if name == "adamw":
            lr /= math.sqrt(width)
    wanted = lr * batch_size / NOMINAL_BATCH
    limits = (own.low, high)
    initial = min(max(wanted, limits[0]), limits[1])
    low, high = (limit * MIN_LR_RATIO for limit in limits)
    return initial, min(max(wanted * MIN_LR_RATIO, low), high)


def learning_rate(
    progress: float, *, epochs: int, schedule: str, initial: float, minimal: float
) -> float:
    """The learning rate after `progress` epochs (a fraction within an epoch) out of `epochs`.

    "cosine": quadratic warm-up from .1 x, half a cosine, a flat end at the minimum.
    "step": ten equal steps, geometric from the initial to the minimal rate, no warm-up.
    """
    if schedule == "step":
        done = min(int(progress / (epochs / 10)), 9)
        return initial * (minimal / initial) ** (done / 9)
    warm_up = min(max(0.05 * epochs, 1), 3)
    flat = min(max(0.05 * epochs, 1), 15)
    if progress < warm_up:
        return 0.1 * initial + 0.9 * initial * (progress / warm_up) ** 2
    if progress >= epochs - flat:
        return minimal
    share = (progress - warm_up) / (epochs - warm_up - flat)
    return minimal + (initial - minimal) * (1 + math.cos(math.pi * share)) / 2


class Ema(AveragedModel):
    """Exponential moving average of weights and BN statistics with a ramped decay.

    After t updates the decay is min(decay, (1 + t) / (10 + t)): a short run forgets its first
    weights in time, a long one averages over 1 / (1 - decay) steps.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, use_buffers=True)
        self.requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take one step towards the model's weights and statistics.

        AveragedModel's own form copies a counter to the GPU and waits for it.
        """
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averaged = [*self.module.parameters(), *self.module.buffers()]
        current = [*model.parameters(), *model.buffers()]
        pairs = list(zip(averaged, current, strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        counts = [pair for pair in pairs if not pair[0].is_floating_point()]
        own, new = map(list, zip(*floats, strict=True))
        torch._foreach_lerp_(own, new, 1 - decay)
        if counts:
            own, new = map(list, zip(*counts, strict=True))
            torch._foreach_copy_(own, new)
