"""CSPDarknet53, YOLOv4's backbone (Bochkovskiy et al. 2020; cross-stage partial: Wang et al. 2020).

Modules are registered in the order of darknet's convolutions, which its weight files follow.
"""

from functools import partial

import torch
from torch import Tensor, nn

from nets.blocks import ConvBnAct, scale_channels, scale_repeats
from nets.recompute import run_recomputed

STEM_CHANNELS = 32
# (output channels, channels of each half of the split, inner channels of a residual, residuals).
# The first stage splits without halving: both of its halves keep all 64 channels.
STAGES = (
    (64, 64, 32, 1),
    (128, 64, 64, 2),
    (256, 128, 128, 8),
    (512, 256, 256, 8),
    (1024, 512, 512, 4),
)

MishConv = partial(ConvBnAct, activation="mish")


class Residual(nn.Module):
    """x + 3x3(1x1(x)), (B, C, H, W) to the same shape."""

    def __init__(self, channels: int, inner_channels: int):
        super().__init__()
        self.reduce = MishConv(channels, inner_channels, 1)
        self.expand = MishConv(inner_channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.expand(self.reduce(x))


class CspStage(nn.Module):
    """Halve the resolution, then send only one half of the channels through the residuals."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        split_channels: int,
        inner_channels: int,
        repeats: int,
    ):
        super().__init__()
        self.down = MishConv(in_channels, out_channels, 3, stride=2)
        self.short = MishConv(out_channels, split_channels, 1)
        self.main = MishConv(out_channels, split_channels, 1)
        self.residuals = nn.Sequential(
            *(Residual(split_channels, inner_channels) for _ in range(repeats))
        )
        self.transition = MishConv(split_channels, split_channels, 1)
        self.merge = MishConv(2 * split_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        short = self.short(x)
        main = self.transition(self.residuals(self.main(x)))
        return self.merge(torch.cat((main, short), dim=1))


class CSPDarknet53(nn.Module):
    """Stem and five stages; returns the maps of the last three, at strides 8, 16, 32.

    The input is (B, 3, H, W), H and W multiples of 32.

    Attributes:
        out_channels: Channels of the three maps.
        recompute: Gradient checkpointing: in training, the activations of the stages are computed
            twice instead of kept.
    """

    def __init__(self, *, width: float = 1.0, depth: float = 1.0):
        super().__init__()
        self.recompute = False
        channels = scale_channels(STEM_CHANNELS, width)
        self.stem = MishConv(3, channels, 3)
        self.stages = nn.ModuleList()
        for stage in STAGES:
            out_channels, split, inner = (scale_channels(count, width) for count in stage[:3])
            self.stages.append(
                CspStage(
                    channels,
                    out_channels,
                    split_channels=split,
                    inner_channels=inner,
                    repeats=scale_repeats(stage[3], depth),
                )
            )
            channels = out_channels
        self.out_channels = tuple(scale_channels(stage[0], width) for stage in STAGES[-3:])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, maps = self.stem(images), []
        for stage in self.stages:
            frugal = self.recompute and self.training and torch.is_grad_enabled()
            x = run_recomputed(stage, x) if frugal else stage(x)
            maps.append(x)
        c3, c4, c5 = maps[-3:]
        return c3, c4, c5
