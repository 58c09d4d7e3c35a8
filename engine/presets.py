"""Recipes by name: the constants of train.py that each changes."""

from collections.abc import Mapping
from typing import Any

from utils.errors import UserError

# Every choice of the original fork (bubbliiiing/yolov4-pytorch, MIT) that this trainer has a
# constant for. Its learning rate, 1e-2 for 64 images, and its decay are SGD's defaults here too.
FORK = {
    "anchors_path": "model_data/yolo_anchors.txt",
    "scale_xy": (1.0, 1.0, 1.0),
    "assigner": "best_anchor",
    "ignore_threshold": 0.5,
    "iou_target": 0.0,
    "box_loss": "ciou",
    "loc_gain": 0.05,
    "cls_gain": 1.0,
    "balance": (4.0, 1.0, 0.4),
    "label_smoothing": 0.0,
    "init": "normal",
    "epochs": 300,
    "patience": 0,
    "batch_size": 4,
    "freeze_batch_size": 8,
    "optimizer": "sgd",
    "lr": None,
    "momentum": 0.937,
    "weight_decay": None,
    "schedule": "cosine",
    "clip_norm": 0.0,
    "repeat_threshold": 0.0,
    "mosaic_prob": 0.5,
    "mixup_prob": 0.5,
    "strong_share": 0.7,
    "scale": (0.25, 2.0),
    "mosaic_scale": (0.4, 1.0),
    "jitter": 0.3,
    "flip_prob": 0.5,
    "hsv": (0.1, 0.7, 0.4),
    "multi_scale": 0.0,
}
FORK_FINE_TUNING = {"freeze_epochs": 50}  # with --weights
FINE_TUNING: dict[str, Any] = {}  # what the default recipe changes with --weights
RECIPES = ("default", "fork")


def recipe_changes(name: str, *, fine_tuning: bool) -> Mapping[str, Any]:
    """What a recipe changes against the constants of train.py.

    Args:
        name: One of RECIPES.
        fine_tuning: Whether training starts from --weights.

    Raises:
        UserError: If there is no recipe of this name.
    """
    if name not in RECIPES:
        raise UserError(f"recipe {name!r} is unknown. Allowed: {', '.join(RECIPES)}.")
    if name == "fork":
        return FORK | (FORK_FINE_TUNING if fine_tuning else {})
    return FINE_TUNING if fine_tuning else {}


def describe_recipe(name: str, values: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """One line for the start of a run: the recipe, and the constants that differ from it.

    Args:
        name: The recipe.
        values: All constants of the run.
        expected: The same, as the recipe alone gives them.
    """
    changed = [f"{key} {_plain(values[key])}" for key in expected if values[key] != expected[key]]
    return f"recipe: {name}" + (f", changed: {', '.join(changed)}" if changed else ", unchanged")


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else repr(value)
