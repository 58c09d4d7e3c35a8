"""The sigmoid focal loss against torchvision's, known figures and its limits."""

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss as torchvision_focal

from losses.conf import build_conf_loss
from losses.focal import SigmoidFocalClassificationLoss, sigmoid_focal_loss
from utils.errors import UserError


def logit(p):
    return torch.tensor(p, dtype=torch.float64).logit()


def random_case(shape=(40, 7)):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator) * 4
    return logits.requires_grad_(), (torch.rand(shape, generator=generator) < 0.3).float()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2), (0.6, 0), (-1, 1.5), (1, 5), (0, 1)])
def test_value_and_gradient_equal_torchvision(alpha, gamma, reduction):
    logits, targets = random_case()
    ours = sigmoid_focal_loss(logits, targets, alpha=alpha, gamma=gamma, reduction=reduction)
    theirs = torchvision_focal(logits, targets, alpha=alpha, gamma=gamma, reduction=reduction)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-5)


def test_gamma_0_and_alpha_half_is_half_of_bce():
    logits, targets = random_case()
    half = F.binary_cross_entropy_with_logits(logits, targets, reduction="none") / 2
    torch.testing.assert_close(sigmoid_focal_loss(logits, targets, alpha=0.5, gamma=0), half)


def test_an_easy_negative_costs_as_little_as_published():
    loss = sigmoid_focal_loss(logit(0.01), torch.tensor(0.0))
    assert loss.item() == pytest.approx(7.5e-7, rel=0.01)


@pytest.mark.parametrize(
    ("p", "target", "expected"),
    [(0.5, 0, 2.24), (0.1, 0, 0.0217), (0.01, 1, -2.65), (0.9, 1, -0.0072)],
)
def test_gradients_at_ten_times_focal_are_as_published(p, target, expected):
    z = logit(p).requires_grad_()
    (10 * sigmoid_focal_loss(z, torch.tensor(float(target)))).backward()
    assert z.grad.item() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gamma", [0, 0.3, 1, 2, 5])
def test_value_and_gradient_are_finite_for_any_logit(gamma, dtype):
    logits = torch.tensor([-1e4, -30, 0, 30, 1e4] * 3, dtype=dtype, requires_grad=True)
    targets = torch.tensor([0.0, 0.4, 1.0]).repeat_interleave(5)
    losses = sigmoid_focal_loss(logits, targets, gamma=gamma)
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert losses.isfinite().all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("gamma", [0, 0.5, 2])
def test_gradient_is_that_of_the_value_for_soft_targets_too(gamma):
    logits = torch.randn(20, dtype=torch.float64, requires_grad=True)
    targets = torch.linspace(0, 1, 20, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: sigmoid_focal_loss(z, targets, gamma=gamma, alpha=0.3), (logits,)
    )


def test_a_soft_target_is_a_positive_and_its_difficulty_the_distance_to_it():
    z, y = torch.tensor([0.8, -1.0]), torch.tensor([0.3, 0.9])
    bce = F.binary_cross_entropy_with_logits(z, y, reduction="none")
    expected = 0.2 * (y - z.sigmoid()).abs() ** 1.5 * bce
    torch.testing.assert_close(sigmoid_focal_loss(z, y, alpha=0.2, gamma=1.5), expected)


def test_class_indices_equal_one_hot_and_an_index_outside_is_background():
    logits, _ = random_case((4, 3))
    indices, one_hot = torch.tensor([2, 0, 3, -1]), torch.zeros(4, 3)
    one_hot[0, 2] = one_hot[1, 0] = 1
    loss = SigmoidFocalClassificationLoss(gamma=1.5, alpha=0.4)
    torch.testing.assert_close(loss(logits, indices), loss(logits, one_hot))
    expected = torchvision_focal(logits, one_hot, alpha=0.4, gamma=1.5, reduction="mean")
    torch.testing.assert_close(loss(logits, one_hot), expected)


def test_weights_multiply_rows_or_elements():
    logits, targets = random_case((4, 3))
    rows, loss = torch.tensor([0.0, 1, 2, 3]), SigmoidFocalClassificationLoss(reduction="none")
    weighted = loss(logits, targets, rows)
    torch.testing.assert_close(weighted, loss(logits, targets) * rows[:, None])
    torch.testing.assert_close(weighted, loss(logits, targets, rows[:, None].expand(4, 3)))


def test_weights_broadcast_and_come_before_the_reduction():
    logits, targets = random_case((4, 3))
    classes = torch.tensor([[0.0, 1, 2]])
    weighted = SigmoidFocalClassificationLoss()(logits, targets, classes)
    losses = torchvision_focal(logits, targets)
    torch.testing.assert_close(weighted, (losses * classes).sum() / 12)


@pytest.mark.parametrize("shape", [(3,), (4, 1, 3), (2, 3)])
def test_weights_of_another_shape_are_an_error(shape):
    logits, targets = random_case((4, 3))
    with pytest.raises(UserError, match=r"weights of shape .*\(4, 3\)"):
        SigmoidFocalClassificationLoss()(logits, targets, torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float64])
def test_0_and_1_may_be_of_any_dtype_and_really_are_used(dtype):
    logits, targets = random_case((6, 5))
    expected = torchvision_focal(logits, targets, reduction="sum")
    loss = SigmoidFocalClassificationLoss(reduction="sum")
    torch.testing.assert_close(loss(logits, targets.to(dtype)), expected)
    assert not torch.isclose(loss(logits, (1 - targets).to(dtype)), expected)


def test_class_indices_go_with_any_number_of_dimensions():
    logits, _ = random_case((2, 5, 3))
    indices = torch.arange(10).view(2, 5) % 4  # 3 is background
    one_hot = F.one_hot(indices, 4)[..., :3].float()
    loss = SigmoidFocalClassificationLoss(reduction="none")
    torch.testing.assert_close(loss(logits, indices), torchvision_focal(logits, one_hot))


def test_the_class_term_of_that_name_is_the_same_loss():
    logits, targets = random_case((3, 4, 5))
    expected = SigmoidFocalClassificationLoss(gamma=1.5, alpha=0.4, reduction="none")
    term = build_conf_loss("focal(gamma=1.5, alpha=0.4)")
    assert torch.equal(term(logits, targets), expected(logits, targets))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_element_gives_a_differentiable_zero(reduction):
    logits = torch.zeros(0, 3, requires_grad=True)
    loss = SigmoidFocalClassificationLoss(reduction=reduction)(logits, torch.zeros(0).long())
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.shape == (0, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduction": "average"}, "none, sum, mean"),
        ({"alpha": 1.1}, "0 to 1"),
        ({"alpha": float("nan")}, "0 to 1"),
        ({"alpha": "auto"}, "0 to 1"),
        ({"gamma": -1}, "0 .* or more"),
        ({"gamma": float("inf")}, "0 .* or more"),
    ],
)
def test_a_bad_argument_is_an_error_that_says_what_is_allowed(arguments, message):
    with pytest.raises(UserError, match=message):
        SigmoidFocalClassificationLoss(**arguments)
    with pytest.raises(UserError, match=message):
        sigmoid_focal_loss(torch.zeros(1), torch.zeros(1), **arguments)


def test_targets_of_another_shape_are_an_error():
    with pytest.raises(UserError, match=r"\(4, 2\).*\(4, 3\)"):
        SigmoidFocalClassificationLoss()(torch.zeros(4, 3), torch.zeros(4, 2))


def test_the_module_shows_its_numbers():
    text = str(SigmoidFocalClassificationLoss(gamma=1.5, reduction="sum"))
    assert "gamma=1.5, alpha=0.25, reduction='sum'" in text
