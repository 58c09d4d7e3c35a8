"""What the steps of an epoch measured, read from the device one step late."""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from engine.distributed import gather_objects
from engine.guard import NonFiniteGuard

TERMS = ("total", "loc", "conf", "cls")
SHARES = ("positives", "ignored", "conf_positive_share")
FIGURES = (*TERMS, *SHARES, "grad_norm", "finite", "skipped")


class HostFigures:
    """The figures of one step on their way to the host."""

    def __init__(self, figures: Mapping[str, Tensor]):
        self.packed = torch.stack([figures[name].detach().float() for name in FIGURES])
        self.event = None
        if self.packed.is_cuda:
            pinned = torch.empty(len(FIGURES), pin_memory=True)
            self.packed = pinned.copy_(self.packed, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self) -> dict[str, float]:
        """Wait until they are there."""
        if self.event is not None:
            self.event.synchronize()
        return dict(zip(FIGURES, self.packed.tolist(), strict=True))


class EpochFigures:
    """Means over the finite steps of one epoch; `state` is what a resume in mid-epoch needs."""

    def __init__(self, guard: NonFiniteGuard):
        self.guard = guard
        self.state = dict.fromkeys((*FIGURES, "updates", "pictures", "seconds"), 0.0)
        self.last: dict[str, float] = {}
        self._pending: tuple[HostFigures, list[str]] | None = None
        self._clock = time.perf_counter()

    def push(self, figures: HostFigures, pictures: Sequence[str]) -> str:
        """Take a step's figures, read those of the step before. Returns the guard's message."""
        message = self.flush()
        self._pending = (figures, list(pictures))
        return message

    def flush(self) -> str:
        """Read the pending step, if any. Returns the guard's message; raises as the guard does."""
        if self._pending is None:
            return ""
        figures, pictures = self._pending
        self._pending = None
        self.last = figures.read()
        now = time.perf_counter()
        self.state["seconds"] += now - self._clock
        self.state["pictures"] += len(pictures)
        self._clock = now
        skipped = bool(self.last["skipped"])
        if self.last["finite"]:
            self._add(updated=self.last["grad_norm"] > 0 and not skipped)
        if self.last["finite"] and not skipped:
            return ""
        terms = {name: self.last[name] for name in (*TERMS, "grad_norm")}
        return self.guard.check(terms, skipped=skipped, pictures=pictures)

    def _add(self, *, updated: bool) -> None:
        for name in ("finite", *TERMS, *SHARES):
            self.state[name] += self.last[name]
        if updated:
            self.state["grad_norm"] += self.last["grad_norm"]
            self.state["updates"] += 1
            self.guard.updated()

    def join_ranks(self) -> None:
        """Take in the other ranks' sums: counts add up, loss terms are means over ranks already
        divided by joint counts."""
        states = gather_objects(self.state)
        for name in (*TERMS, "conf_positive_share"):
            self.state[name] = sum(state[name] for state in states) / len(states)
        for name in ("positives", "ignored", "pictures"):
            self.state[name] = sum(state[name] for state in states)

    def mean(self, name: str) -> float:
        """Mean of a figure over the epoch's finite steps; NaN when there was none."""
        count = self.state["updates" if name == "grad_norm" else "finite"]
        return self.state[name] / count if count else float("nan")

    def pictures_per_second(self) -> float:
        """Pictures learnt per second of training, evaluation apart."""
        return self.state["pictures"] / max(self.state["seconds"], 1e-9)


def memory_gb(device: torch.device) -> float:
    """Peak memory so far: allocated on the GPU, or resident in this process, in 1e9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
