"""The original fork's network, written plainly from its description: the reference for speed.

It computes what nets.yolo.YoloV4 computes at width and depth 1, as that fork does: Mish from
softplus and tanh, activations that keep their input, three max pools over the same map, memory in
torch's default order. Tensors have the fork's names, so that its .pth files load here.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STAGES = ((32, 64, 1), (64, 128, 2), (128, 256, 8), (256, 512, 8), (512, 1024, 4))


class Mish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tanh(F.softplus(x))


class MishUnit(nn.Module):
    """Convolution, BN, Mish."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1):
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.activation = Mish()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.bn(self.conv(x)))


class Residual(nn.Module):
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.block = nn.Sequential(MishUnit(channels, hidden, 1), MishUnit(hidden, channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class Stage(nn.Module):
    """Downsample, split in two, residuals on one half, concatenate [main, short]."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, *, first: bool):
        super().__init__()
        half = out_channels if first else out_channels // 2
        hidden = out_channels // 2
        self.downsample_conv = MishUnit(in_channels, out_channels, 3, stride=2)
        self.split_conv0 = MishUnit(out_channels, half, 1)
        self.split_conv1 = MishUnit(out_channels, half, 1)
        residuals = [Residual(half, hidden) for _ in range(blocks)]
        self.blocks_conv = nn.Sequential(*residuals, MishUnit(half, half, 1))
        self.concat_conv = MishUnit(2 * half, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample_conv(x)
        short = self.split_conv0(x)
        main = self.blocks_conv(self.split_conv1(x))
        return self.concat_conv(torch.cat([main, short], dim=1))


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = MishUnit(3, 32, 3)
        self.stages = nn.ModuleList(
            Stage(inner, outer, blocks, first=index == 0)
            for index, (inner, outer, blocks) in enumerate(STAGES)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.stages[1](self.stages[0](self.conv1(x)))
        c3 = self.stages[2](x)
        c4 = self.stages[3](c3)
        return c3, c4, self.stages[4](c4)


def leaky_unit(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Module:
    padding = kernel_size // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
    parts = {"conv": conv, "bn": nn.BatchNorm2d(out_channels), "relu": nn.LeakyReLU(0.1)}
    return nn.Sequential(OrderedDict(parts))


def alternating(in_channels: int, narrow: int, wide: int, count: int) -> nn.Sequential:
    units = [leaky_unit(in_channels, narrow, 1)]
    for _ in range(count // 2):
        units += [leaky_unit(narrow, wide, 3), leaky_unit(wide, narrow, 1)]
    return nn.Sequential(*units)


def head(channels: int, wide: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(leaky_unit(channels, wide, 3), nn.Conv2d(wide, outputs, 1))


class Upsample(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        unit = leaky_unit(in_channels, out_channels, 1)
        self.upsample = nn.Sequential(unit, nn.Upsample(scale_factor=2, mode="nearest"))

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(x)


class ForkYolo(nn.Module):
    """(B, 3, H, W) in; three maps out at strides 8, 16, 32, as of nets.yolo.YoloV4."""

    def __init__(self, num_classes: int):
        super().__init__()
        outputs = 3 * (5 + num_classes)
        self.backbone = Backbone()
        self.conv1 = alternating(1024, 512, 1024, 3)
        self.pools = nn.ModuleList(nn.MaxPool2d(size, 1, size // 2) for size in (13, 9, 5))
        self.conv2 = alternating(2048, 512, 1024, 3)
        self.upsample1 = Upsample(512, 256)
        self.conv_for_P4 = leaky_unit(512, 256, 1)
        self.make_five_conv1 = alternating(512, 256, 512, 5)
        self.upsample2 = Upsample(256, 128)
        self.conv_for_P3 = leaky_unit(256, 128, 1)
        self.make_five_conv2 = alternating(256, 128, 256, 5)
        self.yolo_head3 = head(128, 256, outputs)
        self.down_sample1 = leaky_unit(128, 256, 3, stride=2)
        self.make_five_conv3 = alternating(512, 256, 512, 5)
        self.yolo_head2 = head(256, 512, outputs)
        self.down_sample2 = leaky_unit(256, 512, 3, stride=2)
        self.make_five_conv4 = alternating(1024, 512, 1024, 5)
        self.yolo_head1 = head(512, 1024, outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c3, c4, c5 = self.backbone(x)
        p5 = self.conv1(c5)
        p5 = self.conv2(torch.cat([*(pool(p5) for pool in self.pools), p5], dim=1))
        p4 = torch.cat([self.conv_for_P4(c4), self.upsample1(p5)], dim=1)
        p4 = self.make_five_conv1(p4)
        p3 = torch.cat([self.conv_for_P3(c3), self.upsample2(p4)], dim=1)
        p3 = self.make_five_conv2(p3)
        p4 = self.make_five_conv3(torch.cat([self.down_sample1(p3), p4], dim=1))
        p5 = self.make_five_conv4(torch.cat([self.down_sample2(p4), p5], dim=1))
        return self.yolo_head3(p3), self.yolo_head2(p4), self.yolo_head1(p5)
