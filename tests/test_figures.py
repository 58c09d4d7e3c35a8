import math

import pytest
import torch

from engine.figures import FIGURES, EpochFigures, HostFigures, memory_gb
from engine.guard import NonFiniteGuard


def figures(total, finite=True, norm=1.0, skipped=False):
    values = dict.fromkeys(FIGURES, 0.0) | {"total": total, "finite": finite, "grad_norm": norm}
    values["skipped"] = skipped or not finite
    return HostFigures({name: torch.tensor(float(value)) for name, value in values.items()})


def test_a_step_is_read_when_the_next_one_is_pushed():
    epoch = EpochFigures(NonFiniteGuard())
    epoch.push(figures(2.0), ["a"])
    assert epoch.last == {}
    epoch.push(figures(4.0), ["b"])
    assert epoch.last["total"] == 2.0
    epoch.flush()
    assert epoch.mean("total") == 3.0
    assert epoch.flush() == ""


def test_skipped_steps_do_not_enter_the_means_and_are_told_with_their_pictures():
    epoch = EpochFigures(NonFiniteGuard())
    epoch.push(figures(2.0), ["good.jpg"])
    epoch.push(figures(float("nan"), finite=False), ["bad.jpg"])
    assert "bad.jpg" in epoch.flush()
    assert epoch.mean("total") == 2.0
    assert epoch.state["pictures"] == 2


def test_the_gradient_norm_is_a_mean_over_updates_not_batches():
    epoch = EpochFigures(NonFiniteGuard())
    for norm in (0.0, 3.0, 0.0, 5.0):  # accumulated over two batches
        epoch.push(figures(1.0, norm=norm), [])
    epoch.flush()
    assert epoch.mean("grad_norm") == 4.0


def test_an_epoch_without_a_finite_step_has_no_mean():
    assert math.isnan(EpochFigures(NonFiniteGuard()).mean("total"))


def test_the_state_carries_an_epoch_over_a_resume():
    epoch = EpochFigures(NonFiniteGuard())
    epoch.push(figures(2.0), ["a"])
    epoch.flush()
    resumed = EpochFigures(NonFiniteGuard())
    resumed.state.update(epoch.state)
    resumed.push(figures(6.0), ["b"])
    resumed.flush()
    assert resumed.mean("total") == pytest.approx(4.0)


def test_memory_of_this_process_is_a_plausible_number():
    assert 0.05 < memory_gb(torch.device("cpu")) < 64


@pytest.mark.cuda
def test_figures_come_from_the_gpu_without_a_sync():
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = {name: torch.ones((), device="cuda") for name in FIGURES}
        waiting = HostFigures(values)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waiting.read() == dict.fromkeys(FIGURES, 1.0)


def test_a_finite_batch_of_a_skipped_update_does_not_end_the_row():
    guard = NonFiniteGuard(limit=3)
    epoch = EpochFigures(guard)
    for _ in range(2):
        epoch.push(figures(1.0, norm=0.0), ["good.jpg"])
        epoch.push(figures(1.0, norm=float("nan"), skipped=True), ["last.jpg"])
    epoch.flush()
    assert guard.in_a_row == 2
    assert math.isnan(epoch.mean("grad_norm"))  # no update was made
    assert epoch.mean("total") == 1.0
