"""Weights of other programs, completed to a checkpoint by flags."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from data.voc import read_class_names
from nets.decode import read_anchors
from nets.yolo import YoloV4, check_input
from utils.errors import UserError, summarise
from weights.checkpoint import read_checkpoint
from weights.darknet import is_darknet
from weights.darknet_cfg import read_cfg
from weights.loading import check_backbone, check_finite, match, with_counters
from weights.reading import (
    DARKNET,
    WeightsFile,
    read_start,
    read_torch_file,
    read_weights,
    with_classes,
)

# Such a file has no measured threshold of best F1; this is darknet's default.
DEFAULT_THRESHOLD = 0.25
WANTED = {
    "class_names": (
        "--classes_path FILE       names of its {} classes, one a line "
        "(COCO's: model_data/coco_classes.txt)"
    ),
    "anchors": "--anchors_path FILE       its nine anchors (YOLOv4's: model_data/yolo_anchors.txt)",
    "input_shape": "--input_shape 416 416     size of its input, height and width",
    "scale_xy": "--scale_xy 1.2 1.1 1.05   grid sensitivity (darknet's: these; the fork's: 1 1 1)",
}


@dataclasses.dataclass(frozen=True)
class FileMetadata:
    """Only for darknet's .weights and the original fork's .pth, which lack this information."""

    classes_path: str = ""  # .weights and .pth only: text file of class names, one per line
    # .weights and .pth only: text file of nine anchors, w,h in pixels of the network input
    anchors_path: str = ""
    # .weights and .pth only: height and width of the network input
    input_shape: tuple[int, int] | None = None
    # .weights and .pth only: grid sensitivity per scale; default: 1.2 1.1 1.05 and 1 1 1
    scale_xy: tuple[float, float, float] | None = None
    # .weights and .pth only: darknet .cfg; replaces --anchors_path, --input_shape, --scale_xy
    cfg: str = ""
    width: float | None = None  # .weights and .pth only: channel multiplier; default: 1
    depth: float | None = None  # .weights and .pth only: residual block multiplier; default: 1

    def given(self) -> list[str]:
        """The flags that were given."""
        return [f"--{name}" for name, value in vars(self).items() if value not in ("", None)]

    def scaling(self) -> dict[str, float]:
        """Width and depth of the network."""
        values = {"width": self.width, "depth": self.depth}
        return {name: 1.0 if value is None else value for name, value in values.items()}


# As a field of a script's Config: its own group of flags, without a prefix.
MetadataFlags = Annotated[FileMetadata, tyro.conf.arg(name="")]


def read_network(path: str | Path, metadata: FileMetadata) -> dict[str, Any]:
    """Read a checkpoint, or another program's weights as one, for evaluation and detection.

    Args:
        metadata: What the weights of other programs lack.

    Raises:
        UserError: If the file cannot be used, if metadata is missing, or if metadata is given for a
            checkpoint, which stores it.
    """
    return read_own(path, metadata) or as_checkpoint(path, metadata)


def read_own(path: str | Path, metadata: FileMetadata) -> dict[str, Any] | None:
    """Read a checkpoint of this trainer; None for other files. Raises as `read_network`."""
    if is_darknet(read_start(path)):
        return None
    content = read_torch_file(path)
    if not isinstance(content, dict) or "format_version" not in content:
        return None
    if metadata.given():
        raise UserError(
            f"{path} is a checkpoint, which stores all metadata: leave "
            f"{', '.join(metadata.given())} out, meant for files of other programs."
        )
    checkpoint = read_checkpoint(path)
    tensors = checkpoint["model"].items()
    check_finite({n: t for n, t in tensors if isinstance(t, Tensor)}, str(path))
    return checkpoint


def as_checkpoint(path: str | Path, metadata: FileMetadata) -> dict[str, Any]:
    """Read another program's whole network as a checkpoint. Raises as `read_network`."""
    scaling = metadata.scaling()
    weights = read_weights(path, structure(1, **scaling))
    if weights.num_classes is None:
        raise UserError(
            f"{weights.source}: part of a network, without outputs. A training can start from it "
            f"(train.py --weights {path}); it cannot detect."
        )
    known = complete(weights, metadata)
    class_names = read_class_names(metadata.classes_path)
    weights = with_classes(weights, class_names)
    return {
        "model": fitting_tensors(weights, structure(len(class_names), **scaling)),
        "class_names": list(class_names),
        **scaling,
        **known,
        "conf_loss": "bce",
        "conf_threshold": DEFAULT_THRESHOLD,
        "config": {},
        "epoch": 0,
        "metrics": {},
        **({DARKNET: dataclasses.asdict(weights.header)} if weights.header else {}),
    }


def structure(num_classes: int, *, width: float, depth: float) -> YoloV4:
    """A network without values, on torch's meta device."""
    with torch.device("meta"):
        return YoloV4(num_classes, width=width, depth=depth)


def known_metadata(weights: WeightsFile, metadata: FileMetadata) -> dict[str, Any]:
    """anchors, input_shape and scale_xy from the metadata and the file; None where unknown.

    A flag overrides the .cfg, and the .cfg overrides the default of the file format.

    Raises:
        UserError: For impossible values, and for a .cfg of other weights.
    """
    known: dict[str, Any] = {"anchors": None, "input_shape": None, "scale_xy": weights.scale_xy}
    if metadata.cfg:
        cfg = read_cfg(metadata.cfg, **metadata.scaling())
        if weights.num_classes not in (None, cfg.num_classes):
            raise UserError(
                f"{metadata.cfg} is for {cfg.num_classes} classes, {weights.source} holds "
                f"{weights.num_classes}. Give the .cfg that belongs to the weights."
            )
        known = {name: getattr(cfg, name) for name in known}
    if metadata.anchors_path:
        known["anchors"] = read_anchors(metadata.anchors_path)
    known["input_shape"] = metadata.input_shape or known["input_shape"]
    known["scale_xy"] = metadata.scale_xy or known["scale_xy"]
    if known["input_shape"]:
        check_input(torch.Size((1, 3, *known["input_shape"])))
    if known["scale_xy"]:
        check_scale_xy(known["scale_xy"])
    return known


def check_scale_xy(scale_xy: Sequence[float]) -> None:
    """Raise UserError for a grid sensitivity that is not positive and finite."""
    if not all(0 < value < math.inf for value in scale_xy):
        raise UserError(
            f"scale_xy {' '.join(map(str, scale_xy))}: give three numbers above 0, such as 1.2 1.1 "
            "1.05 for darknet's weights or 1 1 1 for the original fork's."
        )


def complete(
    weights: WeightsFile, metadata: FileMetadata, *, classes: bool = True
) -> dict[str, list[Any]]:
    """anchors, input_shape and scale_xy, all known.

    Args:
        classes: Also require class names.

    Raises:
        UserError: As `known_metadata`, and with a list of all missing flags.
    """
    known = known_metadata(weights, metadata)
    missing = [flag for name, flag in WANTED.items() if name in known and not known[name]]
    hint = "\nA darknet .cfg replaces all but the class names: --cfg FILE"
    hint = hint if missing else ""
    if classes and not metadata.classes_path:
        missing.insert(0, WANTED["class_names"].format(weights.num_classes))
    if missing:
        raise UserError(f"{weights.source} lacks metadata. Add:\n  " + "\n  ".join(missing) + hint)
    anchors = [list(anchor) for anchor in known["anchors"]]
    return {**{name: list(value) for name, value in known.items()}, "anchors": anchors}


def fitting_tensors(weights: WeightsFile, network: YoloV4) -> dict[str, Tensor]:
    """All tensors of the network; raise UserError if one is missing, unfit or not finite."""
    expected = network.state_dict()
    report = match(expected, weights, weights.class_names)
    check_backbone(report)
    unfit = [name for name in report.skipped if name in expected]
    if unfit:
        raise UserError(
            f"{weights.source}: {summarise(unfit)}: {report.skipped[unfit[0]]}. "
            "Use the width and depth of the weights."
        )
    tensors = {name: weights.tensors[name] for name in report.loaded}
    check_finite(tensors, weights.source)
    return with_counters(tensors, network)
