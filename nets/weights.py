"""Load weights from a file into a network: recognise the file, load what fits, report the rest.

A recogniser turns a file into a WeightsFile, tensors under this project's names; everything
after that is common to all formats.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nets.yolo import ANCHORS_PER_SCALE, BOX_CHANNELS, YoloV4
from utils.errors import UserError

FORMAT_VERSION = 1  # of the checkpoints written; those of a higher version are refused
ZIP_MAGIC = b"PK"  # torch.save's container
PICKLE_MAGIC = b"\x80\x02"  # the one before torch 1.6
ACCEPTED = "Give a best.pt or last.pt of a run, or a saved state_dict of this network."


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did. `skipped` maps a tensor's name to the reason."""

    source: str
    loaded: list[str]
    skipped: dict[str, str]
    heads_loaded: bool  # False: the output convolutions keep the weights that they had

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.loaded)} tensors loaded, {len(self.skipped)} skipped"]
        for reason in dict.fromkeys(self.skipped.values()):
            names = [name for name, why in self.skipped.items() if why == reason]
            lines.append(f"  {summarise(names)}: {reason}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """A recognised file: tensors under this project's names, and the classes where it tells."""

    source: str
    tensors: Mapping[str, Tensor]
    class_names: Sequence[str] | None = None


def load_weights(
    model: YoloV4, path: str | Path, *, class_names: Sequence[str] | None = None
) -> LoadReport:
    """Load every tensor of the file that fits the model, and report what was not loaded and why.

    The backbone loads in full or not at all. The output convolutions are skipped when the file's
    class count differs, or its class names where both are known: they would name wrong classes.
    Raises UserError, with the model unchanged, when the file is missing, damaged, not a weights
    file, from a newer version of this project, or its backbone does not fit.
    """
    weights = recognise(read_torch_file(path), path)
    report = match(model.state_dict(), weights, class_names)
    check_backbone(report)
    fitting = {name: weights.tensors[name] for name in report.loaded}
    check_finite(fitting, report.source)
    model.load_state_dict(fitting, strict=False)
    return report


def read_torch_file(path: str | Path, *, mmap: bool = True) -> Any:
    """Read a file of torch.save on the CPU: tensors and plain types, nothing that runs code.

    With `mmap` the tensors of a file in the zip format are mapped from it, not read until used.
    Raises UserError if the file is missing, damaged or no such file.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(2)
    except OSError as error:
        raise UserError(f"{path}: cannot read weights: {error.strerror}. {ACCEPTED}") from None
    if magic not in (ZIP_MAGIC, PICKLE_MAGIC):
        raise UserError(f"{path}: not a weights file. {ACCEPTED}")
    try:
        mapped = mmap and magic == ZIP_MAGIC
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle can raise nearly anything
        cause = str(error).strip().split("\n")[0]
        raise UserError(
            f"{path}: damaged or cut off, or it holds more than tensors and plain types: {cause}"
        ) from error


def recognise(content: Any, path: str | Path) -> WeightsFile:
    """Tell by what the file holds which kind it is. Raises UserError if it is none."""
    if isinstance(content, dict) and "format_version" in content:
        return from_checkpoint(content, path)
    if isinstance(content, dict) and isinstance(content.get("backbone.stem.conv.weight"), Tensor):
        return WeightsFile(f"{path} (state_dict)", content)
    found = type(content).__name__
    if isinstance(content, dict):
        found = f"a dict with {summarise([str(key) for key in content]) or 'no keys'}"
    raise UserError(f"{path}: not weights of this network, but {found}. {ACCEPTED}")


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
    )


def match(
    expected: Mapping[str, Tensor], weights: WeightsFile, class_names: Sequence[str] | None
) -> LoadReport:
    """Decide for every tensor of the model and of the file whether it is loaded, and why not."""
    skipped = {}
    for name, parameter in expected.items():
        reason = mismatch(name, weights.tensors.get(name), parameter)
        if reason is None and is_output(name):
            reason = other_classes(weights.class_names, class_names)
        if reason is not None:
            skipped[name] = reason
    loaded = [name for name in expected if name not in skipped]
    heads_loaded = not any(map(is_output, skipped))
    skipped |= {name: "not in the model" for name in weights.tensors if name not in expected}
    return LoadReport(weights.source, loaded, skipped, heads_loaded)


def is_output(name: str) -> bool:
    """Whether a tensor belongs to an output convolution, the only kind that knows the classes."""
    return ".output." in name


def mismatch(name: str, tensor: Any, expected: Tensor) -> str | None:
    """Why the file's tensor cannot stand for the model's, or None if it can."""
    if tensor is None:
        return "not in the file"
    if not isinstance(tensor, Tensor):
        return f"no tensor in the file, but {type(tensor).__name__}"
    if tensor.shape == expected.shape:
        return None
    if is_output(name) and tensor.ndim and tensor.shape[1:] == expected.shape[1:]:
        counts = [len(t) // ANCHORS_PER_SCALE - BOX_CHANNELS for t in (tensor, expected)]
        return "output for {} classes in the file, {} in the model".format(*counts)
    return f"shape {tuple(tensor.shape)} in the file, {tuple(expected.shape)} in the model"


def other_classes(in_file: Sequence[str] | None, wanted: Sequence[str] | None) -> str | None:
    """Why the file's outputs mean other classes than ours, or None if they do not, or may not."""
    if in_file is None or wanted is None or list(in_file) == list(wanted):
        return None
    return f"output for other classes: {summarise(in_file)} in the file, {summarise(wanted)} here"


def check_backbone(report: LoadReport) -> None:
    """Refuse a file of another width or depth: half a backbone is worse than a random one."""
    strays = [name for name in report.skipped if name.startswith("backbone.")]
    if strays:
        raise UserError(
            f"{report.source}: its backbone does not fit this model, {len(strays)} tensors differ: "
            f"{strays[0]}: {report.skipped[strays[0]]}. Use the width and depth of the weights."
        )


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse the weights of a training that diverged: nothing could be detected with them."""
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(f"{source}: NaN or infinite values in {summarise(broken)}. {ACCEPTED}")


def summarise(names: Sequence[str], limit: int = 4) -> str:
    """The first few names, and how many more there are."""
    more = [f"{len(names) - limit} more"] if len(names) > limit else []
    return ", ".join([*names[:limit], *more])
