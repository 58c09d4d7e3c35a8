"""Box losses against torchvision, plain formulas and numerical gradients."""

import math

import pytest
import torch
from torchvision import ops
from torchvision.ops import box_convert

from losses.box_loss import BOX_LOSSES, box_losses
from tests.reference_loss import ciou
from utils.errors import UserError


def box_loss(kind, boxes, truths):
    return box_losses(kind, boxes, truths)[0]


EVERY = pytest.mark.parametrize("kind", sorted(BOX_LOSSES))


def random_boxes(seed, count=200):
    """Some overlap, some lie apart; grid units."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(count, 4, generator=generator, dtype=torch.float64)
    return torch.cat((uniform[:, :2] * 6, uniform[:, 2:] * 5 + 0.3), dim=1)


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("giou", ops.generalized_box_iou_loss),
        ("diou", ops.distance_box_iou_loss),
        ("ciou", ops.complete_box_iou_loss),
    ],
)
def test_values_equal_torchvision(kind, function):
    boxes, truths = random_boxes(0), random_boxes(1)
    expected = function(box_convert(boxes, "cxcywh", "xyxy"), box_convert(truths, "cxcywh", "xyxy"))
    torch.testing.assert_close(box_loss(kind, boxes, truths), expected, atol=1e-6, rtol=1e-5)


def test_iou_equals_the_diagonal_of_torchvisions():
    boxes, truths = random_boxes(0), random_boxes(1)
    expected = ops.box_iou(
        box_convert(boxes, "cxcywh", "xyxy"), box_convert(truths, "cxcywh", "xyxy")
    ).diagonal()
    torch.testing.assert_close(box_losses("iou", boxes, truths)[1], expected)
    torch.testing.assert_close(box_loss("iou", boxes, truths), 1 - expected)


def test_ciou_takes_gradients_through_its_alpha():
    boxes, truths = random_boxes(0).requires_grad_(), random_boxes(1)
    ours = torch.autograd.grad(box_loss("ciou", boxes, truths).sum(), boxes)[0]
    reference = torch.autograd.grad(-ciou(boxes, truths).sum(), boxes)[0]
    torch.testing.assert_close(ours, reference)


def siou_by_the_paper(box, truth):
    """One pair, as written: sqrt, asin and all."""
    (x1, y1, w1, h1), (x2, y2, w2, h2) = box, truth
    low_x, high_x = min(x1 - w1 / 2, x2 - w2 / 2), max(x1 + w1 / 2, x2 + w2 / 2)
    low_y, high_y = min(y1 - h1 / 2, y2 - h2 / 2), max(y1 + h1 / 2, y2 + h2 / 2)
    dx, dy = abs(x1 - x2), abs(y1 - y2)
    sine = dx / math.hypot(dx, dy)
    if sine > math.sqrt(0.5):
        sine = dy / math.hypot(dx, dy)
    g = 2 - math.cos(2 * math.asin(sine) - math.pi / 2)
    distance = 2 - sum(
        math.exp(-g * ratio**2) for ratio in (dx / (high_x - low_x), dy / (high_y - low_y))
    )
    changes = abs(w1 - w2) / max(w1, w2), abs(h1 - h2) / max(h1, h2)
    return (distance + sum((1 - math.exp(-change)) ** 4 for change in changes)) / 2


def eiou_by_the_paper(box, truth):
    (x1, y1, w1, h1), (x2, y2, w2, h2) = box, truth
    hull_w = max(x1 + w1 / 2, x2 + w2 / 2) - min(x1 - w1 / 2, x2 - w2 / 2)
    hull_h = max(y1 + h1 / 2, y2 + h2 / 2) - min(y1 - h1 / 2, y2 - h2 / 2)
    distance = ((x1 - x2) ** 2 + (y1 - y2) ** 2) / (hull_w**2 + hull_h**2)
    return distance + ((w1 - w2) / hull_w) ** 2 + ((h1 - h2) / hull_h) ** 2


@pytest.mark.parametrize(
    ("kind", "penalty"), [("siou", siou_by_the_paper), ("eiou", eiou_by_the_paper)]
)
def test_values_equal_the_papers_formula(kind, penalty):
    boxes, truths = random_boxes(0), random_boxes(1)
    penalties = [penalty(*pair) for pair in zip(boxes.tolist(), truths.tolist(), strict=True)]
    expected = (
        1 - box_losses("iou", boxes, truths)[1] + torch.tensor(penalties, dtype=torch.float64)
    )
    torch.testing.assert_close(box_loss(kind, boxes, truths), expected)


@EVERY
def test_gradient_is_that_of_the_value(kind):
    boxes = random_boxes(2, count=12).requires_grad_()
    truths = random_boxes(3, count=12)
    assert torch.autograd.gradcheck(lambda b: box_loss(kind, b, truths), (boxes,))


@EVERY
def test_a_perfect_box_costs_nothing_and_any_other_more(kind):
    truths = random_boxes(0).float()
    perfect = box_loss(kind, truths, truths)
    torch.testing.assert_close(perfect, torch.zeros(len(truths)), atol=1e-5, rtol=0)
    worse = truths + torch.tensor([0.2, 0.0, 0.3, 0.0])
    assert (box_loss(kind, worse, truths) > 0.01).all()


@EVERY
@pytest.mark.parametrize(
    ("box", "truth"),
    [
        ((3, 3, 2, 1), (3, 3, 2, 1)),  # identical
        ((3, 3, 2, 1), (3, 3, 0, 0)),  # a truth without size
        ((3, 3, 0, 0), (3, 3, 0, 0)),  # nothing at all
        ((3, 3, 0, 0), (5, 3, 0, 0)),
        ((3, 3, 1e6, 1e6), (3, 3, 1, 1)),  # as large as decode can make one
        ((3, 3, 1e6, 1e-5), (3, 3, 1, 1)),
        ((3, 3, 1e-5, 1e-5), (40, 3, 30, 20)),
    ],
)
def test_extreme_pairs_have_finite_value_and_gradient(kind, box, truth):
    box = torch.tensor(box, dtype=torch.float32, requires_grad=True)
    loss = box_loss(kind, box, torch.tensor(truth, dtype=torch.float32))
    loss.backward()
    assert loss.isfinite()
    assert box.grad.isfinite().all()


@EVERY
def test_leading_dimensions_broadcast_and_may_be_empty(kind):
    boxes, truths = random_boxes(0)[:12].view(3, 4, 4), random_boxes(1)[:3, None]
    losses = box_loss(kind, boxes, truths)
    torch.testing.assert_close(losses[1, 2], box_loss(kind, boxes[1, 2], truths[1, 0]))
    assert box_loss(kind, torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)


def test_an_unknown_kind_is_an_error_that_lists_all():
    with pytest.raises(UserError, match="iou, giou, diou, ciou, siou, eiou"):
        box_loss("piou", torch.zeros(1, 4), torch.zeros(1, 4))
