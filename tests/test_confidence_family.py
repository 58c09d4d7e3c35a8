"""The elementwise confidence losses against formulas on probabilities, identities and limits."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss as torchvision_focal

from losses.conf import ConfSettings, build_conf_loss, conf_settings
from utils.errors import UserError


def bce(p, y):
    return -np.log(np.where(y > 0, p**y * (1 - p) ** (1 - y), 1 - p))


def balanced(p, y, alpha=0.75):
    return bce(p, y) * (alpha * (y > 0) + (1 - alpha) * (y == 0))


def quality(p, y, beta=2.0):
    return np.sqrt((y - p) ** 2) ** beta * bce(p, y)


def varifocal(p, y, alpha=0.75, gamma=2.0):
    return np.where(y > 0, y * bce(p, y), -alpha * p**gamma * np.log(1 - p))


def poly1(p, y, epsilon=1.0):
    return bce(p, y) + epsilon - epsilon * np.where(y > 0, p, 1 - p)


def poly1_focal(p, y, alpha=0.25, gamma=2.0, epsilon=1.0):
    p_t = np.where(y > 0, p, 1 - p)
    return balanced(p, y, alpha) * np.abs(y - p) ** gamma + epsilon * (1 - p_t) ** (gamma + 1)


def asymmetric(p, y, gamma_positive=1.0, gamma_negative=4.0, margin=0.05):
    m = np.where(p > margin, p - margin, 0.0)
    positive = (1 - p) ** gamma_positive * np.log(p)
    return -np.where(y > 0, positive, m**gamma_negative * np.log(1 - m))


CASES = [
    ("balanced_bce", balanced, {}),
    ("balanced_bce", balanced, {"alpha": 0.1}),
    ("balanced_bce", balanced, {"alpha": 1}),
    ("quality_focal", quality, {}),
    ("quality_focal", quality, {"beta": 0.5}),
    ("quality_focal", quality, {"beta": 1}),
    ("varifocal", varifocal, {}),
    ("varifocal", varifocal, {"alpha": 1.5, "gamma": 0.7}),
    ("varifocal", varifocal, {"alpha": 0, "gamma": 0}),
    ("poly1", poly1, {}),
    ("poly1", poly1, {"epsilon": -0.5}),
    ("poly1", poly1, {"epsilon": 6}),
    ("poly1_focal", poly1_focal, {}),
    ("poly1_focal", poly1_focal, {"alpha": 0.6, "gamma": 0.5, "epsilon": -1}),
    ("poly1_focal", poly1_focal, {"gamma": 0, "epsilon": 3}),
    ("asymmetric", asymmetric, {}),
    ("asymmetric", asymmetric, {"gamma_positive": 0, "gamma_negative": 0, "margin": 0.3}),
    ("asymmetric", asymmetric, {"gamma_positive": 0.5, "gamma_negative": 0.5, "margin": 0}),
    ("asymmetric", asymmetric, {"gamma_positive": 3, "gamma_negative": 1.5, "margin": 0.9}),
]
EVERY_CASE = pytest.mark.parametrize(("name", "formula", "values"), CASES)


def build(name, values):
    return build_conf_loss(f"{name}({', '.join(f'{k}={v}' for k, v in values.items())})")


def batch(dtype=torch.float64):
    """Every pair of a logit in -9..9 and a target 0, .2, .7 or 1."""
    logits, targets = torch.linspace(-9, 9, 25, dtype=dtype), torch.tensor([0, 0.2, 0.7, 1.0])
    logits, targets = torch.meshgrid(logits, targets.to(dtype), indexing="ij")
    return logits.clone().requires_grad_(), targets


def bce_of(logits, targets):
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


@EVERY_CASE
def test_the_value_is_the_formula(name, formula, values):
    logits, targets = batch()
    p = 1 / (1 + np.exp(-logits.detach().numpy()))
    expected = torch.from_numpy(formula(p, targets.numpy(), **values))
    loss = build(name, values)
    torch.testing.assert_close(loss(logits, targets).detach(), expected, rtol=1e-9, atol=1e-12)
    in_float32 = loss(logits.float(), targets.float()).detach()
    torch.testing.assert_close(in_float32.double(), expected, rtol=1e-4, atol=1e-6)


@EVERY_CASE
def test_the_gradient_is_that_of_the_value(name, formula, values):
    logits, targets = batch()
    loss = build(name, values)
    assert torch.autograd.gradcheck(lambda z: loss(z, targets), (logits,))


@EVERY_CASE
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_any_logit_has_a_finite_loss_and_gradient(name, formula, values, dtype):
    edges = [-1e4, -750, -104, -89, -17, 0, 17, 89, 104, 750, 1e4]
    logits = torch.tensor(edges * 3, dtype=dtype, requires_grad=True)
    targets = torch.tensor([0, 0.4, 1]).repeat_interleave(len(edges))
    losses = build(name, values)(logits, targets)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("spec", "scale"),
    [
        ("balanced_bce(alpha=0.5)", 0.5),
        ("balanced_bce(alpha=-1)", 1),
        ("focal(alpha=0.5, gamma=0)", 0.5),
        ("focal_pi(alpha=-1, gamma=0)", 1),
        ("quality_focal(beta=0)", 1),
        ("poly1(epsilon=0)", 1),
        ("poly1_focal(alpha=-1, gamma=0, epsilon=0)", 1),
    ],
)
def test_without_its_own_part_a_loss_is_bce(spec, scale):
    logits, targets = batch()
    torch.testing.assert_close(build_conf_loss(spec)(logits, targets), scale * bce_of(*batch()))


def test_varifocal_is_bce_at_a_perfect_box_and_without_alpha_and_gamma():
    logits, _ = batch()
    ones, zeros = torch.ones_like(logits), torch.zeros_like(logits)
    torch.testing.assert_close(build_conf_loss("varifocal")(logits, ones), bce_of(logits, ones))
    plain = build_conf_loss("varifocal(alpha=1, gamma=0)")
    torch.testing.assert_close(plain(logits, zeros), bce_of(logits, zeros))


def test_asymmetric_without_gammas_and_margin_is_bce_even_where_p_rounds_to_1():
    logits = torch.tensor([-1e4, -3, 0, 3, 40, 1e4], requires_grad=True)
    loss = build_conf_loss("asymmetric(gamma_positive=0, gamma_negative=0, margin=0)")
    for target in (torch.zeros(6), torch.ones(6)):
        expected = bce_of(logits, target)
        torch.testing.assert_close(loss(logits, target), expected)
        ours, theirs = (
            torch.autograd.grad(x.sum(), logits)[0] for x in (loss(logits, target), expected)
        )
        torch.testing.assert_close(ours, theirs)


def test_asymmetric_drops_negatives_below_the_margin():
    logits = torch.tensor([0.049, 0.051]).logit().requires_grad_()
    losses = build_conf_loss("asymmetric(gamma_negative=0)")(logits, torch.zeros(2))
    losses.sum().backward()
    assert losses[0] == logits.grad[0] == 0
    assert losses[1] > 0
    assert logits.grad[1] > 0


def test_asymmetric_takes_any_target_above_0_as_a_whole_positive():
    logits, _ = batch()
    loss = build_conf_loss("asymmetric")
    tiny, ones = torch.full_like(logits, 1e-3), torch.ones_like(logits)
    assert torch.equal(loss(logits, tiny), loss(logits, ones))


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2), (0.7, 0.5), (-1, 1), (0.5, 0)])
def test_the_focal_ones_equal_torchvision(alpha, gamma):
    logits, _ = batch()
    targets = (torch.arange(logits.numel()).view_as(logits) % 3 == 0).double()
    expected = torchvision_focal(logits, targets, alpha=alpha, gamma=gamma)
    values = {"alpha": alpha, "gamma": gamma}
    for name, more in (("focal", {}), ("focal_pi", {}), ("poly1_focal", {"epsilon": 0})):
        torch.testing.assert_close(build(name, values | more)(logits, targets), expected)
    if gamma == 0:
        balanced_bce = build("balanced_bce", {"alpha": alpha})
        torch.testing.assert_close(balanced_bce(logits, targets), expected)


def test_a_box_of_quality_q_rests_where_its_objectness_is_q():
    q = torch.tensor([0.2, 0.5, 0.9])
    for name in ("quality_focal", "varifocal"):
        logits = q.logit().requires_grad_()
        build_conf_loss(name)(logits, q).sum().backward()
        torch.testing.assert_close(logits.grad, torch.zeros(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("bce", ConfSettings()),
        ("balanced_bce", ConfSettings()),
        ("focal", ConfSettings(gain=10)),
        ("focal_pi", ConfSettings(normalizer="positives", prior_pi=0.01)),
        (
            "quality_focal",
            ConfSettings(gain=0.1, normalizer="positives", prior_pi=0.01, wants_iou=True),
        ),
        (
            "varifocal",
            ConfSettings(gain=0.1, normalizer="positives", prior_pi=0.01, wants_iou=True),
        ),
        ("ghm", ConfSettings(gain=0.1, wants_mask=True)),
        ("poly1", ConfSettings()),
        ("poly1_focal", ConfSettings(gain=0.1, normalizer="positives", prior_pi=0.01)),
        ("asymmetric", ConfSettings(gain=0.1, normalizer="positives")),
        ("ohem", ConfSettings(gain=0.1, normalizer="positives", wants_mask=True)),
    ],
)
def test_each_declares_what_belongs_to_it(name, settings):
    assert conf_settings(build_conf_loss(name)) == settings


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("balanced_bce(alpha=2)", "0 to 1"),
        ("focal_pi(gamma=-1)", "or more"),
        ("quality_focal(beta=-0.1)", "beta is -0.1. Give 0"),
        ("varifocal(alpha=-1)", "alpha is -1. Give 0 or more"),
        ("varifocal(gamma=-1)", "gamma is -1. Give 0"),
        ("poly1_focal(alpha=3)", "0 to 1"),
        ("poly1_focal(gamma=-1)", "or more"),
        ("asymmetric(gamma_positive=-1)", "gamma_positive is -1"),
        ("asymmetric(gamma_negative=-1)", "gamma_negative is -1"),
        ("asymmetric(margin=1)", "below 1"),
        ("asymmetric(margin=-0.1)", "0 .* or more"),
        ("ghm(bins=0)", "whole number from 1"),
        ("ghm(bins=2.5)", "whole number"),
        ("ghm(momentum=1)", "below 1"),
        ("ghm(momentum=-0.5)", "0 .* or more"),
        ("ohem(ratio=0)", "above 0"),
    ],
)
def test_an_impossible_value_is_an_error_that_says_what_is_allowed(spec, message):
    with pytest.raises(UserError, match=message):
        build_conf_loss(spec)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("name", "key"),
    [
        *(("quality_focal", "beta"), ("varifocal", "alpha"), ("varifocal", "gamma")),
        *(("poly1", "epsilon"), ("poly1_focal", "epsilon"), ("asymmetric", "margin")),
        *(("asymmetric", "gamma_negative"), ("ghm", "momentum"), ("ohem", "ratio")),
        *(("balanced_bce", "alpha"), ("focal", "gamma")),
    ],
)
def test_a_value_that_is_not_finite_is_an_error_without_a_spec_too(name, key, value):
    with pytest.raises(UserError, match=key):
        type(build_conf_loss(name))(**{key: value})
