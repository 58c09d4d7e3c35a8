"""Load the weights that fit from a file of any kind, and report the rest."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nets.yolo import ANCHORS_PER_SCALE, BOX_CHANNELS, YoloV4
from utils.errors import UserError, summarise
from weights.class_rows import carry_rows, describe_rows, shared_rows
from weights.fork import BACKBONE
from weights.reading import WeightsFile, read_weights

COUNTER = "num_batches_tracked"  # of BN; nothing here reads it, and darknet's files lack it


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did.

    Attributes:
        loaded: Names of tensors that were loaded in full.
        partly, skipped: The other tensors, with what was loaded of them, or why nothing was.
        heads_loaded: The heads already know objectness; False: the output convolutions keep the
            weights that they had.
        scale_xy, anchors: What the weights were trained with; None if unknown.
        by_position: The heads were loaded although the file does not name its classes.
    """

    source: str
    loaded: list[str]
    partly: dict[str, str]
    skipped: dict[str, str]
    heads_loaded: bool
    scale_xy: tuple[float, ...] | None = None
    anchors: Sequence[Sequence[float]] | None = None
    by_position: bool = False

    def __str__(self) -> str:
        counts = [f"{len(self.loaded)} tensors loaded"]
        counts += [f"{len(self.partly)} in part"] if self.partly else []
        lines = [f"{self.source}: {', '.join([*counts, f'{len(self.skipped)} skipped'])}"]
        for group in (self.partly, self.skipped):
            for reason in dict.fromkeys(group.values()):
                names = [name for name, why in group.items() if why == reason]
                lines.append(f"  {summarise(names)}: {reason}")
        if self.by_position:
            lines.append("  outputs by position: the file does not name the classes that they mean")
        return "\n".join(lines)


def load_weights(
    model: YoloV4,
    path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    file_class_names: Sequence[str] | None = None,
) -> LoadReport:
    """Load every tensor of the file that fits the model, and report what was not loaded and why.

    The backbone loads in full or not at all. Where the classes of both sides are known, the
    outputs of those that both have are carried over, by name; otherwise the outputs load if the
    counts are equal.

    Args:
        path: A checkpoint or state_dict of this network, a .pth of the original fork (whole or its
            backbone), or a darknet .weights file (whole, yolov4.conv.137, or the backbone); its
            content decides, not its name.
        class_names: Of the model's outputs.
        file_class_names: Of a file that does not hold them itself.

    Raises:
        UserError: With the model unchanged, when the file is missing, damaged, not a weights file,
            from a newer version of this project, or its backbone does not fit.
    """
    weights = read_weights(path, model, class_names=file_class_names)
    report = match(model.state_dict(), weights, class_names)
    check_backbone(report)
    fitting = {name: weights.tensors[name] for name in (*report.loaded, *report.partly)}
    check_finite(fitting, report.source)
    own = model.state_dict()
    rows = shared_rows(weights.class_names, class_names) or ()
    for name in report.partly:
        fitting[name] = carry_rows(own[name], fitting[name], rows)
    model.load_state_dict(fitting, strict=False)
    return report


def match(
    expected: Mapping[str, Tensor], weights: WeightsFile, class_names: Sequence[str] | None
) -> LoadReport:
    """Decide for every tensor of the model and of the file whether it is loaded, and why not."""
    loaded, partly, skipped = [], {}, {}
    rows = shared_rows(weights.class_names, class_names)
    theirs, ours = weights.class_names or (), class_names or ()  # both known where there are rows
    for name, parameter in expected.items():
        tensor = weights.tensors.get(name)
        reason = mismatch(name, tensor, parameter)
        if rows is not None and is_output(name) and has_rows(tensor, weights, parameter):
            if rows:
                partly[name] = describe_rows(rows, ours)
            else:
                skipped[name] = (
                    f"output for other classes: {summarise(theirs)} in the file, "
                    f"{summarise(ours)} here"
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
        by_position=heads_loaded and weights.class_names is None and class_names is not None,
    )


def is_output(name: str) -> bool:
    """Whether a tensor belongs to an output convolution: only these depend on the classes."""
    return ".output." in name


def has_rows(tensor: Any, weights: WeightsFile, expected: Tensor) -> bool:
    """Whether an output tensor has the rows of the file's classes."""
    rows = ANCHORS_PER_SCALE * (BOX_CHANNELS + len(weights.class_names or ()))
    return same_inputs(tensor, expected) and len(tensor) == rows


def same_inputs(tensor: Any, expected: Tensor) -> bool:
    """Whether two output tensors differ at most in their number of classes."""
    if not isinstance(tensor, Tensor) or not plain(tensor, expected):
        return False
    return tensor.ndim > 0 and tensor.shape[1:] == expected.shape[1:]


def plain(tensor: Tensor, expected: Tensor) -> bool:
    """Whether a tensor holds dense real numbers, in floating point where that is expected."""
    dense = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
    number = not tensor.is_complex() and tensor.dtype != torch.bool
    return dense and number and tensor.is_floating_point() >= expected.is_floating_point()


def mismatch(name: str, tensor: Any, expected: Tensor) -> str | None:
    """Why the file's tensor cannot replace the model's; None if it can."""
    if tensor is None:
        return "not in the file"
    if not isinstance(tensor, Tensor):
        return f"no tensor in the file, but {type(tensor).__name__}"
    if not plain(tensor, expected):
        return f"of {tensor.dtype} and {tensor.layout} in the file, no plain numbers"
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
    """Raise UserError for another width or depth: half a backbone is worse than a random one."""
    strays = [name for name in report.skipped if name.startswith(BACKBONE)]
    if strays:
        raise UserError(
            f"{report.source}: its backbone does not fit this model, {len(strays)} tensors differ: "
            f"{strays[0]}: {report.skipped[strays[0]]}. Use the width and depth of the weights."
        )


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError for NaN or infinite weights: the training diverged, they detect nothing."""
    # The extremes are NaN if any value is. Unlike isfinite(), aminmax() makes no temporary tensors.
    ranges = {name: torch.stack(tensor.aminmax()) for name, tensor in tensors.items()}
    broken = [name for name, extremes in ranges.items() if not extremes.isfinite().all()]
    if broken:
        raise UserError(
            f"{source}: NaN or infinite values in {summarise(broken)}: its training has failed. "
            "Use weights from before that."
        )
