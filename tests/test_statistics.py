import math

import pytest
import torch

from engine.guard import NonFiniteGuard
from engine.statistics import (
    NO_GROUPS,
    STATISTICS,
    EpochStatistics,
    StepStatistics,
    cell_statistics,
    memory_gb,
)


def figures(total, finite=True, norm=1.0, skipped=False, groups=None, alpha=None):
    values = dict.fromkeys(STATISTICS, 0.0) | {"total": total, "finite": finite, "grad_norm": norm}
    values["skipped"] = skipped or not finite
    tensors = {name: torch.tensor(float(value)) for name, value in values.items()}
    if groups is not None:
        tensors["groups"] = torch.tensor(groups).view(3, 4, 4)
    if alpha is not None:
        tensors["conf_alpha"] = torch.tensor(alpha)
    return StepStatistics(tensors)


def test_a_step_is_read_when_the_next_one_is_pushed():
    epoch = EpochStatistics(NonFiniteGuard())
    epoch.push(figures(2.0), ["a"])
    assert epoch.last == {}
    epoch.push(figures(4.0), ["b"])
    assert epoch.last["total"] == 2.0
    epoch.flush()
    assert epoch.mean("total") == 3.0
    assert epoch.flush() == ""


def test_skipped_steps_do_not_enter_the_means_and_are_told_with_their_images():
    epoch = EpochStatistics(NonFiniteGuard())
    epoch.push(figures(2.0), ["good.jpg"])
    epoch.push(figures(float("nan"), finite=False), ["bad.jpg"])
    assert "bad.jpg" in epoch.flush()
    assert epoch.mean("total") == 2.0
    assert epoch.state["images"] == 2


def test_the_gradient_norm_is_a_mean_over_updates_not_batches():
    epoch = EpochStatistics(NonFiniteGuard())
    for norm in (0.0, 3.0, 0.0, 5.0):  # accumulated over two batches
        epoch.push(figures(1.0, norm=norm), [])
    epoch.flush()
    assert epoch.mean("grad_norm") == 4.0


def test_an_epoch_without_a_finite_step_has_no_mean():
    assert math.isnan(EpochStatistics(NonFiniteGuard()).mean("total"))


def test_the_state_carries_an_epoch_over_a_resume():
    epoch = EpochStatistics(NonFiniteGuard())
    epoch.push(figures(2.0), ["a"])
    epoch.flush()
    resumed = EpochStatistics(NonFiniteGuard())
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
        values = {name: torch.ones((), device="cuda") for name in STATISTICS}
        waiting = StepStatistics({**values, "groups": torch.ones(3, 4, 4, device="cuda")})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waiting.read() == (dict.fromkeys(STATISTICS, 1.0), [1.0] * 48)


def test_a_finite_batch_of_a_skipped_update_does_not_end_the_row():
    guard = NonFiniteGuard(limit=3)
    epoch = EpochStatistics(guard)
    for _ in range(2):
        epoch.push(figures(1.0, norm=0.0), ["good.jpg"])
        epoch.push(figures(1.0, norm=float("nan"), skipped=True), ["last.jpg"])
    epoch.flush()
    assert guard.in_a_row == 2
    assert math.isnan(epoch.mean("grad_norm"))  # no update was made
    assert epoch.mean("total") == 1.0


def sums(loss, gradient, objectness, cells):
    """Group sums of one scale: a value a group, in the order positive, easy, hard, ignored."""
    return torch.tensor([loss, gradient, objectness, cells]).T.flatten().tolist()


# Stride 8 has cells of every group, stride 16 no positives, stride 32 nothing at all.
FINE = sums([1.0, 2, 5, 0], [6.0, 3, 1, 0], [1.0, 3, 5, 9], [2.0, 90, 8, 4])
MIDDLE = sums([0.0, 2, 0, 0], [0.0, 10, 0, 0], [0.0, 1, 0, 0], [0.0, 50, 0, 0])
GROUPS_OF_A_STEP = [*FINE, *MIDDLE, *[0.0] * 16]


def test_shares_and_means_are_those_of_the_sums():
    found = cell_statistics(GROUPS_OF_A_STEP)
    expected = {"loss_positive": 1 / 8, "loss_easy": 2 / 8, "loss_hard": 5 / 8}
    expected |= {"grad_positive": 6 / 10, "grad_easy": 3 / 10, "grad_hard": 1 / 10}
    expected |= {"objectness_positive": 0.5, "objectness_negative": 8 / 98}
    expected |= {"positives": 2, "ignored": 4}
    assert {f"s8_{name}": found[f"s8_{name}"] for name in expected} == pytest.approx(
        {f"s8_{name}": value for name, value in expected.items()}
    )
    assert found["conf_grad_positive"] == pytest.approx(6 / 20)
    assert found["conf_loss_easy"] == pytest.approx(4 / 10)
    assert found["s16_loss_easy"] == 1
    assert math.isnan(found["s16_objectness_positive"])
    assert math.isnan(found["s32_loss_positive"])


def test_an_epochs_shares_are_those_of_all_steps_that_looked():
    epoch = EpochStatistics(NonFiniteGuard())
    other = [2 * value for value in reversed(GROUPS_OF_A_STEP)]
    epoch.push(figures(1.0, groups=GROUPS_OF_A_STEP), ["a"])
    epoch.push(figures(1.0), ["b"])
    assert epoch.last_groups == pytest.approx(GROUPS_OF_A_STEP)
    epoch.push(figures(1.0, groups=other), ["c"])
    assert epoch.last_groups == []
    epoch.push(figures(float("nan"), finite=False, groups=[float("nan")] * 48), ["d"])
    epoch.flush()
    both = [a + b for a, b in zip(GROUPS_OF_A_STEP, other, strict=True)]
    row = epoch.row()
    for name, value in cell_statistics(both, looks=2).items():
        assert row[name] == pytest.approx(value, nan_ok=True), name
    assert epoch.flush() == ""
    assert epoch.last_groups == []


def test_the_measured_alpha_is_that_of_the_last_finite_look():
    epoch = EpochStatistics(NonFiniteGuard())
    assert epoch.row()["conf_alpha"] is None
    epoch.push(figures(1.0, groups=GROUPS_OF_A_STEP, alpha=0.5), ["a"])
    epoch.push(figures(1.0, groups=GROUPS_OF_A_STEP, alpha=0.75), ["b"])
    assert epoch.last["conf_alpha"] == 0.5
    assert epoch.last_groups == pytest.approx(GROUPS_OF_A_STEP)
    epoch.push(figures(1.0), ["c"])
    epoch.push(figures(float("nan"), False, groups=GROUPS_OF_A_STEP, alpha=0.9), ["d"])
    epoch.flush()
    assert epoch.row()["conf_alpha"] == 0.75


def test_an_epoch_that_did_not_look_has_no_shares():
    values = cell_statistics(NO_GROUPS, looks=0).values()
    assert all(math.isnan(value) for value in values)
