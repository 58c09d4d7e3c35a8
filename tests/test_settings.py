import pytest
import torch

from engine.settings import Phase, amp_dtype, epochs_for, plan_phases
from tests.training import training_settings
from utils.errors import UserError

CPU = torch.device("cpu")


def plan(epochs, freeze_epochs):
    return plan_phases(
        epochs=epochs, batch_size=4, freeze_epochs=freeze_epochs, freeze_batch_size=8
    )


def test_frozen_epochs_count_among_all_and_have_their_own_batch():
    assert plan(300, 50) == (Phase(50, 8, frozen=True), Phase(300, 4, frozen=False))
    assert plan(300, 0) == (Phase(300, 4, frozen=False),)
    assert plan(10, 20) == (Phase(10, 8, frozen=True),)


def test_the_learning_rate_is_rescaled_at_the_change_of_batch():
    settings = training_settings(phases=plan(300, 50), accumulate=4)
    assert settings.rates(settings.phases[0])[0] == pytest.approx(1e-2 * 32 / 64)
    assert settings.rates(settings.phases[1])[0] == pytest.approx(1e-2 * 16 / 64)
    assert settings.epochs == 300


def test_small_sets_get_300_epochs_and_large_ones_fewer():
    assert [epochs_for(n) for n in (1, 200, 1000, 4000, 17000, 10**6)] == [
        *(300, 300, 300, 150, 73, 30)
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"optimizer": "lion"},
        {"schedule": "linear"},
        {"momentum": 1.0},
        {"ema_decay": 1.0},
        {"strong_share": 1.5},
        {"lr": -0.1},
        {"lr": float("nan")},
        {"clip_norm": float("inf")},
    ],
)
def test_impossible_values_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        training_settings(phases=plan(3, 0), **wrong)


def test_autocast_is_off_on_the_cpu_unless_asked_for():
    assert amp_dtype("auto", CPU) is None
    assert amp_dtype("bf16", CPU) == torch.bfloat16
    for name in ("fp16", "fp8"):
        with pytest.raises(UserError, match=name):
            amp_dtype(name, CPU)
