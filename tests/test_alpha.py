"""alpha="auto": the share of positives that is measured, and what is weighted by it."""

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss as torchvision_focal

from losses.conf import build_conf_loss, conf_settings
from tests.test_yolo_loss import make_loss, make_outputs, make_targets
from utils.errors import UserError

NAMES = pytest.mark.parametrize("name", ["balanced_bce", "focal", "focal_pi"])


def batch(positives, cells):
    """Random logits, and targets of which the first are positives."""
    logits = torch.randn(cells, generator=torch.Generator().manual_seed(cells))
    return logits, (torch.arange(cells) < positives).float()


@NAMES
def test_it_is_1_minus_the_share_of_positives(name):
    logits, targets = batch(5, 20)
    gamma = 0 if name == "balanced_bce" else 2
    expected = torchvision_focal(logits, targets, alpha=0.75, gamma=gamma)
    losses = build_conf_loss(f'{name}(alpha="auto")')(logits, targets)
    torch.testing.assert_close(losses, expected)


def test_both_classes_have_the_same_total_weight():
    loss = build_conf_loss('focal(alpha="auto", gamma=0)')
    losses = loss(torch.zeros(1000), batch(3, 1000)[1])  # BCE of each is ln 2
    assert losses[:3].sum().item() == pytest.approx(losses[3:].sum().item(), rel=1e-5)


def test_only_counted_cells_count_and_a_soft_target_is_a_positive():
    logits, mask = torch.zeros(8), torch.tensor([True] * 5 + [False] * 3)
    targets = torch.tensor([0.01, 0, 0, 0, 0, 1, 1, 0])
    loss = build_conf_loss('focal(alpha="auto")')
    loss(logits, targets, mask)
    assert (loss.measured.positives.item(), loss.measured.counted.item()) == (1, 5)


def test_it_is_measured_over_all_training_batches_so_far():
    loss = build_conf_loss('focal(alpha="auto")')
    loss(*batch(9, 10))
    logits, targets = batch(1, 30)
    expected = torchvision_focal(logits, targets, alpha=1 - 10 / 40, gamma=2)
    torch.testing.assert_close(loss(logits, targets), expected)
    torch.testing.assert_close(loss.eval()(logits, targets), expected)
    assert loss.measured.counted == 40


def test_yolo_loss_says_what_is_measured_when_it_looks_at_the_cells():
    loss = make_loss(conf_loss='focal(alpha="auto")')
    assert "conf_alpha" not in loss(make_outputs(), make_targets())
    terms = loss(make_outputs(), make_targets(2), cells=True)
    measured = loss.conf_loss.measured
    share = measured.positives / measured.counted
    assert 0 < share < 0.1
    assert terms["conf_alpha"].item() == pytest.approx(1 - share.item())
    assert "conf_alpha" not in make_loss(conf_loss="focal")(
        make_outputs(), make_targets(), cells=True
    )


def test_evaluation_before_any_training_takes_the_batch_at_hand():
    logits, targets = batch(2, 10)
    loss = build_conf_loss('focal(alpha="auto")').eval()
    torch.testing.assert_close(loss(logits, targets), torchvision_focal(logits, targets, alpha=0.8))
    assert loss.measured.counted == 0


@pytest.mark.parametrize(("positives", "cells"), [(0, 0), (0, 5), (5, 5)])
def test_batches_of_one_class_or_none_have_finite_losses(positives, cells):
    losses = build_conf_loss('focal(alpha="auto")')(*batch(positives, cells))
    assert losses.shape == (cells,)
    assert losses.isfinite().all()


def test_a_single_cell_stays_float32():
    assert (
        build_conf_loss('focal(alpha="auto")')(torch.ones(()), torch.ones(())).dtype
        == torch.float32
    )


@NAMES
def test_the_state_is_saved_and_only_auto_has_one_and_wants_the_mask(name):
    auto, fixed = build_conf_loss(f'{name}(alpha="auto")'), build_conf_loss(f"{name}(alpha=0.3)")
    assert conf_settings(auto) == conf_settings(fixed)._replace(wants_mask=True)
    assert not conf_settings(fixed).wants_mask
    assert not fixed.state_dict()
    auto(*batch(1, 7))
    copy = build_conf_loss(f'{name}(alpha="auto")')
    copy.load_state_dict(auto.state_dict())
    assert torch.equal(copy.eval()(*batch(2, 5)), auto.eval()(*batch(2, 5)))
    assert not torch.equal(copy(*batch(2, 5)), build_conf_loss(name)(*batch(2, 5)))


@NAMES
def test_another_word_is_an_error(name):
    with pytest.raises(UserError, match='"auto"'):
        build_conf_loss(f'{name}(alpha="car")')
    with pytest.raises(UserError, match="0 to 1"):
        type(build_conf_loss(name))(alpha="car")
