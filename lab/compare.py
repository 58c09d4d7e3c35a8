"""Compare confidence losses: train every loss with every seed, evaluate, report."""

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from data.voc import read_class_names, scan_split
from lab.lock import folder_lock
from lab.plan import (
    Plan,
    as_spelled,
    check_distinct,
    join_plans,
    parse_flags,
    read_plan,
    write_plan,
)
from lab.report import write_reports
from lab.results import read_results
from lab.runs import ROOT, Laboratory
from lab.sources import settings_difference
from losses.conf import build_conf_loss, conf_settings
from utils.errors import UserError, run_script

REPORT_FLAGS = {"report_only", "losses", "save_dir"}


@dataclasses.dataclass(frozen=True)
class Config:
    # Each line is a flag and its comment the help text. All other flags are passed to train.py.
    losses: tuple[str, ...] = ("bce", "focal")  # confidence losses as --conf_loss; first: baseline
    seeds: tuple[int, ...] = (0, 1, 2)  # train each loss once per seed
    train: str = "VOCdevkit/VOC2007:train"  # training split as ROOT:SPLIT; join several with +
    val: str = "VOCdevkit/VOC2007:val"  # validation split as ROOT:SPLIT; selects best.pt
    test: str = "VOCdevkit/VOC2007:test"  # split on which the losses are compared
    epochs: int = 300  # total epochs of each run
    save_dir: str = "logs/compare"  # folder of the comparison; rerun the command to resume it
    jobs: int = 1  # runs in parallel, sharing the cores; 1 on a GPU
    report_only: bool = False  # only write the reports of --save_dir


def main() -> None:
    config, rest = tyro.cli(
        Config,
        description=f"{__doc__} Flags of train.py are passed on to every run.",
        use_underscores=True,
        return_unknown_args=True,
    )
    save_dir = Path(config.save_dir)
    if config.report_only:
        report(save_dir, losses_to_report(config, sys.argv[1:]))
        return
    plan = plan_of(config, rest)
    check_inputs(plan, config.jobs)
    make_folder(save_dir)
    with folder_lock(save_dir) as held:
        write_plan(save_dir, whole_plan(plan, save_dir))
        for note in changed_settings(plan, save_dir):
            print(f"note: {note}")
        failures = carry_out(plan, save_dir, jobs=config.jobs, held=held)
    report(save_dir)
    if failures:
        raise UserError("\n".join(["not all runs are finished:", *failures]))


def plan_of(config: Config, rest: list[str]) -> Plan:
    """The plan of this command line, with the losses spelled as in the folder's plan."""
    old = read_plan(Path(config.save_dir))
    flags = {"train": [config.train], "val": [config.val], "epochs": [str(config.epochs)]}
    plan = Plan(
        losses=as_spelled(config.losses, old.losses if old else ()),
        seeds=config.seeds,
        test=config.test,
        flags=flags | parse_flags(rest),
        version=project_version(),
    )
    check_distinct(plan)
    return plan


def check_inputs(plan: Plan, jobs: int) -> None:
    """Find now what would otherwise fail hours later: wrong losses, a wrong test split."""
    if jobs < 1 or plan.epochs < 1:
        raise UserError(f"--jobs {jobs}, --epochs {plan.epochs}: give 1 or more.")
    for loss in plan.losses:
        if loss not in plan.variants:
            build_conf_loss(loss)
    classes_path = plan.flags.get("classes_path", ["model_data/voc_classes.txt"])[-1]
    _, found = scan_split(
        plan.test,
        read_class_names(classes_path),
        skip_bad="skip_bad" in plan.flags,
        classes_path=classes_path,
        progress=True,
    )
    print(f"test: {found}")


def make_folder(save_dir: Path) -> None:
    try:
        save_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--save_dir {save_dir}: cannot make the folder ({error}).") from None


def whole_plan(plan: Plan, save_dir: Path) -> Plan:
    """This plan joined with the folder's earlier plan, if any run of that one has begun."""
    old = read_plan(save_dir)
    if old is None or not any(save_dir.glob("runs/*/*/config.json")):
        return plan
    if old.version != plan.version:
        print(f"note: begun with version {old.version or '?'}, this is {plan.version or '?'}")
    return join_plans(old, plan, save_dir)


def changed_settings(plan: Plan, save_dir: Path) -> list[str]:
    """A sentence per loss whose settings differ now from those of its earlier runs."""
    notes = []
    results = read_results(plan, save_dir)
    for loss in plan.losses:
        own = (result for result in results if result.run.loss == loss and result.settings)
        earlier = {f"seed {result.run.seed}": result.settings for result in own}
        now = conf_settings(build_conf_loss(loss))._asdict()
        found = settings_difference({**earlier, "now": now})
        if found:
            notes.append(f"{loss} was trained with other settings before: {found}.")
    return notes


def carry_out(plan: Plan, save_dir: Path, *, jobs: int, held: Sequence[int] = ()) -> list[str]:
    """Train and evaluate the unfinished runs; exit with status 130 if stopped.

    Args:
        held: File descriptors for the child processes, from `folder_lock`.

    Returns:
        A message per failed run.
    """
    laboratory = Laboratory(plan, save_dir, jobs=jobs, held=held)
    total, done = len(laboratory.runs), len(laboratory.finished)
    print(f"{total} runs of {plan.epochs} epochs, {done} finished; they are in {save_dir / 'runs'}")
    if not laboratory.work():
        print(f"stopped; resume with the same command:\n  {plan.command(save_dir)}")
        sys.exit(130)
    return laboratory.failures


def losses_to_report(config: Config, typed: Sequence[str]) -> tuple[str, ...]:
    """The losses that were typed, () for all; raise UserError for flags that a report ignores."""
    flags = parse_flags(typed)
    unused = [name for name in flags if name not in REPORT_FLAGS]
    if unused:
        raise UserError(
            f"--report_only trains nothing: leave --{unused[0]} out. It takes --save_dir, whose "
            "plan.json says the rest, and --losses, those that the report shall hold."
        )
    return config.losses if "losses" in flags else ()


def report(save_dir: Path, losses: Sequence[str] = ()) -> None:
    """Write the reports of a folder's plan: of all losses, or of these, against the first one."""
    plan = read_plan(save_dir)
    if plan is None:
        raise UserError(f"{save_dir} holds no plan.json. Give the --save_dir of a comparison.")
    chosen = as_spelled(losses, plan.losses) or plan.losses
    unknown = [loss for loss in chosen if loss not in plan.losses]
    if unknown:
        raise UserError(
            f"{save_dir} has no runs of {unknown[0]!r}. It has {', '.join(plan.losses)}."
        )
    shown = dataclasses.replace(plan, losses=chosen)
    check_distinct(shown)
    left_out = [loss for loss in plan.losses if loss not in chosen]
    for note in write_reports(shown, save_dir, left_out=left_out):
        print(f"note: {note}")
    print(f"wrote results.csv, results.md and report.html to {save_dir}")


def project_version() -> str:
    """This project's commit as git describes it; "" for a copy outside a repository of its own."""
    if not (ROOT / ".git").exists():  # git would answer for a repository around it
        return ""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return found.stdout.strip()


if __name__ == "__main__":
    run_script(main)
