"""Read a weights file: detect its format from the content, rename its tensors to this project's.

Supported are this project's checkpoints and state_dicts, the original fork's .pth and darknet's
.weights. No code in a file is ever run.
"""

import codecs
import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from nets.yolo import ANCHORS_PER_SCALE, BOX_CHANNELS, YoloV4
from utils.errors import UserError, summarise
from weights.darknet import DARKNET_SCALE_XY, Header, is_darknet, read_darknet_weights
from weights.fork import BACKBONE, FORK_SCALE_XY, fork_names

FORMAT_VERSION = 1  # of the checkpoints written; those of a higher version are refused
ZIP_MAGIC = b"PK"  # torch.save's container
PICKLE_MAGIC = b"\x80\x02"  # the one before torch 1.6
STRANGE = (AttributeError, KeyError, TypeError, ValueError)  # what metadata of a wrong type raises
PARALLEL = "module."  # the prefix that DataParallel gives to all names
DARKNET = "darknet"  # key of the .weights header in files converted from one
ACCEPTED = (
    "Give a best.pt or last.pt of a run, a state_dict of this network, a .pth of the original "
    "fork, or a darknet .weights file."
)


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """A recognised file: tensors under this project's names, and its metadata."""

    source: str
    tensors: Mapping[str, Tensor]
    class_names: Sequence[str] | None = None
    scale_xy: tuple[float, ...] | None = None  # None: no heads, or unknown
    anchors: Sequence[Sequence[float]] | None = None
    header: Header | None = None

    @property
    def num_classes(self) -> int | None:
        """Classes of the outputs, None without heads; raise UserError for an impossible number."""
        bias = self.tensors.get("head_p3.output.bias")
        if not isinstance(bias, Tensor) or bias.ndim != 1:
            return None
        num_classes, rest = divmod(len(bias), ANCHORS_PER_SCALE)
        if rest or num_classes <= BOX_CHANNELS:
            raise UserError(
                f"{self.source}: {len(bias)} outputs a cell are those of no number of classes: "
                "there are 3 (5 + classes). Damaged, or of another network."
            )
        return num_classes - BOX_CHANNELS


def read_weights(
    path: str | Path, network: YoloV4, *, class_names: Sequence[str] | None = None
) -> WeightsFile:
    """Read a file of any kind that `load_weights` knows, without loading it into a network.

    Args:
        network: Gives the structure; its values do not matter.
        class_names: Of a file that does not hold them.

    Raises:
        UserError: If the file cannot be used, or has other classes than `class_names`.
    """
    start = read_start(path)
    if is_darknet(start):
        header, tensors = read_darknet_weights(path, network)
        version = ".".join(map(str, header.version))
        source = f"{path} (darknet {version}, {header.seen:,} images seen)"
        weights = WeightsFile(source, tensors, scale_xy=DARKNET_SCALE_XY, header=header)
    else:
        weights = recognise(read_torch_file(path), path, network)
    if weights.num_classes is None:
        weights = dataclasses.replace(weights, scale_xy=None)
    names = weights.class_names if class_names is None else class_names
    return weights if names is None else with_classes(weights, names)


def read_start(path: str | Path) -> bytes:
    """The first bytes of a file; raise UserError if it is unreadable or not a weights file."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"{path}: cannot read weights: {error.strerror}. {ACCEPTED}") from None
    if start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"<":
        raise UserError(
            f"{path}: a web page, not weights: the download saved the page around the file. "
            "Download the file itself."
        )
    if not (start.startswith((ZIP_MAGIC, PICKLE_MAGIC)) or is_darknet(start)):
        raise UserError(f"{path}: not a weights file. {ACCEPTED}")
    return start


def read_torch_file(path: str | Path, *, mmap: bool = True) -> Any:
    """Read a file of torch.save on the CPU: tensors and plain types, nothing that runs code.

    Args:
        mmap: Map the tensors of a file in the zip format: they are not read until they are used.

    Raises:
        UserError: If the file is missing, damaged or not such a file.
    """
    start = read_start(path)
    if is_darknet(start):
        raise UserError(f"{path}: a darknet file, which holds weights and nothing else.")
    try:
        mapped = mmap and start.startswith(ZIP_MAGIC)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript gets its own message below
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle can raise nearly anything
        script = "TorchScript" in str(error)
        if script or (isinstance(error, UnpicklingError) and "GLOBAL" in str(error)):
            raise UserError(
                f"{path}: holds Python objects, and loading those would run code of the file. "
                "Where it comes from, save the state_dict of its model instead."
            ) from error
        # Never quote an UnpicklingError: torch advises to load the file unsafely.
        quoted = not isinstance(error, UnpicklingError) and "weights_only" not in str(error)
        cause = str(error).strip().split("\n")[0] if quoted else ""
        raise UserError(f"{path}: damaged or cut off, or not of torch.save. {cause}") from error


def recognise(content: Any, path: str | Path, network: YoloV4) -> WeightsFile:
    """Detect the kind of a file of torch.save by its content; raise UserError for another kind."""
    if isinstance(content, dict) and "format_version" in content:
        return from_checkpoint(content, path)
    if isinstance(content, dict) and all(isinstance(key, str) for key in content):
        plain = {key.removeprefix(PARALLEL): value for key, value in content.items()}
        if isinstance(plain.get("backbone.stem.conv.weight"), Tensor):
            return WeightsFile(f"{path} (state_dict)", plain)
        fork = from_fork(plain, path, network, getattr(content, "_metadata", {}))
        if fork is not None:
            return fork
    found = type(content).__name__
    if isinstance(content, dict):
        found = f"a dict with {summarise([str(key) for key in content]) or 'no keys'}"
    raise UserError(f"{path}: not weights of this network, but {found}. {ACCEPTED}")


def from_fork(
    content: dict[str, Any], path: str | Path, network: YoloV4, metadata: Mapping[str, Any]
) -> WeightsFile | None:
    """Recognise the original fork's files, whole or of the backbone; None for others.

    Names that this network has no place for stay as they are, and are reported.

    Args:
        metadata: `_metadata` of the state_dict: grid sensitivity and header of a converted file.

    Raises:
        UserError: If the metadata is damaged.
    """
    if "backbone.conv1.conv.weight" in content:
        source = f"{path} (original fork)"
    elif "conv1.conv.weight" in content and "stages.0.downsample_conv.conv.weight" in content:
        source = f"{path} (original fork, backbone)"
        content = {BACKBONE + name: value for name, value in content.items()}
    else:
        return None
    ours = {fork: name for name, fork in fork_names(network.state_dict()).items()}
    tensors = {ours.get(name, name): value for name, value in content.items()}
    try:
        scale_xy = three_above_0(metadata.get("scale_xy", FORK_SCALE_XY))  # converted: another one
        return WeightsFile(source, tensors, scale_xy=scale_xy, header=header_in(metadata))
    except STRANGE as error:
        raise UserError(f"{path}: a .pth with strange metadata: damaged ({error}).") from None


def from_checkpoint(content: dict, path: str | Path) -> WeightsFile:
    """Recognise this project's checkpoints; raise UserError for a damaged or newer one."""
    version = content["format_version"]
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"{path}: checkpoint of format {version}; this program reads up to {FORMAT_VERSION}. "
            f"Update the program, or use weights of its own version."
        )
    if version != FORMAT_VERSION or not isinstance(content.get("model"), dict):
        raise UserError(f"{path}: a checkpoint without format or model: damaged. {ACCEPTED}")
    metadata = [f"{key} {content[key]}" for key in ("epoch", "width", "depth") if key in content]
    try:
        return WeightsFile(
            source=f"{path} ({', '.join(['checkpoint', *metadata])})",
            tensors=content["model"],
            class_names=content.get("class_names"),
            scale_xy=three_above_0(content["scale_xy"]) if "scale_xy" in content else None,
            anchors=content.get("anchors"),
            header=header_in(content),
        )
    except STRANGE as error:
        raise UserError(f"{path}: a checkpoint with strange metadata: damaged ({error}).") from None


def three_above_0(numbers: Sequence[float]) -> tuple[float, ...]:
    """A scale_xy from a file; raise ValueError or TypeError unless it is three positive numbers."""
    numbers = tuple(numbers)
    if len(numbers) != 3 or not all(0 < number < math.inf for number in numbers):
        raise ValueError(f"scale_xy {numbers}")
    return numbers


def header_in(metadata: Mapping[str, Any]) -> Header | None:
    """The darknet header that a converted file stores; None if it stores none."""
    if DARKNET not in metadata:
        return None
    return Header(tuple(metadata[DARKNET]["version"]), metadata[DARKNET]["seen"])


def with_classes(weights: WeightsFile, class_names: Sequence[str]) -> WeightsFile:
    """Name the classes of a file; raise UserError if it stores other names or another number."""
    if weights.class_names is not None and list(weights.class_names) != list(class_names):
        raise UserError(
            f"{weights.source} stores its own classes, {summarise(weights.class_names)}; "
            f"{summarise(class_names)} are other ones. Leave its class names out."
        )
    if weights.num_classes not in (None, len(class_names)):
        raise UserError(
            f"{weights.source} has outputs for {weights.num_classes} classes, but "
            f"{len(class_names)} names: {summarise(class_names)}. Give the class names that the "
            "file was trained with, in its order."
        )
    return dataclasses.replace(weights, class_names=class_names)
