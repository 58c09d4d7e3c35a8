"""Metrics of the runs of a comparison, and which differences exceed the noise."""

import csv
import io
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from engine.runlog import read_metrics
from lab.plan import Plan, Run, read_json, write_text
from metrics.plots import number

# Student's t, 97.5% quantile, by degrees of freedom from 1 on: 95% confidence, two-sided.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
STEP_TIME = "ms a step"
NOT_MEASURED = "-"
MAX_DIGITS = 6


@dataclass(frozen=True)
class Result:
    """What a run has left so far.

    Attributes:
        failure: How the last attempt failed; "" if it did not.
        figures: Metrics of the test split, and times, by the names of the report's columns; those
            that were not measured are absent.
        rows: metrics.csv.
        cells: conf_cells.json; None without.
        settings: What the loss declared; None for a run that has not begun or is older than this
            record.
    """

    run: Run
    finished: bool
    failure: str
    figures: Mapping[str, float]
    rows: Sequence[Mapping[str, str]]
    cells: Mapping[str, Any] | None
    settings: Mapping[str, Any] | None

    @property
    def begun(self) -> bool:
        return self.finished or bool(self.rows)


class Spread(NamedTuple):
    """Mean and sample standard deviation over seeds; the latter is nan for a single seed."""

    mean: float
    deviation: float


class Difference(NamedTuple):
    """Mean difference over pairs of equal seed, 95% confidence interval; nan for a single pair."""

    mean: float
    low: float
    high: float
    pairs: int

    @property
    def verdict(self) -> str:
        """Whether 0 lies outside the interval: yes, no or unknown."""
        if self.pairs == 1:
            return "unknown"
        return "no" if self.low <= 0 <= self.high else "yes"


def read_results(plan: Plan, save_dir: Path) -> list[Result]:
    """A result for every run of the plan, begun or not."""
    return [read_result(run) for run in plan.runs(save_dir)]


def read_result(run: Run) -> Result:
    """A run's folder as a Result."""
    evaluation = run.evaluation()
    rows = read_metrics(run.folder / "metrics.csv", last_epoch=sys.maxsize)
    figures = {} if evaluation is None else test_figures(evaluation)
    if evaluation is not None:
        figures[STEP_TIME] = step_time(rows)
        figures["minutes"] = sum(number(row["seconds"]) for row in rows) / 60
    return Result(
        run=run,
        finished=evaluation is not None,
        failure="" if evaluation is not None else read_text(run.failure),
        figures={name: value for name, value in figures.items() if math.isfinite(value)},
        rows=rows,
        cells=read_json(run.folder / "conf_cells.json"),
        settings=(read_json(run.folder / "config.json") or {}).get("conf_settings"),
    )


def read_text(path: Path) -> str:
    """The text of a file, "" if there is none."""
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def test_figures(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """The report's columns from an evaluation.json; nan where it has none."""
    fixed = evaluation.get("at_checkpoint_threshold") or {}
    return {
        "AP50": number(evaluation.get("AP50")),
        "AP": number(evaluation.get("AP")),
        "AP75": number(evaluation.get("AP75")),
        "best F1": number(evaluation.get("f1")),
        "at score": number(evaluation.get("conf_threshold")),
        "F1 as stored": number(fixed.get("f1")),
        "stored score": number(fixed.get("conf_threshold")),
        "ECE": number(evaluation.get("ece")),
        **{f"AP50 {name}": number(ap) for name, ap in evaluation.get("per_class", {}).items()},
    }


def step_time(rows: Sequence[Mapping[str, str]]) -> float:
    """Median over epochs of the milliseconds per step, without evaluation; nan without an epoch."""
    steps = [int(row["step"]) for row in rows]
    counts = (after - before for before, after in zip([0, *steps], steps, strict=False))
    times = [
        1000 * number(row["seconds"]) / count
        for row, count in zip(rows, counts, strict=True)
        if count > 0
    ]
    return statistics.median(times) if times else math.nan


def columns(results: Iterable[Result]) -> list[str]:
    """Names of all metrics that any run has, in the order of test_figures, the step time last."""
    names = dict.fromkeys(name for result in results for name in result.figures)
    return sorted(names, key=lambda name: name == STEP_TIME)


def by_seed(results: Iterable[Result], loss: str, name: str) -> dict[int, float]:
    """Seed -> a metric of a loss, where it was measured."""
    own = (result for result in results if result.run.loss == loss)
    return {result.run.seed: result.figures[name] for result in own if name in result.figures}


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and sample standard deviation; None without values."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return Spread(statistics.fmean(values), deviation)


def difference(own: Mapping[int, float], first: Mapping[int, float]) -> Difference | None:
    """The difference of a loss to the first one, over the seeds that both have; None without any.

    The same seed means the same initial weights and batches. What both share drops out of the
    pair's difference, and the interval is mean +- t s / sqrt(n) over the pairs alone.

    Args:
        own, first: Seed -> value, of the loss and of the first one.
    """
    pairs = [own[seed] - first[seed] for seed in own if seed in first]
    found = spread(pairs)
    if found is None:
        return None
    mean, deviation = found
    degrees = min(len(pairs) - 1, len(T_QUANTILES))  # beyond 30 the interval is a little too wide
    margin = T_QUANTILES[degrees - 1] * deviation / math.sqrt(len(pairs))  # nan for one pair
    return Difference(mean, mean - margin, mean + margin, len(pairs))


def spread_text(found: Spread | None, name: str) -> str:
    """ "0.812 ± 0.004", without a spread for one seed."""
    if found is None:
        return NOT_MEASURED
    if math.isnan(found.deviation):
        return f"{found.mean:.{digits_of(name)}f}"
    digits = digits_of(name, found.deviation)
    return f"{found.mean:.{digits}f} ± {found.deviation:.{digits}f}"


def difference_text(found: Difference | None, name: str) -> str:
    """ "+0.012", and in lines of their own "[-0.003, +0.027]" and "3 pairs"."""
    if found is None:
        return NOT_MEASURED
    if found.pairs == 1:
        return f"{found.mean:+.{digits_of(name, found.mean)}f}\n1 pair"
    digits = digits_of(name, *found[:3])
    mean, low, high = (f"{value:+.{digits}f}" for value in found[:3])
    return f"{mean}\n[{low}, {high}]\n{found.pairs} pairs"


def digits_of(name: str, *values: float) -> int:
    """Decimals to print: enough, up to MAX_DIGITS, that no value other than 0 becomes 0."""
    usual = 1 if name == STEP_TIME else 3
    needed = [-math.floor(math.log10(abs(value))) for value in values if value]
    return min(max(usual, *needed), MAX_DIGITS) if needed else usual


def write_csv(path: Path, results: Sequence[Result]) -> None:
    """Write results.csv: a line per run with every metric, empty where not measured."""
    names = columns(results)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["loss", "seed", "finished", "failure", *names])
    for result in results:
        run, found = result.run, result.figures
        values = (found.get(name, "") for name in names)
        writer.writerow([run.loss, run.seed, int(result.finished), result.failure, *values])
    write_text(path, text.getvalue())
