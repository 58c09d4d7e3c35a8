"""YOLOv4's neck: spatial pyramid pooling (He et al. 2014) and PANet's two paths (Liu et al. 2018).

All channel counts given here are already scaled. p3, p4, p5 are the maps at strides 8, 16, 32.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nets.blocks import ConvBnAct


def alternating_convs(in_channels: int, channels: int, wide: int, *, count: int) -> nn.Sequential:
    """`count` (odd) convolutions, 1x1 to `channels` and 3x3 to `wide` in turn."""
    layers = [ConvBnAct(in_channels, channels, 1)]
    for _ in range(count // 2):
        layers += [ConvBnAct(channels, wide, 3), ConvBnAct(wide, channels, 1)]
    return nn.Sequential(*layers)


class SpatialPyramidPooling(nn.Module):
    """Three convolutions, max pools of 5, 9 and 13 beside the map itself, three convolutions."""

    def __init__(self, in_channels: int, channels: int, wide: int):
        super().__init__()
        self.before = alternating_convs(in_channels, channels, wide, count=3)
        self.pool = nn.MaxPool2d(kernel_size=5, stride=1, padding=2)
        self.after = alternating_convs(4 * channels, channels, wide, count=3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        # Pools of 9 and 13 are two and three pools of 5 in a row, at 75 against 275 comparisons;
        # exactly so at the borders too, since max pooling pads with -inf.
        pool5 = self.pool(x)
        pool9 = self.pool(pool5)
        pool13 = self.pool(pool9)
        return self.after(torch.cat((pool13, pool9, pool5, x), dim=1))


class TopDown(nn.Module):
    """Merge a deep map, reduced and upsampled, into the backbone's map of twice its size."""

    def __init__(self, deep_channels: int, lateral_channels: int, channels: int, *, wide: int):
        super().__init__()
        self.reduce = ConvBnAct(deep_channels, channels, 1)
        self.lateral = ConvBnAct(lateral_channels, channels, 1)
        self.merge = alternating_convs(2 * channels, channels, wide, count=5)

    def forward(self, deep: Tensor, lateral: Tensor) -> Tensor:
        upsampled = F.interpolate(self.reduce(deep), scale_factor=2, mode="nearest")
        return self.merge(torch.cat((self.lateral(lateral), upsampled), dim=1))


class BottomUp(nn.Module):
    """Merge a fine map, downsampled by a strided convolution, into the map of half its size."""

    def __init__(self, fine_channels: int, channels: int, wide: int):
        super().__init__()
        self.down = ConvBnAct(fine_channels, channels, 3, stride=2)
        self.merge = alternating_convs(2 * channels, channels, wide, count=5)

    def forward(self, fine: Tensor, lateral: Tensor) -> Tensor:
        return self.merge(torch.cat((self.down(fine), lateral), dim=1))
