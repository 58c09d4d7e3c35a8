"""YOLOv4 (Bochkovskiy et al. 2020): backbone, neck and three heads, from images to raw maps."""

import math

import torch
from torch import Tensor, nn

from nets.blocks import ConvBnAct, scale_channels
from nets.csp_darknet import CSPDarknet53
from nets.neck import BottomUp, SpatialPyramidPooling, TopDown
from utils.errors import UserError

ANCHORS_PER_SCALE = 3
BOX_CHANNELS = 5  # tx, ty, tw, th, objectness, before the classes
OBJECTNESS = 4
MAX_STRIDE = 32
# About one cell in a hundred holds an object. From .5 the first hundred steps would only learn
# this share: the confidence loss of an image starts at 5.3 from .5, and at .1 from this prior.
SCRATCH_PRIOR = 0.01


class Head(nn.Module):
    """A 3x3 convolution, then the 1x1 output convolution: the only kind with a bias and no BN."""

    def __init__(self, channels: int, wide: int, num_classes: int):
        super().__init__()
        self.conv = ConvBnAct(channels, wide, 3)
        self.output = nn.Conv2d(wide, ANCHORS_PER_SCALE * (BOX_CHANNELS + num_classes), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.conv(x))


class YoloV4(nn.Module):
    """YOLOv4; with width and depth 1.0 exactly the paper's network.

    Input: (B, 3, H, W) float RGB in 0..1, H and W multiples of 32. Output: three maps of logits,
    strides 8, 16, 32, each (B, 3 * (5 + num_classes), H / stride, W / stride); the channels of an
    anchor are tx, ty, tw, th, objectness, classes. Modules are registered in the order of
    darknet's convolutions, which its weight files follow.

    Args:
        width: Multiplier of the channels.
        depth: Multiplier of the residual blocks.

    Raises:
        UserError: For a class count below 1, a multiplier not above 0, or another input shape.
    """

    def __init__(self, num_classes: int, *, width: float = 1.0, depth: float = 1.0):
        super().__init__()
        check_arguments(num_classes, width, depth)
        self.num_classes, self.width, self.depth = num_classes, width, depth
        c128, c256, c512, c1024 = (scale_channels(c, width) for c in (128, 256, 512, 1024))
        self.backbone = CSPDarknet53(width=width, depth=depth)
        c3, c4, c5 = self.backbone.out_channels
        self.spp = SpatialPyramidPooling(c5, c512, c1024)
        self.top_down_p4 = TopDown(c512, c4, c256, wide=c512)
        self.top_down_p3 = TopDown(c256, c3, c128, wide=c256)
        self.head_p3 = Head(c128, c256, num_classes)
        self.bottom_up_p4 = BottomUp(c128, c256, c512)
        self.head_p4 = Head(c256, c512, num_classes)
        self.bottom_up_p5 = BottomUp(c256, c512, c1024)
        self.head_p5 = Head(c512, c1024, num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        check_input(images.shape)
        c3, c4, c5 = self.backbone(images)
        p5 = self.spp(c5)
        p4 = self.top_down_p4(p5, c4)
        p3 = self.top_down_p3(p4, c3)
        stride8 = self.head_p3(p3)
        p4 = self.bottom_up_p4(p3, p4)
        stride16 = self.head_p4(p4)
        p5 = self.bottom_up_p5(p4, p5)
        return stride8, stride16, self.head_p5(p5)

    def set_objectness_prior(self, pi: float) -> None:
        """Set the objectness biases so that a cell starts at probability pi (Lin et al. 2017).

        Raises:
            UserError: Unless 0 < pi < 1.
        """
        if not 0 < pi < 1:
            raise UserError(f"objectness prior {pi}: give a probability between 0 and 1.")
        for head in (self.head_p3, self.head_p4, self.head_p5):
            assert head.output.bias is not None  # it has no BN
            bias = head.output.bias.detach().view(ANCHORS_PER_SCALE, -1)
            bias[:, OBJECTNESS] = math.log(pi / (1 - pi))


def check_arguments(num_classes: int, width: float, depth: float) -> None:
    """Raise UserError for a class count below 1 or a multiplier not above 0."""
    if num_classes < 1:
        raise UserError(f"{num_classes} classes: a detector needs at least one.")
    for name, value in (("width", width), ("depth", depth)):
        if not 0 < value < math.inf:
            raise UserError(f"{name} {value}: give a multiplier above 0; 1.0 is the full YOLOv4.")


def check_input(shape: torch.Size) -> None:
    """Raise UserError unless the shape is (B, 3, H, W) with H and W multiples of 32."""
    if len(shape) != 4 or shape[1] != 3:
        raise UserError(f"input of shape {tuple(shape)}: the network takes (B, 3, H, W).")
    height, width = shape[2:]
    if min(height, width) < MAX_STRIDE or height % MAX_STRIDE or width % MAX_STRIDE:
        raise UserError(
            f"input of {height} x {width} pixels (height x width): both must be multiples of "
            f"{MAX_STRIDE}, for example 416 x 416. Change input_shape."
        )


def initialise(model: YoloV4, kind: str = "kaiming") -> None:
    """Set the weights for training from scratch.

    BN hides a weight's scale from the forward pass: the scale only sets how far a step turns it.
    Kaiming gives each filter the norm sqrt(2) whatever its fan-in, so that one learning rate
    suits all layers and widths; BN keeps torch's gamma 1 and beta 0. The output convolutions have
    no BN and start near 0: boxes begin as the anchors, probabilities as the biases say.

    Args:
        kind: "kaiming", or "normal" as in the original fork: N(0, .02) for convolutions and
            N(1, .02) for BN's gamma.

    Raises:
        UserError: For another kind.
    """
    if kind not in ("kaiming", "normal"):
        raise UserError(f"init {kind!r} is unknown. Allowed: kaiming, normal.")
    for module in model.modules():
        if not isinstance(module, nn.Conv2d | nn.BatchNorm2d) or module.weight.is_meta:
            continue  # of the meta device: nothing to fill, and torch would import its compiler
        if kind == "normal":
            is_norm = isinstance(module, nn.BatchNorm2d)
            nn.init.normal_(module.weight, mean=float(is_norm), std=0.02)
        elif isinstance(module, nn.Conv2d) and module.bias is None:
            nn.init.kaiming_normal_(module.weight, a=0.1)
        elif isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if kind == "kaiming":
        model.set_objectness_prior(SCRATCH_PRIOR)
