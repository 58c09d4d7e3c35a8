"""Write and read darknet's .cfg: the network's structure for darknet and OpenCV."""

import dataclasses
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nets.blocks import ConvBnAct
from nets.csp_darknet import CspStage, Residual
from nets.neck import BottomUp, SpatialPyramidPooling, TopDown
from nets.yolo import ANCHORS_PER_SCALE, Head, YoloV4
from utils.errors import UserError

# Options that change a layer's result, with darknet's defaults. Padding follows from the size.
STRUCTURE = {
    "filters": "1",
    "size": "1",
    "stride": "1",
    "batch_normalize": "0",
    "activation": "linear",
    "groups": "1",
    "dilation": "1",
    "layers": "",
    "group_id": "0",
    "from": "",
    "mask": "",
    "anchors": "",
    "classes": "",
    "new_coords": "0",
}
NET = """\
[net]
batch=64
subdivisions=16
width={width}
height={height}
channels=3
letter_box=1
momentum=0.949
decay=0.0005
angle=0
saturation=1.5
exposure=1.5
hue=0.1
mosaic=1
learning_rate=0.0013
burn_in=1000
max_batches={batches}
policy=steps
steps={steps}
scales=.1,.1
"""


@dataclasses.dataclass(frozen=True)
class Cfg:
    """What a .cfg stores and a .weights file does not.

    Attributes:
        anchors: Nine (w, h) in pixels of the network input.
        input_shape: (height, width) in pixels.
    """

    num_classes: int
    anchors: tuple[tuple[float, float], ...]
    input_shape: tuple[int, int]
    scale_xy: tuple[float, ...]


Section = tuple[str, dict[str, str]]


def write_cfg(network: YoloV4, cfg: Cfg) -> str:
    """The text of a .cfg for this network: its structure, and settings for training in darknet.

    The settings are YOLOv4's, with the number of batches that darknet's manual advises for custom
    data: 2000 per class and at least 6000. The learning rate falls at 80% and 90% of them.
    """
    height, width = cfg.input_shape
    batches = max(6000, 2000 * cfg.num_classes)
    steps = f"{batches * 8 // 10},{batches * 9 // 10}"
    blocks = [NET.format(width=width, height=height, batches=batches, steps=steps)]
    for kind, options in Layers(network, cfg).sections:
        lines = [f"{key}={value}" for key, value in options.items()]
        blocks.append("\n".join([f"[{kind}]", *lines]) + "\n")
    return "\n".join(blocks)


class Layers:
    """The sections of a network's layers, in darknet's order."""

    def __init__(self, network: YoloV4, cfg: Cfg):
        self.cfg = cfg
        self.sections: list[tuple[str, dict[str, Any]]] = []
        self.conv(network.backbone.stem)
        _, _, c3, c4, _ = [self.stage(stage) for stage in network.backbone.stages]
        self.pyramid_pooling(network.spp)
        p5 = self.last
        p4 = self.top_down(network.top_down_p4, c4)
        p3 = self.top_down(network.top_down_p3, c3)
        self.head(network.head_p3, level=0)
        self.bottom_up(network.bottom_up_p4, p3, p4)
        p4 = self.last
        self.head(network.head_p4, level=1)
        self.bottom_up(network.bottom_up_p5, p4, p5)
        self.head(network.head_p5, level=2)

    @property
    def last(self) -> int:
        """Index of the last layer so far."""
        return len(self.sections) - 1

    def add(self, kind: str, **options: Any) -> int:
        self.sections.append((kind, options))
        return self.last

    def conv(self, unit: ConvBnAct) -> int:
        return self.add(
            "convolutional",
            batch_normalize=1,
            filters=unit.conv.out_channels,
            size=unit.conv.kernel_size[0],
            stride=unit.conv.stride[0],
            pad=1,
            activation="mish" if isinstance(unit.act, nn.Mish) else "leaky",
        )

    def convs(self, units: nn.Sequential) -> int:
        for unit in units:
            assert isinstance(unit, ConvBnAct)
            self.conv(unit)
        return self.last

    def route(self, *layers: int) -> int:
        """Continue from the concatenation of these layers, given by index."""
        here = len(self.sections)
        return self.add("route", layers=",".join(str(layer - here) for layer in layers))

    def stage(self, stage: nn.Module) -> int:
        assert isinstance(stage, CspStage)  # for the type: a ModuleList yields nn.Module
        down = self.conv(stage.down)
        short = self.conv(stage.short)
        self.route(down)
        self.conv(stage.main)
        for residual in stage.residuals:
            assert isinstance(residual, Residual)
            self.conv(residual.reduce)
            self.conv(residual.expand)
            self.add("shortcut", **{"from": -3, "activation": "linear"})
        self.route(self.conv(stage.transition), short)
        return self.conv(stage.merge)

    def pyramid_pooling(self, spp: SpatialPyramidPooling) -> None:
        start = self.convs(spp.before)
        pools = []
        for size in (5, 9, 13):
            pools.append(self.add("maxpool", stride=1, size=size))
            if size < 13:
                self.route(start)
        self.route(*reversed(pools), start)
        self.convs(spp.after)

    def top_down(self, path: TopDown, lateral: int) -> int:
        self.conv(path.reduce)
        upsampled = self.add("upsample", stride=2)
        self.route(lateral)
        self.route(self.conv(path.lateral), upsampled)
        return self.convs(path.merge)

    def bottom_up(self, path: BottomUp, fine: int, lateral: int) -> None:
        self.route(fine)
        self.route(self.conv(path.down), lateral)
        self.convs(path.merge)

    def head(self, head: Head, *, level: int) -> None:
        self.conv(head.conv)
        filters = head.output.out_channels
        self.add("convolutional", size=1, stride=1, pad=1, filters=filters, activation="linear")
        first = ANCHORS_PER_SCALE * level
        self.add(
            "yolo",
            mask=",".join(str(first + index) for index in range(ANCHORS_PER_SCALE)),
            anchors=",".join(f"{w:.12g},{h:.12g}" for w, h in self.cfg.anchors),
            classes=self.cfg.num_classes,
            num=len(self.cfg.anchors),
            jitter=0.3,
            ignore_thresh=0.7,
            truth_thresh=1,
            random=1,
            scale_x_y=self.cfg.scale_xy[level],
            iou_thresh=0.213,
            cls_normalizer=1.0,
            iou_normalizer=0.07,
            iou_loss="ciou",
            nms_kind="greedynms",
            beta_nms=0.6,
            max_delta=5,
        )


def read_cfg(path: str | Path, *, width: float = 1.0, depth: float = 1.0) -> Cfg:
    """Read classes, anchors, input size and grid sensitivity of a .cfg.

    Raises:
        UserError: If the file cannot be read, or is not of a YOLOv4 of this width and depth.
    """
    try:
        sections = parse_sections(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read a darknet cfg: {error}") from None
    try:
        cfg = extract(sections)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"{path}: no cfg of a YOLOv4: it needs width and height in [net], then three [yolo] "
            f"with masks 0,1,2, 3,4,5 and 6,7,8 of nine anchors; wrong or missing: {error}."
        ) from None
    with torch.device("meta"):
        network = YoloV4(cfg.num_classes, width=width, depth=depth)
    difference = first_difference(sections[1:], parse_sections(write_cfg(network, cfg))[1:])
    if difference:
        raise UserError(
            f"{path}: another network than YOLOv4 of width {width}, depth {depth}: {difference}. "
            "Weights of another network would load into this one and detect nothing."
        )
    return cfg


def parse_sections(text: str) -> list[Section]:
    """Parse [kind] and key=value lines; comments and blank lines are skipped."""
    sections: list[Section] = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.split("#")[0].strip()
        if not line or line.startswith(";"):
            continue
        key, equals, value = line.partition("=")
        if line.startswith("[") and line.endswith("]"):
            sections.append((line[1:-1], {}))
        elif equals and sections:
            sections[-1][1][key.strip()] = "".join(value.split())
        else:
            raise ValueError(f"line {number} is neither [section] nor key=value: {line[:60]!r}")
    return sections


def extract(sections: Sequence[Section]) -> Cfg:
    """Take classes, anchors, input size and grid sensitivity from parsed sections.

    Raises:
        KeyError, ValueError, IndexError: If something is missing or not a valid number.
    """
    yolos = [options for kind, options in sections if kind == "yolo"]
    masks = [options["mask"] for options in yolos]
    if masks != ["0,1,2", "3,4,5", "6,7,8"]:
        raise ValueError(f"masks {masks}")
    numbers = [float(number) for number in yolos[0]["anchors"].split(",")]
    if len(numbers) != 18:
        raise ValueError(f"{len(numbers)} numbers in anchors")
    if not all(0 < number < math.inf for number in numbers):
        raise ValueError(f"anchors {yolos[0]['anchors']}")
    net, num_classes = sections[0][1], int(yolos[0]["classes"])
    if num_classes < 1:
        raise ValueError(f"classes {num_classes}")
    return Cfg(
        num_classes=num_classes,
        anchors=tuple(zip(numbers[::2], numbers[1::2], strict=True)),
        input_shape=(int(net["height"]), int(net["width"])),
        scale_xy=tuple(float(options.get("scale_x_y", 1)) for options in yolos),
    )


def first_difference(found: Sequence[Section], expected: Sequence[Section]) -> str | None:
    """Where two lists of layers first differ in what they compute; None if they do not."""
    for index, pair in enumerate(zip(found, expected, strict=False)):
        layer, wanted = (describe_layer(index, *section) for section in pair)
        if layer != wanted:
            return f"layer {index} is {layer}, not {wanted}"
    if len(found) != len(expected):
        return f"{len(found)} layers, not {len(expected)}"
    return None


def describe_layer(index: int, kind: str, options: dict[str, str]) -> str:
    """What a layer computes, in one form: routes by absolute index, without defaults."""
    parts = [kind]
    for key, default in STRUCTURE.items():
        value = options.get(key, default)
        with suppress(ValueError):  # not numbers: shown as they are
            if key == "layers":
                layers = [int(layer) for layer in value.split(",")]
                value = ",".join(str(n if n >= 0 else index + n) for n in layers)
            elif key == "anchors":
                value = ",".join(f"{float(number):.12g}" for number in value.split(","))
        if value != default:
            parts.append(f"{key}={value}")
    return " ".join(parts)
