"""Read and write darknet's .weights files.

Such a file is a header followed by float32 numbers, convolution by convolution, in darknet's
order, which is also this network's: beta, gamma, mean, variance and weights with BN, biases and
weights without. It holds no shapes: only its length shows which layers it contains.
"""

import dataclasses
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nets.yolo import ANCHORS_PER_SCALE, BOX_CHANNELS, YoloV4
from utils.errors import UserError
from utils.files import replacing

DARKNET_SCALE_XY = (1.2, 1.1, 1.05)
FLOAT32 = np.dtype("<f4")
VERSION = struct.Struct("<3i")
HIGHEST_NUMBER = 999  # of a version; from 1000 on darknet marks transposed files, which nobody has
BN_PARTS = ("bn.bias", "bn.weight", "bn.running_mean", "bn.running_var", "conv.weight")
CUTS = {"137": "top_down_p3", "backbone": "backbone"}  # part of the network -> its last module


@dataclasses.dataclass(frozen=True)
class Header:
    """Header of a .weights file; `seen` is the number of images that it was trained on."""

    version: tuple[int, int, int] = (0, 2, 5)
    seen: int = 0

    @property
    def seen_format(self) -> struct.Struct:
        """How `seen` is stored: in 8 bytes since version 0.2, in 4 before."""
        major, minor, _ = self.version
        return struct.Struct("<Q" if major * 10 + minor >= 2 else "<I")

    @property
    def size(self) -> int:
        return VERSION.size + self.seen_format.size

    def to_bytes(self) -> bytes:
        """Encode; raise UserError for an impossible version or a count that does not fit."""
        try:
            if is_version(self.version):
                return VERSION.pack(*self.version) + self.seen_format.pack(self.seen)
        except struct.error:
            pass
        raise UserError(
            f"darknet header of version {self.version} with {self.seen} images seen: give "
            f"three numbers from 0 to {HIGHEST_NUMBER}, and a count from 0 up that fits into "
            "8 bytes, or 4 before version 0.2."
        )


def is_version(numbers: tuple[int, ...]) -> bool:
    return len(numbers) == 3 and all(0 <= number <= HIGHEST_NUMBER for number in numbers)


def is_darknet(start: bytes) -> bool:
    """Whether a file with this start can be a .weights file: three small version numbers."""
    return len(start) >= VERSION.size and is_version(VERSION.unpack_from(start))


def read_darknet_weights(path: str | Path, network: YoloV4) -> tuple[Header, dict[str, Tensor]]:
    """Read the header and the tensors, under this project's names.

    The tensors are views of the file mapped into memory: nothing is read until it is used.

    Args:
        path: Holds the whole network, for any number of classes, or ends after layer 136
            (yolov4.conv.137) or after the backbone.
        network: Gives the shapes.

    Raises:
        UserError: If the header is incomplete, or the file has any other length.
    """
    header = read_header(path)
    body_bytes = os.path.getsize(path) - header.size
    layout = layout_of_size(body_bytes, network)
    if layout is None:
        raise UserError(f"{path}: {describe_mismatch(header, body_bytes, network)}")
    # Copy on write: torch accepts no read-only memory, and the file stays as it is.
    body = torch.from_numpy(np.memmap(path, FLOAT32, mode="c", offset=header.size))
    pieces = body.split([shape.numel() for shape in layout.values()])
    named = zip(layout.items(), pieces, strict=True)
    return header, {name: piece.view(shape) for (name, shape), piece in named}


def read_header(path: str | Path) -> Header:
    """Read the header; raise UserError if the file does not begin with a whole one."""
    with open(path, "rb") as file:
        start = file.read(VERSION.size + 8)
    header = Header(VERSION.unpack_from(start)) if is_darknet(start) else None
    if header is None or len(start) < header.size:
        raise UserError(f"{path}: no darknet file, or cut off in its header.")
    return Header(header.version, *header.seen_format.unpack_from(start, VERSION.size))


def layout_of(network: nn.Module) -> dict[str, torch.Size]:
    """Names and shapes of the tensors in the network's .weights file, in their order.

    Raises:
        UserError: If the network's BN is folded: the file has a place for BN.
    """
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    names = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and module.bias is None:
            names += [name.removesuffix("conv") + part for part in BN_PARTS]
        elif isinstance(module, nn.Conv2d) and not name.endswith(".output"):
            raise UserError(
                f"{name} has BN folded in, which is for detection only. Take the network from its "
                "file, by load_weights or tools.convert_weights."
            )
        elif isinstance(module, nn.Conv2d):
            names += [f"{name}.bias", f"{name}.weight"]
    return {name: shapes[name] for name in names}


def layout_of_cut(network: YoloV4, part: str) -> dict[str, torch.Size]:
    """The layout of a file that holds a part of the network, one of CUTS."""
    modules = [name for name, _ in network.named_children()]
    kept = modules[: modules.index(CUTS[part]) + 1]
    layout = layout_of(network).items()
    return {name: shape for name, shape in layout if name.split(".")[0] in kept}


def layout_of_classes(network: YoloV4, num_classes: int) -> dict[str, torch.Size]:
    """The layout of a whole file for another number of classes."""
    channels = ANCHORS_PER_SCALE * (BOX_CHANNELS + num_classes)
    layout = layout_of(network)
    for name in layout:
        if ".output." in name:
            layout[name] = torch.Size([channels, *layout[name][1:]])
    return layout


def layout_of_size(body_bytes: int, network: YoloV4) -> dict[str, torch.Size] | None:
    """The layout of a file with `body_bytes` after its header; None if no layout fits."""
    for part in CUTS:
        layout = layout_of_cut(network, part)
        if size_of(layout) == body_bytes:
            return layout
    without, with_one = (size_of(layout_of_classes(network, n)) for n in (0, 1))
    num_classes, rest = divmod(body_bytes - without, with_one - without)
    return layout_of_classes(network, num_classes) if num_classes > 0 and rest == 0 else None


def size_of(layout: Mapping[str, torch.Size]) -> int:
    """Bytes of a file of this layout, without its header."""
    return FLOAT32.itemsize * sum(shape.numel() for shape in layout.values())


def describe_mismatch(header: Header, body_bytes: int, network: YoloV4) -> str:
    """Describe a file of unknown length, and list the known lengths."""
    cut, backbone = (size_of(layout_of_cut(network, part)) for part in CUTS)
    without, with_one = (size_of(layout_of_classes(network, n)) for n in (0, 1))
    scaling = f"width {network.width}, depth {network.depth}"
    text = (
        f"a darknet file of version {'.'.join(map(str, header.version))} with {body_bytes:,} "
        f"bytes of weights: cut off, or of another network. YOLOv4 of {scaling} has "
        f"{without:,} and {with_one - without:,} more for each class, {cut:,} up to layer 136 "
        f"(yolov4.conv.137) or {backbone:,} in its backbone."
    )
    with torch.device("meta"):
        full = YoloV4(1)
    if layout_of_size(body_bytes, full) is not None:
        return f"{text} It fits the full network: use width 1.0 and depth 1.0."
    return f"{text} Use the width and depth of the weights."


def save_darknet_weights(
    model: YoloV4,
    path: str | Path,
    *,
    version: tuple[int, int, int] = (0, 2, 5),
    seen: int = 0,
) -> None:
    """Write the whole network as a darknet .weights file, in one go.

    Args:
        version: Of the header.
        seen: Images that the header counts; darknet derives from it where a training stands.

    Raises:
        UserError: For a header that cannot be, or if the file cannot be written.
    """
    write_darknet_tensors(model.state_dict(), list(layout_of(model)), path, Header(version, seen))


def write_darknet_tensors(
    tensors: Mapping[str, Tensor], names: list[str], path: str | Path, header: Header
) -> None:
    """Write the named tensors; the names must follow darknet's order."""
    start = header.to_bytes()
    with replacing(path) as file:
        file.write(start)
        for name in names:
            values = tensors[name].detach().cpu().float().numpy()
            file.write(np.ascontiguousarray(values, dtype=FLOAT32).data)
