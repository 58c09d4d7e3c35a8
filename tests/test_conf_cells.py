"""Groups of cells and their histogram against plain counting."""

import math

import pytest
import torch

from losses.conf.cells import HARD_OBJECTNESS, CellHistogram, ConfCells, group_sums
from tests.test_yolo_loss import make_loss, make_outputs, make_targets

LOSSES = ["bce", "focal", "focal(normalizer='positives', gain=0.5)", "quality_focal", "ghm", "ohem"]


@pytest.mark.parametrize("spec", LOSSES)
def test_group_sums_are_those_of_plain_counting(spec):
    outputs = make_outputs()
    terms = make_loss(conf_loss=spec, ignore_threshold=0.2)(outputs, make_targets(), cells=True)
    cells = terms["cells"]
    gradients = torch.autograd.grad(terms["conf"], outputs, retain_graph=True)
    sums = torch.zeros(3, 4, 4, dtype=torch.float64)
    start = 0
    for scale, gradient in enumerate(gradients):
        slope = gradient.unflatten(1, (3, -1))[:, :, 4].permute(0, 2, 3, 1).flatten(1)
        for image in range(slope.shape[0]):
            for k in range(slope.shape[1]):
                cell = image, start + k
                p = cells.objectness[cell].sigmoid().item()
                group = 1 if p <= HARD_OBJECTNESS else 2
                group = 0 if cells.positive[cell] else group if cells.counted[cell] else 3
                values = [cells.losses[cell].item(), slope[image, k].abs().item(), p, 1.0]
                sums[scale, group] += torch.tensor(values, dtype=torch.float64)
        start += slope.shape[1]
    torch.testing.assert_close(terms["groups"].double(), sums, rtol=1e-4, atol=1e-6)
    assert sums[:, 3, 3].sum() == terms["ignored"] > 0
    assert sums[:, 0, 3].sum() == terms["positives"] > 0


@pytest.mark.parametrize("spec", LOSSES)
def test_the_cells_losses_add_up_to_the_confidence_term(spec):
    terms = make_loss(conf_loss=spec)(make_outputs(), make_targets(), cells=True)
    torch.testing.assert_close(terms["cells"].losses.sum(), terms["conf"].detach())
    assert not terms["cells"].losses.requires_grad


def test_looking_changes_no_term_and_no_gradient():
    found = []
    for cells in (False, True):
        outputs = make_outputs()
        terms = make_loss(focal_loss=True)(outputs, make_targets(), cells=cells)
        terms["total"].backward()
        found.append((terms["total"].item(), [raw.grad for raw in outputs]))
    assert found[0][0] == found[1][0]
    for plain, looked in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(plain, looked)


def test_groups_need_a_gradient_and_cells_do_not():
    with torch.no_grad():
        terms = make_loss()(make_outputs(), make_targets(), cells=True)
    assert "groups" not in terms
    assert terms["cells"].objectness.shape == terms["cells"].losses.shape


def make_cells(logits, targets, losses, counted=None):
    logits, targets = torch.tensor([logits]), torch.tensor([targets])
    counted = torch.ones_like(targets, dtype=torch.bool) if counted is None else counted
    losses = torch.tensor([losses]) * counted
    return ConfCells(logits, targets, targets > 0, counted, losses, [len(logits), 0, 0])


def bin_of(row):
    return row.nonzero().flatten().tolist()


def test_a_histogram_sorts_cells_from_easy_to_hard():
    histogram = CellHistogram()
    counted = torch.tensor([[True, True, True, True, False]])
    histogram.add(
        make_cells([-5.0, 3.0, 4.0, 0.0, 9.0], [0, 0, 1.0, 0.7, 0], [1.0, 2, 4, 8, 16], counted)
    )
    assert histogram.counts.sum(1).tolist() == [2, 2]
    assert histogram.losses.sum(1).tolist() == [12, 3]
    told = histogram.to_json()
    assert set(told) == {"difficulty", "positive", "negative"}
    difficulty = torch.tensor(told["difficulty"], dtype=torch.float64)
    assert (difficulty.diff() > 0).all()
    for group, expected in (("negative", [-5.0, 3.0]), ("positive", [-4.0, math.log(0.2 / 0.8)])):
        cells = torch.tensor(told[group]["cells"])
        logits = difficulty[cells > 0].logit()
        assert logits.tolist() == pytest.approx(expected, abs=0.026)
        assert (torch.tensor(told[group]["loss"]) > 0).tolist() == (cells > 0).tolist()


def test_extreme_and_not_finite_cells_stay_in_the_histogram():
    histogram = CellHistogram()
    logits = [-1e4, 1e4, float("nan"), float("inf"), -1e4, 1e4]
    histogram.add(make_cells(logits, [0, 0, 0, 0.5, 1.0, 1.0], [0.0] * 6))
    last = histogram.counts.shape[1] - 1
    assert histogram.counts.sum(1).tolist() == [3, 3]
    assert bin_of(histogram.counts[1]) == [0, last]
    assert bin_of(histogram.counts[0]) == [0, last // 2 + 1, last]


def test_batches_add_up_and_an_empty_one_adds_nothing():
    histogram = CellHistogram()
    histogram.add(make_cells([], [], []))
    assert not histogram.counts.any()
    for _ in range(2):
        histogram.add(make_cells([0.3, -0.3], [0, 1.0], [1.0, 3.0]))
    assert histogram.counts.max() == 2
    assert histogram.losses.sum(1).tolist() == [6, 2]


def test_group_sums_without_positives_are_those_of_negatives():
    logits = torch.tensor([[-3.0, 2.0]], requires_grad=True)
    conf = (2 * logits).sum()
    cells = make_cells([-3.0, 2.0], [0.0, 0.0], [1.0, 5.0])._replace(
        objectness=logits, sizes=[1, 1, 0]
    )
    sums = group_sums(cells, conf)
    assert sums[0, 1, [0, 1, 3]].tolist() == [1, 2, 1]
    assert sums[1, 2, [0, 1, 3]].tolist() == [5, 2, 1]
    assert sums[2].sum() == 0
    conf.backward()  # the graph stays
