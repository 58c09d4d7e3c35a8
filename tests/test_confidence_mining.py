"""GHM and OHEM: what a cell weighs among the others, against hand-made cases and plain loops."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from losses.conf import build_conf_loss


def bce_of(logits, targets):
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def cells(difficulties, target=0.0):
    """Logits and targets of cells whose |p - y| are these."""
    difficulty = torch.tensor(difficulties, dtype=torch.float64)
    p = difficulty if target == 0 else 1 - difficulty
    return p.logit(), torch.full_like(p, target)


def weights_of(loss, logits, targets, mask=None):
    return loss(logits, targets, mask) / bce_of(logits, targets)


def random_batch(seed=0, shape=(3, 200)):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 - 2
    targets = (torch.rand(shape, generator=generator) < 0.1).double()
    return logits, targets, torch.rand(shape, generator=generator) < 0.7


def shares_of(logits, targets, mask, bins):
    difficulty = np.abs(1 / (1 + np.exp(-logits[mask].numpy())) - targets[mask].numpy())
    counts, _ = np.histogram(difficulty, bins, range=(0, 1))
    return torch.from_numpy(counts / counts.sum())


def test_ghm_weighs_a_bin_by_the_inverse_of_its_cells():
    logits, targets = cells([0.05] * 90 + [0.95] * 10)
    weights = weights_of(build_conf_loss("ghm(bins=10)"), logits, targets)
    expected = torch.tensor([100 / (2 * 90)] * 90 + [100 / (2 * 10)] * 10)
    torch.testing.assert_close(weights, expected.double())


def test_ghm_of_one_bin_or_of_equal_populations_is_bce():
    same_bin = cells([0.41, 0.42, 0.49])
    torch.testing.assert_close(build_conf_loss("ghm(bins=10)")(*same_bin), bce_of(*same_bin))
    equal = cells([0.05, 0.06, 0.95, 0.91])
    torch.testing.assert_close(build_conf_loss("ghm(bins=10)")(*equal), bce_of(*equal))
    logits, targets, _ = random_batch()
    one_bin = build_conf_loss("ghm(bins=1)")(logits, targets)
    torch.testing.assert_close(one_bin, bce_of(logits, targets))


@pytest.mark.parametrize("bins", [1, 7, 30, 1000])
def test_ghm_equals_a_plain_histogram_and_its_weights_have_mean_1_over_counted_cells(bins):
    logits, targets, mask = random_batch()
    weights = weights_of(build_conf_loss(f"ghm(bins={bins})"), logits, targets, mask)
    shares = shares_of(logits, targets, mask, bins)
    index = ((logits.sigmoid() - targets).abs() * bins).long()
    expected = 1 / (shares[index] * (shares > 0).sum())
    torch.testing.assert_close(weights[mask], expected[mask])
    assert weights[mask].mean().item() == pytest.approx(1)
    assert (weights[~mask] == 0).all()


def test_ghm_treats_positives_and_negatives_of_one_difficulty_alike():
    parts = [cells([0.3, 0.3, 0.7]), cells([0.3, 0.7, 0.7], target=1.0)]
    logits, targets = (torch.cat(x) for x in zip(*parts, strict=True))
    losses = build_conf_loss("ghm")(logits, targets)
    torch.testing.assert_close(losses[[0, 2]], losses[[3, 4]])


def test_ghm_averages_shares_with_momentum_and_is_right_from_the_first_batch():
    first, second = random_batch(1), random_batch(2)
    loss = build_conf_loss("ghm(bins=5, momentum=0.75)")
    at_once = build_conf_loss("ghm(bins=5, momentum=0)")
    torch.testing.assert_close(loss(*first), at_once(*first))
    loss(*second)
    old, new = (shares_of(*batch, bins=5) for batch in (first, second))
    expected = (0.75 * old + new) / 1.75
    torch.testing.assert_close(loss.shares / loss.weight, expected)
    at_once(*second)
    torch.testing.assert_close(at_once.shares / at_once.weight, new)


def test_ghm_uses_the_average_in_the_step_and_what_is_stored_in_evaluation():
    loss = build_conf_loss("ghm(bins=2)")
    loss(*cells([0.1, 0.1, 0.1, 0.9]))
    batch = cells([0.1] * 5 + [0.9] * 5)  # alone their weights would be 1
    for mode, easy in ((False, 0.75), (True, (0.75 * 0.75 + 0.5) / 1.75)):
        weights = weights_of(loss.train(mode), *batch)
        expected = torch.tensor([1 / (2 * easy), 1 / (2 * (1 - easy))]).repeat_interleave(5)
        torch.testing.assert_close(weights, expected.double(), rtol=1e-6, atol=0)


def test_ghm_in_evaluation_before_any_training_takes_the_batch_at_hand():
    loss, batch = build_conf_loss("ghm"), random_batch()
    torch.testing.assert_close(loss.eval()(*batch), build_conf_loss("ghm")(*batch))
    assert loss.weight == 0


def test_ghm_weighs_a_bin_never_seen_before_no_more_than_one_cell_of_the_batch():
    loss = build_conf_loss("ghm(bins=2)")
    loss(*cells([0.1, 0.1]))
    weights = weights_of(loss.eval(), *cells([0.1, 0.9, 0.1, 0.1]))
    torch.testing.assert_close(weights, torch.tensor([0.5, 2, 0.5, 0.5]).double())


def test_ghm_keeps_its_average_through_a_batch_without_counted_cells():
    loss, batch = build_conf_loss("ghm"), random_batch()
    loss(*batch)
    before = loss.shares.clone(), loss.weight.clone()
    logits, targets, _ = random_batch(1)
    losses = loss(logits, targets, torch.zeros_like(targets, dtype=torch.bool))
    assert (losses == 0).all()
    assert torch.equal(loss.shares, before[0])
    assert torch.equal(loss.weight, before[1])


def test_ghm_takes_a_logit_that_is_no_number_as_a_hard_cell():
    logits = torch.tensor([float("nan"), -9.0, -9.0])
    losses = build_conf_loss("ghm(bins=4)")(logits, torch.zeros(3))
    assert losses[0].isnan()  # the step is skipped for it
    torch.testing.assert_close(losses[1:], 0.75 * bce_of(logits, torch.zeros(3))[1:])


def test_ghm_gives_the_gradient_of_bce_times_its_weights():
    logits, targets, mask = random_batch()
    logits.requires_grad_()
    losses = build_conf_loss("ghm")(logits, targets, mask)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    weights = (losses / bce_of(logits, targets)).detach()
    torch.testing.assert_close(gradient, weights * (logits.sigmoid() - targets).detach())


def kept_by_a_loop(logits, targets, mask, ratio):
    """Indices of the cells that OHEM keeps, one by one."""
    cell = range(len(logits))
    positive = [i for i in cell if targets[i] > 0 and mask[i]]
    negative = [i for i in cell if targets[i] == 0 and mask[i]]
    negative.sort(key=lambda i: -logits[i].item())
    wanted = int(np.ceil(ratio * max(1, len(positive))))
    return sorted(positive + negative[:wanted])


@pytest.mark.parametrize("ratio", [0.3, 1, 3, 5.5, 1e6])
@pytest.mark.parametrize("seed", range(3))
def test_ohem_keeps_positives_and_the_hardest_negatives(ratio, seed):
    logits, targets, mask = random_batch(seed)
    losses = build_conf_loss(f"ohem(ratio={ratio})")(logits, targets, mask)
    kept = kept_by_a_loop(logits.flatten(), targets.flatten(), mask.flatten(), ratio)
    assert losses.flatten().nonzero().flatten().tolist() == kept
    chosen = losses > 0
    torch.testing.assert_close(losses[chosen], bce_of(logits, targets)[chosen])


def test_ohem_with_a_ratio_beyond_all_cells_is_bce_of_the_counted():
    logits, targets, mask = random_batch()
    losses = build_conf_loss("ohem(ratio=1e9)")(logits, targets, mask)
    torch.testing.assert_close(losses, bce_of(logits, targets) * mask)


@pytest.mark.parametrize("logit", [0.0, -500.0])
def test_ohem_keeps_exactly_so_many_among_ties(logit):
    logits = torch.full((50,), logit, requires_grad=True)
    targets = torch.zeros(50)
    targets[[7, 30]] = 1
    loss = build_conf_loss("ohem")
    assert loss._kept(bce_of(logits, targets), targets > 0, targets >= 0).sum() == 2 + 3 * 2


def test_ohem_looks_at_all_images_at_once():
    logits = torch.tensor([[-4.0, -3.0, -9.0], [2.0, 1.0, 3.0]])
    targets = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    losses = build_conf_loss("ohem")(logits, targets)
    assert (losses > 0).tolist() == [[False, False, True], [True, True, True]]


def test_ohem_without_a_positive_keeps_the_ratio_of_one():
    logits = torch.linspace(-5, 5, 40)
    losses = build_conf_loss("ohem(ratio=4)")(logits, torch.zeros(40))
    assert losses.nonzero().flatten().tolist() == [36, 37, 38, 39]


def test_ohem_never_takes_what_is_not_counted():
    logits, mask = torch.tensor([9.0, 8.0, 0.0, 7.0]), torch.tensor([False, True, True, True])
    losses = build_conf_loss("ohem(ratio=2)")(logits, torch.tensor([0.0, 0.0, 0.0, 1.0]), mask)
    assert (losses > 0).tolist() == [False, True, True, True]
    none = build_conf_loss("ohem")(logits, torch.tensor([1.0, 0.0, 0.0, 0.0]), ~mask[:1].expand(4))
    assert (none > 0).sum() == 4
