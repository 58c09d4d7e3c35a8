"""Compare training recipes: each with each seed on the same data for the same epochs, tested.

A recipe is the default with some constants of train.py changed. Rerun the command to resume.
Flags that are not listed go to train.py.
"""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

import tyro

from lab.compare import carry_out, check_inputs, make_folder, project_version, whole_plan
from lab.lock import folder_lock
from lab.plan import Plan, parse_flags, write_plan, write_text
from lab.plots import plot_learning_curves
from lab.report import markdown_table
from lab.results import (
    Result,
    by_seed,
    difference,
    difference_text,
    read_results,
    spread,
    spread_text,
)
from lab.tables import Table
from utils.errors import UserError, run_script

# Each changes the default.
RECIPES = {
    "default": "",
    "fork": "--recipe fork",
    # The fork's choices, one at a time
    "best_anchor": "--assigner best_anchor",
    "target_1": "--iou_target 0",
    "fork_gains": "--loc_gain 0.05 --cls_gain 1",
    "fork_anchors": "--anchors_path model_data/yolo_anchors.txt",
    "fork_augmentation": "--scale 0.25 2 --mosaic_scale 0.4 1 --jitter 0.3 --hsv 0.1 0.7 0.4 "
    "--mixup_prob 0.5 --strong_share 0.7",
    "mixup": "--mixup_prob 0.5",
    "sgd": "--optimizer sgd",
    "batch_4": "--batch_size 4",
    "normal_init": "--init normal",
    "no_clip": "--clip_norm 0",
    # Others
    "sgd_fast": "--optimizer sgd --lr 0.1",
    # Half and double of .005, the rate of the small network at batch 8; not for --full
    "half_rate": "--lr 0.02",
    "double_rate": "--lr 0.08",
    "batch_16": "--batch_size 16",
    "iou_threshold": "--assigner iou_threshold",
    "aligned": "--assigner aligned --ignore_threshold 1",
    "mosaic_always": "--mosaic_prob 1",
    "no_mosaic": "--mosaic_prob 0",
    "rare_classes": "--repeat_threshold 0.3",
    "siou": "--box_loss siou",
    "ignore_0.7": "--ignore_threshold 0.7",
    "multi_scale": "--multi_scale 0.25",
    "smoothing": "--label_smoothing 0.05",
}
SMALL = "--width 0.25 --depth 0.34 --input_shape 224 224 --num_workers 0 --device cpu"
FULL = "--batch_size 32 --num_workers 8 --device cuda"
FIGURES = ("AP50", "AP", "AP75", "minutes")
COMPARED = ("AP50", "AP")


@dataclasses.dataclass(frozen=True)
class Config:
    # Every line is a flag; its comment is the flag's help. All other flags go to train.py.
    recipes: tuple[str, ...] = ("default", "fork")  # names; all are compared to the first
    seeds: tuple[int, ...] = (0, 1, 2)  # each recipe is trained with each seed
    train: str = "VOCdevkit/BCCD:train"  # training split, ROOT:SPLIT
    val: str = "VOCdevkit/BCCD:val"  # validation split, which chooses best.pt
    test: str = "VOCdevkit/BCCD:val"  # split that the recipes are compared on
    classes_path: str = "VOCdevkit/BCCD/classes.txt"  # class names, one per line
    epochs: int = 40  # total epochs of each run
    full: bool = False  # full width and depth at 416 x 416 on a GPU, not a small network on a CPU
    save_dir: str = "logs/recipes"  # folder of the comparison
    jobs: int = 1  # runs at a time, which share the cores


def main() -> None:
    config, rest = tyro.cli(
        Config, description=__doc__, use_underscores=True, return_unknown_args=True
    )
    unknown = [name for name in config.recipes if name not in RECIPES]
    if unknown:
        raise UserError(f"recipe {unknown[0]!r} is unknown. Allowed: {', '.join(RECIPES)}.")
    plan, save_dir = plan_of(config, rest), Path(config.save_dir)
    check_inputs(plan, config.jobs)
    make_folder(save_dir)
    with folder_lock(save_dir) as held:
        write_plan(save_dir, whole_plan(plan, save_dir))
        failures = carry_out(plan, save_dir, jobs=config.jobs, held=held)
    report(plan, save_dir)
    if failures:
        raise UserError("\n".join(["not all runs are finished:", *failures]))


def plan_of(config: Config, rest: Sequence[str]) -> Plan:
    """Each recipe with each seed, all else alike."""
    own = {name: [str(getattr(config, name))] for name in ("train", "val", "classes_path")}
    own["epochs"] = [str(config.epochs)]
    machine = parse_flags(shlex.split(FULL if config.full else SMALL))
    return Plan(
        losses=config.recipes,
        seeds=config.seeds,
        test=config.test,
        flags={**machine, "cache": [], **own, **parse_flags(rest)},
        version=project_version(),
        variants={name: shlex.split(flags) for name, flags in RECIPES.items()},
    )


def report(plan: Plan, save_dir: Path) -> None:
    """Print the table and write it to results.md, with the learning curves beside it."""
    results = read_results(plan, save_dir)
    grouped = {name: [own for own in results if own.run.loss == name] for name in plan.losses}
    plot_learning_curves(save_dir / "learning_curves.png", grouped)
    table = markdown_table(recipes_table(plan, results))
    write_text(save_dir / "results.md", f"{table}\n\n![learning curves](learning_curves.png)\n")
    print(f"{table}\n\nwrote results.md and learning_curves.png to {save_dir}")


def recipes_table(plan: Plan, results: Sequence[Result]) -> Table:
    """A row per recipe: mean and spread over the seeds, paired differences to the first."""
    first, rows = plan.losses[0], []
    for name in plan.losses:
        seeds = {figure: by_seed(results, name, figure) for figure in FIGURES}
        row = [name, " ".join(plan.variants[name]) or "-", str(len(seeds["AP50"]))]
        row += [spread_text(spread(list(seeds[figure].values())), figure) for figure in FIGURES]
        for figure in COMPARED:
            found = difference(seeds[figure], by_seed(results, first, figure))
            row.append("" if name == first else difference_text(found, figure))
        rows.append(row)
    header = ["recipe", "changes", "runs", *FIGURES, *(f"{c} against {first}" for c in COMPARED)]
    return Table(f"Recipes on {plan.test}, {plan.epochs} epochs", header, rows)


if __name__ == "__main__":
    run_script(main)
