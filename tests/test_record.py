import time

import pytest
import torch
from torch import nn

from engine.guard import NonFiniteGuard
from engine.optimizer import build_optimizer
from engine.record import LONGEST_WAIT, RunRecord
from engine.settings import Phase
from engine.trainer import TrainStep
from tests.training import training_settings


def make_record(**settings):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    step = TrainStep(
        model=model,
        loss=nn.Identity(),
        optimizer=build_optimizer("sgd", model),
        ema=None,
        device=torch.device("cpu"),
        amp_dtype=None,
        clip_norm=0,
    )
    return RunRecord(
        step,
        settings=training_settings(phases=(Phase(9, 4, frozen=False),), **settings),
        metadata={},
        val_samples=[],
        guard=NonFiniteGuard(),
        log=None,
    )


@pytest.mark.parametrize(("waited", "due"), [(10, False), (30, False), (50, True), (400, True)])
def test_last_pt_is_saved_after_an_epoch_when_that_takes_little_of_the_time(waited, due):
    record = make_record()
    record.last_save, record.save_seconds = time.monotonic() - waited, 2.0
    assert record._save_is_due() is due


def test_the_first_epoch_is_saved_whatever_the_time():
    assert make_record()._save_is_due()


@pytest.mark.parametrize("epoch", [1, 2, 3, 4])
def test_a_save_period_decides_alone(epoch):
    record = make_record(save_period=2)
    record.epoch, record.save_seconds = epoch, 1e9
    assert record._save_is_due() is (epoch % 2 == 0)


def test_in_mid_epoch_last_pt_is_saved_when_it_is_five_minutes_old():
    record = make_record()
    record.epoch_step, record.steps = 3, 10
    before = record.last_save
    assert not record.save_between_steps(stop=False)
    assert record.last_save == before
    record.last_save = time.monotonic() - LONGEST_WAIT - 1
    assert not record.save_between_steps(stop=False)
    assert record.last_save >= before
    assert record.save_between_steps(stop=True)
