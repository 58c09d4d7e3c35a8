"""The constants of a run: recipes by name, flags, and what a resumed run may change."""

import argparse
import dataclasses
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from engine.console import resume_command
from engine.runlog import new_run_folder
from utils.errors import UserError
from weights.checkpoint import read_checkpoint

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


Config = Any  # that of train.py, which no package imports: a frozen dataclass


def parse_config(
    kind: type[Config],
    *,
    description: str,
    changeable: Collection[str],
) -> tuple[Config, dict[str, Any] | None]:
    """The flags as a Config, and with --resume the checkpoint, whose config is the default.

    changeable: the knobs that a resumed run may be given anew.
    Raises UserError for a checkpoint that cannot be resumed and for knobs that cannot change.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--resume", default=kind.resume)  # the constant counts, too
    finder.add_argument("--recipe", default=kind.recipe)
    finder.add_argument("--weights", default=kind.weights)
    found = finder.parse_known_args()[0]
    if not found.resume:
        changes = recipe_changes(found.recipe, fine_tuning=bool(found.weights))
        default = kind(**{**changes, "recipe": found.recipe})
        config = tyro.cli(kind, default=default, description=description, use_underscores=True)
        return config, None
    path = resumed_file(found.resume)
    checkpoint = read_checkpoint(path, for_resume=True)
    # A checkpoint that lacks a constant is older than it: the fork's value was in force then.
    older = recipe_changes("fork", fine_tuning=False)
    stored = stored_config(kind, {**older, **checkpoint["config"]})
    default = default_for_resume(stored, path)
    config = tyro.cli(kind, default=default, description=description, use_underscores=True)
    check_resumed(config, stored, changeable)
    if config.epochs < checkpoint["epoch"]:
        raise UserError(
            f"--epochs {config.epochs}: this run has done {checkpoint['epoch']} epochs already. "
            "Give more of them."
        )
    return dataclasses.replace(config, weights=stored.weights, resume=str(path)), checkpoint


def resumed_file(resume: str) -> Path:
    """The last.pt that --resume means. Raises UserError if there is none."""
    path = Path(resume) / "last.pt" if Path(resume).is_dir() else Path(resume)
    if path.exists():
        return path
    if path.parent.is_dir() and path.name == "last.pt":
        raise UserError(
            f"{path.parent} holds no last.pt, so there is nothing to resume: a run that ended "
            "before it first saved one begins anew."
        )
    raise UserError(f"--resume {resume}: there is no such run. Give its folder or its last.pt.")


def stored_config(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """A checkpoint's config; knobs that this version does not know are dropped."""
    known = {field.name for field in dataclasses.fields(kind)}
    pairs = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    return kind(**{key: value for key, value in pairs.items() if key in known})


def default_for_resume(stored: Config, path: Path) -> Config:
    """What the flags of a resumed run change.

    A loss of the form module:Class is left out: it runs code of the user's, and a file that came
    from somewhere must not choose what is run.
    """
    conf_loss = "" if ":" in stored.conf_loss else stored.conf_loss
    new = {"weights": "", "save_dir": "", "resume": str(path)}
    return dataclasses.replace(stored, conf_loss=conf_loss, **new)


def check_resumed(config: Config, stored: Config, changeable: Collection[str]) -> None:
    """Refuse changes that a resumed run cannot make."""
    if config.weights:
        raise UserError("--resume loads the weights of the run; leave --weights out.")
    if ":" in stored.conf_loss and config.conf_loss != stored.conf_loss:
        raise UserError(
            f"this run's confidence loss is {stored.conf_loss!r}, code of yours that is run only "
            f"when named again, as it was: {resume_command(config.resume, stored.conf_loss)}"
        )
    names = [field.name for field in dataclasses.fields(config)]
    fixed = [name for name in names if name not in (*changeable, "weights")]
    changed = [name for name in fixed if getattr(config, name) != getattr(stored, name)]
    if changed:
        name = changed[0]
        raise UserError(
            f"--resume cannot change {', '.join(changed)} ({name} was {getattr(stored, name)!r}). "
            "Leave it out, or start a new run from these --weights."
        )


def check_same_anchors(
    anchors: Sequence[Sequence[float]], checkpoint: Mapping[str, Any] | None
) -> None:
    """A resumed run keeps its anchors."""
    if checkpoint and [list(anchor) for anchor in anchors] != checkpoint["anchors"]:
        raise UserError(
            "the anchors file has changed since this run began; bring the old one back."
        )


def check_same_classes(
    class_names: Sequence[str], classes_path: str, checkpoint: Mapping[str, Any] | None
) -> None:
    """A resumed run keeps its classes."""
    if checkpoint and list(class_names) != list(checkpoint["class_names"]):
        raise UserError(
            f"{classes_path} holds {', '.join(class_names)}, but the resumed run learns "
            f"{', '.join(checkpoint['class_names'])}. Give its own file with --classes_path."
        )


def check_same_settings(settings: Mapping[str, Any], checkpoint: Mapping[str, Any] | None) -> None:
    """A run that goes on keeps what its confidence loss declares: gain, normalizer and so on."""
    old = {} if checkpoint is None else checkpoint["config"].get("conf_settings") or {}
    changed = [name for name, value in settings.items() if old and old[name] != value]
    if changed:
        name = changed[0]
        raise UserError(
            f"this run's confidence loss was begun with {name} {old[name]!r}, now it declares "
            f"{settings[name]!r}. Bring the old value back, or start a new run."
        )


def run_folder(resume: str, save_dir: str) -> Path:
    """The folder of a resumed run, or a new one. Raises UserError as `new_run_folder`."""
    return folder_of_resumed(Path(resume), save_dir) if resume else new_run_folder(save_dir)


def folder_of_resumed(checkpoint_path: Path, save_dir: str) -> Path:
    """The checkpoint's folder, or `save_dir`, which then takes metrics.csv and best.pt along."""
    old = checkpoint_path.parent
    folder = Path(save_dir) if save_dir else old
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.csv", "best.pt"):
        if (old / name).exists() and not (folder / name).exists():
            shutil.copy(old / name, folder)
    return folder


def shared(config: Config, names: Iterable[str], *, but: Collection[str] = ()) -> dict[str, Any]:
    """The constants of these names, some left out: what a part of the training calls them too."""
    own = {field.name for field in dataclasses.fields(config)}
    return {name: getattr(config, name) for name in names if name in own and name not in but}


def recipe_values(config: Config) -> dict[str, Any]:
    """The constants that the recipe decides, as it alone gives them."""
    changes = recipe_changes(config.recipe, fine_tuning=bool(config.weights))
    values = {**dataclasses.asdict(type(config)()), **changes}
    return {key: values[key] for key in FORK}
