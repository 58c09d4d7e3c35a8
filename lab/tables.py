"""The tables of a comparison: means and spreads over the seeds, and paired differences."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lab.plan import Plan
from lab.results import (
    NOT_MEASURED,
    STEP_TIME,
    Difference,
    Result,
    by_seed,
    columns,
    difference,
    difference_text,
    spread,
    spread_text,
)

MAIN = (
    "AP50",
    "AP",
    "AP75",
    "best F1",
    "at score",
    "ECE",
    STEP_TIME,
    "minutes",
)  # of the first table
OVERALL, REST = "overall", "at the checkpoint's own threshold, and by class"


class Table(NamedTuple):
    """A cell may have several lines; all but the first are less important."""

    title: str
    header: list[str]
    rows: list[list[str]]


def all_tables(plan: Plan, save_dir: Path, results: Sequence[Result]) -> list[Table]:
    """Tables of the main metrics, of the rest, and of their differences to the first loss."""
    names = columns(results)
    main = [name for name in MAIN if name in names]
    rest = sorted(set(names) - set(main), key=names.index)
    tables = [main_table(plan, save_dir, results, main)]
    if rest:
        tables.append(figures_table(plan, results, rest))
    if len(plan.losses) > 1:
        parts = ((OVERALL, main), (REST, rest))
        tables += [differences_table(plan, results, own, part) for part, own in parts if own]
    return tables


def main_table(
    plan: Plan, save_dir: Path, results: Sequence[Result], names: Sequence[str]
) -> Table:
    """A line per loss: which runs there are, mean and spread, and the difference in AP50."""
    first = plan.losses[0]
    header = ["loss", "runs", *names]
    if len(plan.losses) > 1:
        header += [f"AP50 against {first}", "exceeds the noise"]
    rows = []
    for loss in plan.losses:
        own = [result for result in results if result.run.loss == loss]
        states = filter(None, (state(result, plan, save_dir) for result in own))
        finished = sum(result.finished for result in own)
        row = ["\n".join((loss, *states)), f"{finished} of {len(own)}"]
        row += figure_cells(results, loss, names)
        if loss != first:
            found = paired(results, loss, first, "AP50")
            row += [difference_text(found, "AP50"), found.verdict if found else NOT_MEASURED]
        elif len(plan.losses) > 1:
            row += ["reference", ""]
        rows.append(row)
    return Table(f"Mean and spread over the seeds: {OVERALL}", header, rows)


def state(result: Result, plan: Plan, save_dir: Path) -> str:
    """Why a run is not in the means, "" if it is."""
    seed = f"seed {result.run.seed}"
    if result.finished:
        return ""
    if result.failure:
        log = result.run.log.relative_to(save_dir).as_posix()
        return f"{seed} failed ({result.failure}), see {log}"
    if not result.begun:
        return f"{seed} missing"
    return f"{seed}: {len(result.rows)} of {plan.epochs} epochs"


def figures_table(plan: Plan, results: Sequence[Result], names: Sequence[str]) -> Table:
    """A line per loss: mean and spread of further metrics."""
    rows = [[loss, *figure_cells(results, loss, names)] for loss in plan.losses]
    return Table(f"Mean and spread over the seeds: {REST}", ["loss", *names], rows)


def figure_cells(results: Sequence[Result], loss: str, names: Sequence[str]) -> list[str]:
    """Mean and spread; if some finished runs have no value, also how many have one."""
    finished = sum(result.finished for result in results if result.run.loss == loss)
    cells = []
    for name in names:
        values = list(by_seed(results, loss, name).values())
        some = f"\n{len(values)} of {finished} runs" if 0 < len(values) < finished else ""
        cells.append(spread_text(spread(values), name) + some)
    return cells


def paired(results: Sequence[Result], loss: str, first: str, name: str) -> Difference | None:
    """The difference of two losses in one metric."""
    return difference(by_seed(results, loss, name), by_seed(results, first, name))


def differences_table(
    plan: Plan, results: Sequence[Result], names: Sequence[str], part: str
) -> Table:
    """A line per loss but the first: its paired differences, and which exceed the noise."""
    first, *others = plan.losses
    rows = []
    for loss in others:
        row = [loss]
        for name in names:
            found = paired(results, loss, first, name)
            row.append(difference_text(found, name) + (f": {found.verdict}" if found else ""))
        rows.append(row)
    return Table(f"Difference to {first}: {part}", ["loss", *names], rows)
