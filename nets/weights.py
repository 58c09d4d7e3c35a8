"""Load weights from a file into a network: recognise the file, load what fits, report the rest.

A recogniser turns a file into a WeightsFile, tensors under this project's names; everything
after that is common to all formats.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from nets.class_rows import carry_rows, describe_rows, shared_rows
from nets.darknet_format import DARKNET_SCALE_XY, Header, is_darknet, read_darknet_weights
from nets.fork_format import BACKBONE, FORK_SCALE_XY, fork_names
from nets.yolo import ANCHORS_PER_SCALE, BOX_CHANNELS, YoloV4
from utils.errors import UserError, summarise

FORMAT_VERSION = 1  # of the checkpoints written; those of a higher version are refused
ZIP_MAGIC = b"PK"  # torch.save's container
PICKLE_MAGIC = b"\x80\x02"  # the one before torch 1.6
PARALLEL = "module."  # the prefix that DataParallel gives to all names
DARKNET = "darknet"  # where other files keep the header of a .weights file that they come from
COUNTER = "num_batches_tracked"  # of BN; nothing here reads it, and darknet's files lack it
ACCEPTED = (
    "Give a best.pt or last.pt of a run, a state_dict of this network, a .pth of the original "
    "fork, or a darknet .weights file."
)


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did.

    loaded: names of tensors that were loaded in full. partly, skipped: the other tensors, with
    what was loaded of them, or why nothing was. heads_loaded: the heads know objectness already;
    False: the output convolutions keep the weights that they had. scale_xy, anchors: what the
    weights were trained with, where the file tells.
    """

    source: str
    loaded: list[str]
    partly: dict[str, str]
    skipped: dict[str, str]
    heads_loaded: bool
    scale_xy: tuple[float, ...] | None = None
    anchors: Sequence[Sequence[float]] | None = None

    def __str__(self) -> str:
        counts = [f"{len(self.loaded)} tensors loaded"]
        counts += [f"{len(self.partly)} in part"] if self.partly else []
        lines = [f"{self.source}: {', '.join([*counts, f'{len(self.skipped)} skipped'])}"]
        for group in (self.partly, self.skipped):
            for reason in dict.fromkeys(group.values()):
                names = [name for name, why in group.items() if why == reason]
                lines.append(f"  {summarise(names)}: {reason}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """A recognised file: tensors under this project's names, and what else it tells."""

    source: str
    tensors: Mapping[str, Tensor]
    class_names: Sequence[str] | None = None
    scale_xy: tuple[float, ...] | None = None  # None: the file has no heads, or does not say
    anchors: Sequence[Sequence[float]] | None = None
    header: Header | None = None

    @property
    def num_classes(self) -> int | None:
        """None for a file without heads."""
        bias = self.tensors.get("head_p3.output.bias")
        if not isinstance(bias, Tensor) or bias.ndim != 1:
            return None
        return len(bias) // ANCHORS_PER_SCALE - BOX_CHANNELS


def load_weights(
    model: YoloV4,
    path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    file_class_names: Sequence[str] | None = None,
) -> LoadReport:
    """Load every tensor of the file that fits the model, and report what was not loaded and why.

    The file is a checkpoint or state_dict of this network, a .pth of the original fork (whole or
    its backbone), or a darknet .weights file (whole, yolov4.conv.137, or the backbone); its
    content decides, not its name. class_names: of the model's outputs. file_class_names: of a
    file that does not hold them itself.

    The backbone loads in full or not at all. Where the classes of both sides are known, the
    outputs of those that both have are carried over, by name; otherwise the outputs load if the
    counts are equal. Raises UserError, with the model unchanged, when the file is missing,
    damaged, not a weights file, from a newer version of this project, or its backbone does not
    fit.
    """
    weights = read_weights(path, model, class_names=file_class_names)
    report = match(model.state_dict(), weights, class_names)
    check_backbone(report)
    fitting = {name: weights.tensors[name] for name in (*report.loaded, *report.partly)}
    check_finite(fitting, report.source)
    own = model.state_dict()
    for name in report.partly:
        rows = shared_rows(weights.class_names, class_names)
        fitting[name] = carry_rows(own[name], fitting[name], rows)
    model.load_state_dict(fitting, strict=False)
    return report


def read_weights(
    path: str | Path, network: YoloV4, *, class_names: Sequence[str] | None = None
) -> WeightsFile:
    """Read a file of any kind that `load_weights` knows, without loading it into anything.

    network: gives the structure, its values do not matter. class_names: of a file that does not
    hold them. Raises UserError if the file cannot be used, or has other classes than those.
    """
    start = read_start(path)
    if is_darknet(start):
        header, tensors = read_darknet_weights(path, network)
        version = ".".join(map(str, header.version))
        source = f"{path} (darknet {version}, {header.seen:,} pictures seen)"
        weights = WeightsFile(source, tensors, scale_xy=DARKNET_SCALE_XY, header=header)
    else:
        weights = recognise(read_torch_file(path), path, network)
    if weights.num_classes is None:
        weights = dataclasses.replace(weights, scale_xy=None)
    names = weights.class_names if class_names is None else class_names
    return weights if names is None else with_classes(weights, names)


def read_start(path: str | Path) -> bytes:
    """The first bytes of a file. Raises UserError if it cannot be read, or is no weights file."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"{path}: cannot read weights: {error.strerror}. {ACCEPTED}") from None
    if start.lstrip()[:1] == b"<":
        raise UserError(
            f"{path}: a web page, not weights: the download saved the page around the file. "
            "Download the file itself."
        )
    if not (start.startswith((ZIP_MAGIC, PICKLE_MAGIC)) or is_darknet(start)):
        raise UserError(f"{path}: not a weights file. {ACCEPTED}")
    return start


def read_torch_file(path: str | Path, *, mmap: bool = True) -> Any:
    """Read a file of torch.save on the CPU: tensors and plain types, nothing that runs code.

    With `mmap` the tensors of a file in the zip format are mapped from it, not read until used.
    Raises UserError if the file is missing, damaged or no such file.
    """
    start = read_start(path)
    if is_darknet(start):
        raise UserError(f"{path}: a darknet file, which holds weights and nothing else.")
    try:
        mapped = mmap and start.startswith(ZIP_MAGIC)
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle can raise nearly anything
        if isinstance(error, UnpicklingError) and "GLOBAL" in str(error):
            raise UserError(
                f"{path}: holds Python objects, and loading those would run code of the file. "
                "Where it comes from, save the state_dict of its model instead."
            ) from error
        # Of an UnpicklingError nothing is quoted: torch advises to run what the file says.
        cause = "" if isinstance(error, UnpicklingError) else str(error).strip().split("\n")[0]
        raise UserError(f"{path}: damaged or cut off, or not of torch.save. {cause}") from error


def recognise(content: Any, path: str | Path, network: YoloV4) -> WeightsFile:
    """Tell by what a file of torch.save holds which kind it is. Raises UserError if it is none."""
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
    """Recogniser of the original fork's files, whole or of the backbone; None for others.

    Names that this network has no place for stay as they are, and are reported.
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
    scale_xy = tuple(metadata.get("scale_xy", FORK_SCALE_XY))  # converted files say another one
    return WeightsFile(source, tensors, scale_xy=scale_xy, header=header_in(metadata))


def from_checkpoint(content: dict, path: str | Path) -> WeightsFile:
    """Recogniser of this project's checkpoints. Raises UserError if this one cannot be used."""
    version = content["format_version"]
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"{path}: checkpoint of format {version}; this program reads up to {FORMAT_VERSION}. "
            f"Update the program, or use weights of its own version."
        )
    if version != FORMAT_VERSION or not isinstance(content.get("model"), dict):
        raise UserError(f"{path}: a checkpoint without format or model: damaged. {ACCEPTED}")
    facts = [f"{key} {content[key]}" for key in ("epoch", "width", "depth") if key in content]
    return WeightsFile(
        source=f"{path} ({', '.join(['checkpoint', *facts])})",
        tensors=content["model"],
        class_names=content.get("class_names"),
        scale_xy=tuple(content["scale_xy"]) if "scale_xy" in content else None,
        anchors=content.get("anchors"),
        header=header_in(content),
    )


def header_in(facts: Mapping[str, Any]) -> Header | None:
    """The darknet header that a converted file carries along."""
    if DARKNET not in facts:
        return None
    return Header(tuple(facts[DARKNET]["version"]), facts[DARKNET]["seen"])


def with_classes(weights: WeightsFile, class_names: Sequence[str]) -> WeightsFile:
    """Say what the outputs of a file mean that does not say it itself."""
    if weights.class_names is not None and list(weights.class_names) != list(class_names):
        raise UserError(
            f"{weights.source} says itself that its classes are {summarise(weights.class_names)}; "
            f"{summarise(class_names)} are other ones. Leave its class names out."
        )
    if weights.num_classes not in (None, len(class_names)):
        raise UserError(
            f"{weights.source} has outputs for {weights.num_classes} classes, but "
            f"{len(class_names)} names: {summarise(class_names)}. Give the class names that the "
            "file was trained with, in its order."
        )
    return dataclasses.replace(weights, class_names=class_names)


def match(
    expected: Mapping[str, Tensor], weights: WeightsFile, class_names: Sequence[str] | None
) -> LoadReport:
    """Decide for every tensor of the model and of the file whether it is loaded, and why not."""
    loaded, partly, skipped = [], {}, {}
    rows = shared_rows(weights.class_names, class_names)
    for name, parameter in expected.items():
        tensor = weights.tensors.get(name)
        reason = mismatch(name, tensor, parameter)
        if rows is not None and is_output(name) and has_rows(tensor, weights, parameter):
            if rows:
                partly[name] = describe_rows(rows, class_names)
            else:
                skipped[name] = (
                    f"output for other classes: {summarise(weights.class_names)} in the file, "
                    f"{summarise(class_names)} here"
                )
        elif reason is None:
            loaded.append(name)
        elif tensor is not None or not name.endswith(COUNTER):
            skipped[name] = reason
    heads_loaded = not any(map(is_output, skipped))
    skipped |= {name: "not in the model" for name in weights.tensors if name not in expected}
    return LoadReport(
        source=weights.source,
        loaded=loaded,
        partly=partly,
        skipped=skipped,
        heads_loaded=heads_loaded,
        scale_xy=weights.scale_xy,
        anchors=weights.anchors,
    )


def is_output(name: str) -> bool:
    """Whether a tensor belongs to an output convolution, the only kind that knows the classes."""
    return ".output." in name


def has_rows(tensor: Any, weights: WeightsFile, expected: Tensor) -> bool:
    """Whether an output tensor has the rows of the file's classes."""
    rows = ANCHORS_PER_SCALE * (BOX_CHANNELS + len(weights.class_names or ()))
    return same_inputs(tensor, expected) and len(tensor) == rows


def same_inputs(tensor: Any, expected: Tensor) -> bool:
    """Whether two output tensors differ in their number of classes at most."""
    return isinstance(tensor, Tensor) and tensor.ndim > 0 and tensor.shape[1:] == expected.shape[1:]


def mismatch(name: str, tensor: Any, expected: Tensor) -> str | None:
    """Why the file's tensor cannot stand for the model's, or None if it can."""
    if tensor is None:
        return "not in the file"
    if not isinstance(tensor, Tensor):
        return f"no tensor in the file, but {type(tensor).__name__}"
    if tensor.shape == expected.shape:
        return None
    if is_output(name) and same_inputs(tensor, expected):
        counts = [len(t) // ANCHORS_PER_SCALE - BOX_CHANNELS for t in (tensor, expected)]
        return "output for {} classes in the file, {} in the model".format(*counts)
    return f"shape {tuple(tensor.shape)} in the file, {tuple(expected.shape)} in the model"


def with_counters(tensors: Mapping[str, Tensor], network: YoloV4) -> dict[str, Tensor]:
    """The tensors in the network's order, with 0 for BN's counters where only those are missing."""
    found = {}
    for name in network.state_dict():
        if name in tensors:
            found[name] = tensors[name]
        elif name.endswith(COUNTER) and name.replace(COUNTER, "running_var") in tensors:
            found[name] = torch.tensor(0)
    return found


def check_backbone(report: LoadReport) -> None:
    """Refuse a file of another width or depth: half a backbone is worse than a random one."""
    strays = [name for name in report.skipped if name.startswith(BACKBONE)]
    if strays:
        raise UserError(
            f"{report.source}: its backbone does not fit this model, {len(strays)} tensors differ: "
            f"{strays[0]}: {report.skipped[strays[0]]}. Use the width and depth of the weights."
        )


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse the weights of a training that diverged: nothing could be detected with them."""
    # The extremes are NaN where a value is. Unlike isfinite() this makes no temporary tensors.
    ranges = {name: torch.stack(tensor.aminmax()) for name, tensor in tensors.items()}
    broken = [name for name, extremes in ranges.items() if not extremes.isfinite().all()]
    if broken:
        raise UserError(f"{source}: NaN or infinite values in {summarise(broken)}. {ACCEPTED}")
