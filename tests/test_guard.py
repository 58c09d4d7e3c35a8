import math

import pytest
import torch
from torch import nn

from engine.guard import NonFiniteGuard, Rollback
from utils.errors import UserError


def norms():
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)
    )


def statistics(model):
    return {k: v.clone() for k, v in model.state_dict().items() if "running" in k}


def test_rollback_undoes_a_poisoned_forward():
    model = norms()
    rollback = Rollback(model, nn.Identity())
    model(torch.randn(2, 3, 4, 4))
    before = statistics(model)
    rollback.snapshot()
    model(torch.full((2, 3, 4, 4), float("nan")))
    assert not statistics(model)["1.running_mean"].isfinite().all()
    rollback.restore_unless(torch.tensor(False))
    for key, value in statistics(model).items():
        assert torch.equal(value, before[key]), key


def test_rollback_keeps_a_good_forward_and_changes_no_statistics_itself():
    plain, guarded = norms(), norms()
    guarded.load_state_dict(plain.state_dict())
    rollback = Rollback(guarded, nn.Identity())
    image = torch.randn(2, 3, 4, 4)
    rollback.snapshot()
    plain(image), guarded(image)
    rollback.restore_unless(torch.tensor(True))
    for key, value in plain.state_dict().items():
        assert torch.equal(guarded.state_dict()[key], value), key


def test_guard_names_images_and_terms_and_stops_after_a_few_in_a_row():
    guard = NonFiniteGuard(limit=3)
    terms = {"total": float("nan"), "loc": 0.5}
    for _ in range(2):
        message = guard.check(terms, skipped=True, images=["a.jpg", "b.jpg"])
        assert "a.jpg, b.jpg" in message
        assert "total nan, loc 0.5" in message
    guard.updated()
    for _ in range(2):
        guard.check(terms, skipped=True, images=["c.jpg"])
    with pytest.raises(UserError, match=r"3 updates in a row.*total nan.*c\.jpg"):
        guard.check(terms, skipped=True, images=["c.jpg"])
    assert guard.skipped == 5


@pytest.mark.parametrize(
    ("bad", "last_words"),
    [
        ({"conf": math.nan, "total": math.nan}, "loss, mine:Mine. Not finite: conf alone."),
        ({"conf": math.inf, "loc": math.nan}, "--amp off: .* Not finite: loc, conf."),
        ({"cls": math.nan}, "--amp off: .* Not finite: cls."),
        ({"grad_norm": math.inf}, "--amp off: .* Not finite: the gradient, though the loss is."),
    ],
)
def test_the_last_words_name_the_term_that_is_not_finite(bad, last_words):
    terms = dict.fromkeys(("total", "loc", "conf", "cls", "grad_norm"), 0.5) | bad
    guard = NonFiniteGuard(limit=3, conf_loss="mine:Mine")
    for _ in range(2):
        guard.check(terms, skipped=True, images=["a.jpg"])
    with pytest.raises(UserError, match=f"all 2 updates were skipped.*{last_words}$"):
        guard.check_learnt()
    with pytest.raises(UserError, match=f"3 updates in a row.*{last_words}$"):
        guard.check(terms, skipped=True, images=["a.jpg"])


def test_a_training_with_an_update_or_without_any_has_learnt_what_it_could():
    guard = NonFiniteGuard()
    guard.check_learnt()
    guard.check({"total": math.nan}, skipped=False, images=[])
    guard.check_learnt()
    guard.check({"total": math.nan}, skipped=True, images=[])
    guard.updated()
    guard.check_learnt()
    assert (guard.made, guard.skipped) == (1, 1)


def test_a_bad_batch_that_ends_no_update_is_told_but_not_counted():
    guard = NonFiniteGuard(limit=2)
    for _ in range(5):
        assert "a.jpg" in guard.check({"total": 1.0}, skipped=False, images=["a.jpg"])
    assert guard.skipped == 0
