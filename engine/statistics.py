"""What the steps of an epoch measured, read from the device one step late."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.guard import NonFiniteGuard
from losses.conf.cells import GROUPS, VALUES
from nets.decode import STRIDES
from utils.distributed import gather_objects

TERMS = ("total", "loc", "conf", "cls")
COUNTS = ("positives", "ignored")
STATISTICS = (*TERMS, *COUNTS, "grad_norm", "finite", "skipped")
CONF_ALPHA = "conf_alpha"  # of alpha="auto", in steps that look at the cells
GROUP_SHAPE = (len(STRIDES), len(GROUPS), len(VALUES))
NO_GROUPS = [0.0] * (len(STRIDES) * len(GROUPS) * len(VALUES))


class StepStatistics:
    """One step's statistics, with CONF_ALPHA and `group_sums` if any, on their way to the host."""

    def __init__(self, statistics: Mapping[str, Tensor]):
        self.names = (*STATISTICS, CONF_ALPHA) if CONF_ALPHA in statistics else STATISTICS
        self.packed = torch.stack([statistics[name].detach().float() for name in self.names])
        if "groups" in statistics:
            self.packed = torch.cat((self.packed, statistics["groups"].flatten()))
        self.event = None
        if self.packed.is_cuda:
            pinned = torch.empty(len(self.packed), pin_memory=True)
            self.packed = pinned.copy_(self.packed, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self) -> tuple[dict[str, float], list[float]]:
        """Wait until they are there: the statistics by name, and the flat group sums or []."""
        if self.event is not None:
            self.event.synchronize()
        values = self.packed.tolist()
        named, groups = values[: len(self.names)], values[len(self.names) :]
        return dict(zip(self.names, named, strict=True)), groups


class EpochStatistics:
    """Means over the finite steps of one epoch; `state` is what a resume in mid-epoch needs."""

    def __init__(self, guard: NonFiniteGuard):
        self.guard = guard
        sums = (*STATISTICS, "updates", "images", "seconds", "looks")
        self.state: dict[str, Any] = dict.fromkeys(sums, 0.0)  # as in a checkpoint
        self.state["groups"] = NO_GROUPS  # summed over the steps that looked at them
        self.state[CONF_ALPHA] = None  # of the last of these steps
        self.last: dict[str, float] = {}
        self.last_groups: list[float] = []
        self._pending: tuple[StepStatistics, list[str]] | None = None
        self._clock = time.perf_counter()

    def push(self, statistics: StepStatistics, images: Sequence[str]) -> str:
        """Take a step's statistics, read those of the step before. Returns the guard's message."""
        message = self.flush()
        self._pending = (statistics, list(images))
        return message

    def flush(self) -> str:
        """Read the pending step, if any. Returns the guard's message; raises as the guard does."""
        self.last_groups = []
        if self._pending is None:
            return ""
        statistics, images = self._pending
        self._pending = None
        self.last, self.last_groups = statistics.read()
        now = time.perf_counter()
        self.state["seconds"] += now - self._clock
        self.state["images"] += len(images)
        self._clock = now
        skipped = bool(self.last["skipped"])
        if self.last["finite"]:
            self._add(updated=self.last["grad_norm"] > 0 and not skipped)
        if self.last["finite"] and not skipped:
            return ""
        terms = {name: self.last[name] for name in (*TERMS, "grad_norm")}
        return self.guard.check(terms, skipped=skipped, images=images)

    def _add(self, *, updated: bool) -> None:
        for name in ("finite", *TERMS, *COUNTS):
            self.state[name] += self.last[name]
        if self.last_groups:
            self.state["groups"] = _add(self.state["groups"], self.last_groups)
            self.state["looks"] += 1
            self.state[CONF_ALPHA] = self.last.get(CONF_ALPHA)
        if updated:
            self.state["grad_norm"] += self.last["grad_norm"]
            self.state["updates"] += 1
            self.guard.updated()

    def join_ranks(self) -> None:
        """Take in the other ranks' sums: counts add up, loss terms are means over ranks already
        divided by joint counts."""
        states = gather_objects(self.state)
        for name in TERMS:
            self.state[name] = sum(state[name] for state in states) / len(states)
        for name in (*COUNTS, "images"):
            self.state[name] = sum(state[name] for state in states)
        for state in states[1:]:
            states[0]["groups"] = _add(states[0]["groups"], state["groups"])
        self.state["groups"] = states[0]["groups"]

    def mean(self, name: str) -> float:
        """Mean of a statistic over the epoch's finite steps; NaN when there was none."""
        count = self.state["updates" if name == "grad_norm" else "finite"]
        return self.state[name] / count if count else float("nan")

    def images_per_second(self) -> float:
        """Images learnt per second of training, evaluation apart."""
        return self.state["images"] / max(self.state["seconds"], 1e-9)

    def row(self) -> dict[str, float | None]:
        """The epoch's statistics under their names in metrics.csv."""
        names = ("loc", "conf", "cls", *COUNTS, "grad_norm")
        return {
            "loss": self.mean("total"),
            **{name: self.mean(name) for name in names},
            CONF_ALPHA: self.state[CONF_ALPHA],
            **cell_statistics(self.state["groups"], looks=self.state["looks"]),
            "images_per_second": self.images_per_second(),
            "seconds": self.state["seconds"],
        }


def cell_statistics(groups: Sequence[float], *, looks: float = 1) -> dict[str, float]:
    """Statistics of the flat `group_sums` of so many steps; nan where there was nothing.

    conf_*: shares of the whole confidence term; s8_* and so on: of the scale with that stride, with
    its mean objectness, and its positive and ignored cells a step.
    """
    sums = np.asarray(groups, dtype=np.float64).reshape(GROUP_SHAPE)
    statistics = _shares("conf", sums.sum(0))
    for stride, of_scale in zip(STRIDES, sums, strict=True):
        objectness, cells = of_scale[:, 2], of_scale[:, 3]
        statistics |= _shares(f"s{stride}", of_scale)
        statistics |= {
            f"s{stride}_objectness_positive": _ratio(objectness[0], cells[0]),
            f"s{stride}_objectness_negative": _ratio(objectness[1:3].sum(), cells[1:3].sum()),
            f"s{stride}_positives": _ratio(cells[0], looks),
            f"s{stride}_ignored": _ratio(cells[3], looks),
        }
    return statistics


def _shares(prefix: str, sums: np.ndarray) -> dict[str, float]:
    """Which group of cells has how much of the loss and of its gradient. sums: (4, 4)."""
    return {
        f"{prefix}_{name}_{group}": _ratio(sums[row, column], sums[:3, column].sum())
        for column, name in enumerate(("loss", "grad"))
        for row, group in enumerate(GROUPS[:3])
    }


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else float("nan")


def _add(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a + b for a, b in zip(first, second, strict=True)]


def memory_gb(device: torch.device) -> float:
    """Peak memory so far: allocated on the GPU, or resident in this process, in 1e9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
