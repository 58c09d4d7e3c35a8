"""Convert weights between darknet (.weights), the original fork (.pth) and this project (.pt).

    python -m tools.convert_weights best.pt yolov4-custom.weights --cfg_out yolov4-custom.cfg
    python -m tools.convert_weights yolov4.weights yolov4.pth
    python -m tools.convert_weights yolov4.weights coco.pt
        --classes_path model_data/coco_classes.txt --anchors_path model_data/yolo_anchors.txt
        --input_shape 416 416

The format of the source is detected from its content, that of the target from its suffix. Existing
files are never overwritten.
"""

import dataclasses
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor
from tyro.conf import Positional, arg

from data.voc import read_class_names
from nets.yolo import YoloV4
from utils.errors import UserError, run_script, summarise
from utils.files import replacing
from weights.checkpoint import REQUIRED_KEYS, cpu_copy, save_checkpoint
from weights.darknet import (
    CUTS,
    DARKNET_SCALE_XY,
    Header,
    layout_of,
    layout_of_cut,
    write_darknet_tensors,
)
from weights.darknet_cfg import Cfg, write_cfg
from weights.foreign import (
    FileMetadata,
    MetadataFlags,
    as_checkpoint,
    complete,
    known_metadata,
    read_own,
    structure,
)
from weights.fork import BACKBONE, FORK_SCALE_XY, fork_names
from weights.loading import check_backbone, check_finite, match, with_counters
from weights.reading import DARKNET, WeightsFile, read_weights

SUFFIXES = {".weights": "darknet", ".pth": "original fork", ".pt": "checkpoint"}


@dataclasses.dataclass(frozen=True)
class Config:
    # Each line is a flag; its comment is the help text.
    source: Positional[Annotated[Path, arg(metavar="SOURCE")]]  # weights file of any format
    # new file, format by suffix: .weights darknet, .pth original fork, .pt this project
    target: Positional[Annotated[Path, arg(metavar="TARGET")]]
    part: Literal["whole", "137", "backbone"] = "whole"  # 137: backbone, SPP and top-down path
    cfg_out: Path | None = None  # also write a darknet .cfg, which darknet and OpenCV need

    metadata: MetadataFlags = dataclasses.field(default_factory=FileMetadata)


@dataclasses.dataclass(frozen=True)
class Source:
    """What is converted.

    Attributes:
        network: Without values.
        tensors: Those of the network's tensors that the file holds.
        checkpoint: The source itself, or {} for a file of another kind.
        scale_xy: Grid sensitivity; None if unknown.
        left_out: Names in the file that this network has no place for.
    """

    weights: WeightsFile
    network: YoloV4
    tensors: dict[str, Tensor]
    checkpoint: dict[str, Any]
    scale_xy: Sequence[float] | None
    left_out: list[str]


def main() -> None:
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    check_paths(config)
    metadata = config.metadata
    source = cut(read_source(config.source, metadata), config.part)
    cfg = describe_cfg(source, metadata) if config.cfg_out else None  # before anything is written
    if config.target.suffix == ".pt":
        if config.part != "whole":
            raise UserError(f"{config.target}: a checkpoint is whole; give .weights or .pth.")
        write_checkpoint(source.checkpoint or as_checkpoint(config.source, metadata), config.target)
    elif config.target.suffix == ".pth":
        write_fork(source, config.target)
    else:
        write_darknet(source, config.target)
    print(f"{source.weights.source}\n-> {config.target} ({SUFFIXES[config.target.suffix]})")
    if cfg is not None and config.cfg_out:
        with replacing(config.cfg_out) as file:
            file.write(write_cfg(source.network, cfg).encode())
        print(f"-> {config.cfg_out} (darknet cfg)")
    for note in notes(config, source):
        print(f"note: {note}")


def check_paths(config: Config) -> None:
    """Raise UserError for an unknown format, an existing file or a missing folder."""
    if config.target.suffix not in SUFFIXES:
        kinds = ", ".join(f"{suffix} ({kind})" for suffix, kind in SUFFIXES.items())
        raise UserError(f"{config.target}: the suffix selects the format: {kinds}.")
    paths = [path for path in (config.target, config.cfg_out) if path]
    for path in paths:
        if os.path.lexists(path):
            raise UserError(f"{path} is there already. Delete it, or give another name.")
        if not os.path.isdir(path.parent):
            raise UserError(f"{path}: there is no folder {path.parent}. Make it first.")
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError(f"--cfg_out {config.cfg_out} is the target itself. Give another name.")


def read_source(path: Path, metadata: FileMetadata) -> Source:
    """Read the weights, for a network of as many classes; raise UserError for unusable ones."""
    checkpoint = read_own(path, metadata) or {}
    scaling = metadata.scaling()
    scaling |= {key: checkpoint[key] for key in scaling if key in checkpoint}
    names = read_class_names(metadata.classes_path) if metadata.classes_path else None
    weights = read_weights(path, structure(1, **scaling), class_names=names)
    network = structure(weights.num_classes or 1, **scaling)
    report = match(network.state_dict(), weights, None)
    check_backbone(report)
    tensors = {name: weights.tensors[name] for name in report.loaded}
    check_finite(tensors, weights.source)
    return Source(
        weights=weights,
        network=network,
        tensors=tensors,
        checkpoint=checkpoint,
        scale_xy=known_metadata(weights, metadata)["scale_xy"],
        left_out=[name for name in weights.tensors if name not in tensors],
    )


def cut(source: Source, part: str) -> Source:
    """Keep only a part of the network, as darknet's `partial` does."""
    if part == "whole":
        return source
    names = layout_of_cut(source.network, part)
    if not all(name in source.tensors for name in names):
        raise UserError(f"{source.weights.source} does not hold all of part {part}.")
    modules = {name.split(".")[0] for name in names}
    tensors = {n: tensor for n, tensor in source.tensors.items() if n.split(".")[0] in modules}
    weights = dataclasses.replace(source.weights, tensors=tensors, class_names=None)
    return dataclasses.replace(source, weights=weights, tensors=tensors, scale_xy=None)


def describe_cfg(source: Source, metadata: FileMetadata) -> Cfg:
    """What the .cfg holds besides the structure."""
    if source.weights.num_classes is None:
        raise UserError(f"{source.weights.source}: part of a network, for which there is no .cfg.")
    known = source.checkpoint or complete(source.weights, metadata, classes=False)
    return Cfg(
        num_classes=source.weights.num_classes,
        anchors=tuple(map(tuple, known["anchors"])),
        input_shape=tuple(known["input_shape"]),
        scale_xy=tuple(known["scale_xy"]),
    )


def write_checkpoint(checkpoint: dict[str, Any], target: Path) -> None:
    """Write a checkpoint to evaluate, detect and start from, without the training state."""
    kept = {key: checkpoint[key] for key in (*REQUIRED_KEYS, DARKNET) if key in checkpoint}
    save_checkpoint(target, cpu_copy(kept))  # copies: views would be saved with the whole file


def write_fork(source: Source, target: Path) -> None:
    """Write a bare state_dict under the fork's names; of the backbone alone if that is all."""
    names = fork_names(source.network.state_dict())
    tensors = with_counters(source.tensors, source.network)
    if all(name.startswith(BACKBONE) for name in tensors):
        names = {name: fork.removeprefix(BACKBONE) for name, fork in names.items()}
    state = OrderedDict((names[name], tensor) for name, tensor in cpu_copy(tensors).items())
    metadata: dict[str, Any] = {}
    if source.weights.header:
        metadata[DARKNET] = dataclasses.asdict(source.weights.header)
    if source.scale_xy is not None:
        metadata["scale_xy"] = tuple(source.scale_xy)
    # Here torch keeps what is not a tensor; its state_dict() also sets it on an OrderedDict.
    state._metadata = metadata  # type: ignore[attr-defined]
    with replacing(target) as file:
        torch.save(state, file)


def write_darknet(source: Source, target: Path) -> None:
    """Write a .weights file, whole or cut like its source; raise UserError for any other part."""
    names = [name for name in layout_of(source.network) if name in source.tensors]
    cuts = [layout_of_cut(source.network, part) for part in CUTS]
    if names not in [list(cut) for cut in (*cuts, layout_of(source.network))]:
        raise UserError(
            f"{source.weights.source}: tensors are missing in between, so darknet's format, which "
            "has no names, cannot hold it. It takes a whole network, its first 137 layers or its "
            "backbone."
        )
    write_darknet_tensors(source.tensors, names, target, source.weights.header or Header())


def notes(config: Config, source: Source) -> list[str]:
    """Notes on information that the new file cannot store."""
    said, kind = [], config.target.suffix
    if source.left_out:
        said.append(f"skipped, unknown to this network: {summarise(source.left_out)}")
    if kind == ".pt" or source.weights.num_classes is None:
        return said
    if source.checkpoint:
        lost = "class names" if config.cfg_out else "class names, anchors, input size"
        said.append(f"it does not hold {lost} or score threshold: keep {config.source}.")
    if kind == ".weights" and config.cfg_out is None:
        said.append("darknet and OpenCV need a .cfg as well: --cfg_out FILE writes it.")
    if (source.network.width, source.network.depth) != (1, 1):
        scaling = f"--width {source.network.width} --depth {source.network.depth}"
        said.append(f"it does not hold width and depth: give {scaling} when you use it here.")
    return [*said, *decode_notes(kind, source.scale_xy)]


def decode_notes(kind: str, scale_xy: Sequence[float] | None) -> list[str]:
    """A note if programs that read a file of this kind expect another scale_xy."""
    usual = {".pth": FORK_SCALE_XY, ".weights": DARKNET_SCALE_XY}[kind]
    expected = " ".join(map(str, usual))
    if scale_xy is None:
        return [f"what it was trained with is not known; it counts as scale_xy {expected}."]
    if tuple(scale_xy) == usual:
        return []
    own = " ".join(map(str, scale_xy))
    if kind == ".pth":
        return [
            f"these weights expect scale_xy {own}; the fork's own program decodes with {expected}, "
            "which shifts boxes by up to a tenth of a cell."
        ]
    return [
        f"these weights expect scale_xy {own}, which only a .cfg stores: without it readers assume "
        f"{expected}; give --scale_xy {own} when you use them here."
    ]


if __name__ == "__main__":
    run_script(main)
