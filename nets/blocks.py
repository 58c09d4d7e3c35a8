"""Convolution, BN and activation in one module, and the rules that scale the network."""

import math
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

LEAKY_SLOPE = 0.1
ACTIVATIONS: dict[str, Callable[[], nn.Mish | nn.LeakyReLU]] = {
    "mish": nn.Mish,
    # In place is safe: BN's backward needs its input, leaky ReLU's only the sign of the result.
    "leaky": lambda: nn.LeakyReLU(LEAKY_SLOPE, inplace=True),
}


class BatchNorm(nn.BatchNorm2d):
    """BN that does not count its batches.

    At a fixed momentum nothing reads the number, and 107 counters are 107 launches per step.
    """

    def forward(self, x: Tensor) -> Tensor:
        statistics = (self.running_mean, self.running_var)
        affine = (self.weight, self.bias)
        momentum = self.momentum or 0.0
        return F.batch_norm(x, *statistics, *affine, self.training, momentum, self.eps)


class ConvBnAct(nn.Module):
    """Convolution without bias, padded to keep the size at stride 1, then BN and activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        activation: str = "leaky",
    ):
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False
        )
        self.bn: BatchNorm | nn.Identity  # the latter once it is folded
        self.bn = BatchNorm(out_channels, eps=1e-5, momentum=0.1)
        self.act = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


def scale_channels(channels: int, width: float) -> int:
    """Channels at a width multiplier: the nearest multiple of 8, at least 8."""
    return max(8, 8 * math.floor(channels * width / 8 + 0.5))


def scale_repeats(repeats: int, depth: float) -> int:
    """Residual blocks at a depth multiplier: rounded, at least 1."""
    return max(1, math.floor(repeats * depth + 0.5))
