"""Checkpoints: files of tensors and plain types, replaced in a way that survives a crash."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nets.cpu import speed_up_detection
from nets.fold import fold_batch_norm
from nets.memory import move
from nets.yolo import YoloV4
from utils.errors import UserError
from utils.files import replacing
from utils.version import __version__
from weights.reading import FORMAT_VERSION, from_checkpoint, read_torch_file

REQUIRED_KEYS = (
    *("model", "class_names", "anchors", "input_shape", "width", "depth", "scale_xy"),
    *("conf_loss", "conf_threshold", "config", "epoch", "metrics"),
)
RESUME_KEYS = ("raw_model", "ema", "optimizer", "scaler", "schedule", "loss", "random", "step")


def save_checkpoint(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Write a checkpoint in one go: a crash leaves the old file or the new one."""
    with replacing(path) as file:
        versions = {"format_version": FORMAT_VERSION, "version": __version__}
        torch.save({**versions, **checkpoint}, file)


def read_checkpoint(path: str | Path, *, for_resume: bool = False) -> dict[str, Any]:
    """Read a checkpoint of this trainer on the CPU, with `weights_only=True`.

    Args:
        for_resume: Also require the training state, which only last.pt holds.

    Raises:
        UserError: If the file is missing, damaged, not such a checkpoint, from a newer version, or
            lacks the training state although `for_resume` is set.
    """
    checkpoint = read_torch_file(path, mmap=False)  # Windows cannot replace a mapped last.pt
    if not isinstance(checkpoint, dict) or "format_version" not in checkpoint:
        raise UserError(f"{path}: not a checkpoint of this trainer. Give a best.pt or last.pt.")
    from_checkpoint(checkpoint, path)  # refuses another format version
    missing = [key for key in REQUIRED_KEYS if key not in checkpoint]
    if missing:
        raise UserError(f"{path}: the checkpoint lacks {', '.join(missing)}; it is damaged.")
    if for_resume and any(key not in checkpoint for key in RESUME_KEYS):
        raise UserError(f"{path}: holds no training state. Resume from last.pt or its folder.")
    return checkpoint


def build_model(
    checkpoint: Mapping[str, Any],
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> YoloV4:
    """Build the checkpoint's network for detection, on `device` in `dtype`: BN folded, eval mode.

    Raises:
        UserError: If the weights do not fit the network, or exceed the range of `dtype`.
    """
    with torch.device("meta"):  # no random weights, which would only be replaced
        model = YoloV4(
            len(checkpoint["class_names"]), width=checkpoint["width"], depth=checkpoint["depth"]
        )
    model.to_empty(device="cpu")
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise UserError(f"The checkpoint's weights do not fit its own network: {error}") from None
    fold_batch_norm(model.eval())  # in float32, so that weights are rounded once
    model = move(model, device, dtype).requires_grad_(False)
    if dtype == torch.float16 and not all(p.isfinite().all() for p in model.parameters()):
        raise UserError("The network's weights exceed the range of float16. Use amp bf16 or off.")
    if torch.device(device).type == "cpu":
        speed_up_detection(model)
    return model


def cpu_copy(value: Any) -> Any:
    """A detached copy on the CPU of every tensor in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: cpu_copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(cpu_copy(item) for item in value)
    return value
