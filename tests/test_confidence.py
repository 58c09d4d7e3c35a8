"""The confidence plug: the contract of every registered loss, and how specs are read."""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from losses.confidence import (
    CONF_LOSSES,
    ConfSettings,
    Focal,
    build_conf_loss,
    conf_loss,
    conf_settings,
)
from losses.focal import sigmoid_focal_loss
from utils.errors import UserError

EVERY = pytest.mark.parametrize("name", sorted(CONF_LOSSES))

USER_FILE = """
from torch import nn

class Scaled(nn.Module):
    wants_iou = True

    def __init__(self, factor, offset=0.0):
        super().__init__()
        self.factor, self.offset = factor, offset

    def forward(self, logits, targets):
        return self.factor * (logits - targets) ** 2 + self.offset

not_a_module = 3
"""


def losses_of(name, logits, targets):
    """Whole batch counted, whatever the loss wants."""
    loss = build_conf_loss(name)
    mask = torch.ones_like(targets, dtype=torch.bool)
    return loss(logits, targets, mask) if conf_settings(loss).wants_mask else loss(logits, targets)


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    (tmp_path / "my_conf_losses.py").write_text(USER_FILE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_conf_losses", None)


@EVERY
@pytest.mark.parametrize("shape", [(0,), (), (5,), (2, 3, 4)])
def test_losses_keep_the_shape_of_the_logits(name, shape):
    losses = losses_of(name, torch.zeros(shape), torch.ones(shape))
    assert losses.shape == shape
    assert losses.dtype == torch.float32


@EVERY
def test_one_extreme_cell_does_not_poison_the_step(name):
    logits = torch.tensor([-1e4, -1e4, 0.0, 1e4, 1e4, 0.3], requires_grad=True)
    losses = losses_of(name, logits, torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.5]))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logits.grad.isfinite().all()


@EVERY
def test_positives_are_pulled_up_and_negatives_down(name):
    logits = torch.tensor([0.5, 0.5], requires_grad=True)
    losses_of(name, logits, torch.tensor([1.0, 0.0])).sum().backward()
    assert logits.grad[0] < 0 < logits.grad[1]


@EVERY
def test_a_loss_that_looks_across_no_cells_sees_each_alone(name):
    if conf_settings(build_conf_loss(name)).wants_mask:
        return
    logits, targets = torch.randn(6), torch.tensor([1.0, 0, 0, 0.4, 0, 1])
    alone = [losses_of(name, z, y) for z, y in zip(logits, targets, strict=True)]
    torch.testing.assert_close(losses_of(name, logits, targets), torch.stack(alone))


@EVERY
def test_what_a_loss_declares_is_possible(name):
    settings = conf_settings(build_conf_loss(name))
    assert isinstance(settings, ConfSettings)


def test_bce_and_focal_are_what_their_names_say():
    logits, targets = torch.randn(50) * 5, torch.randint(0, 2, (50,)).float()
    bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    torch.testing.assert_close(build_conf_loss("bce")(logits, targets), bce)
    focal = build_conf_loss("focal(gamma=1, alpha=0.4)")
    expected = sigmoid_focal_loss(logits, targets, alpha=0.4, gamma=1)
    torch.testing.assert_close(focal(logits, targets), expected)
    assert conf_settings(build_conf_loss("bce")) == ConfSettings()
    assert conf_settings(focal) == ConfSettings(gain=10)


def test_bce_learns_from_a_confidently_missed_object():
    logits = torch.tensor([-20.0], requires_grad=True)
    build_conf_loss("bce")(logits, torch.ones(1)).sum().backward()
    assert logits.grad.item() == pytest.approx(-1)


@pytest.mark.parametrize(
    ("spec", "alpha", "gamma"),
    [
        ("focal", 0.25, 2),
        (" focal ( gamma = 1.5 ) ", 0.25, 1.5),
        ("focal()", 0.25, 2),
        ("focal(alpha=-1, gamma=0,)", -1, 0),
    ],
)
def test_a_spec_gives_name_and_values(spec, alpha, gamma):
    loss = build_conf_loss(spec)
    assert type(loss) is Focal
    assert (loss.alpha, loss.gamma) == (alpha, gamma)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "Allowed: bce\\(\\), .*focal\\(alpha=0.25, gamma=2.0\\)"),
        ("fokal", "Did you mean 'focal'"),
        ("nothing_like_it", "Allowed: .*module:Class"),
        ("focal(gama=1)", "Did you mean 'gamma'"),
        ("bce(gamma=1)", "no key of bce\\(\\)"),
        ("focal(2)", "focal\\(alpha=0.25, gamma=2.0\\)"),
        ("focal(gamma=2", "cannot be read"),
        ("focal(gamma=2)(3)", "cannot be read"),
        ("focal(gamma=1)(alpha=1)", "cannot be read"),
        ("focal(gamma=1, gamma=2)", "cannot be read"),
        ("focal(**{'gamma': 1})", "no key"),
        ("focal(*[1])", "cannot be read"),
        ("focal(gamma=__import__('os').getpid())", "plain numbers"),
        ("focal(gamma=1 + 1)", "plain numbers"),
        ("focal(gamma=1e999)", "finite number"),
        ("focal(gamma='2')", "finite number"),
        ("focal(gamma=True)", "finite number"),
        ("focal(gamma=-2)", "or more"),
        ("focal(alpha=7)", "0 to 1"),
        ("no_such_module:Loss", "cannot import 'no_such_module'"),
        ("math:pi", "no nn.Module named 'pi'"),
    ],
)
def test_a_wrong_spec_is_an_error_that_shows_what_is_allowed(spec, message):
    with pytest.raises(UserError, match=message):
        build_conf_loss(spec)


def test_a_users_class_is_found_in_the_working_directory_during_its_import_only(user_file):
    before = list(sys.path)
    loss = build_conf_loss("my_conf_losses:Scaled(factor=3)")
    assert sys.path == before
    assert loss(torch.tensor([2.0]), torch.tensor([1.0])).item() == 3
    assert conf_settings(loss) == ConfSettings(wants_iou=True)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("my_conf_losses:Scaled", "needs factor"),
        ("my_conf_losses:Absent", "no nn.Module named 'Absent'"),
        ("my_conf_losses:not_a_module", "no nn.Module"),
        ("my_conf_losses:Scaled(factor=1, offset='x')", "finite number"),
    ],
)
def test_a_users_class_is_checked_like_ours(user_file, spec, message):
    with pytest.raises(UserError, match=message):
        build_conf_loss(spec)


def test_a_users_file_that_cannot_be_read_is_named(user_file):
    (user_file / "half_written.py").write_text("class Loss(:\n")
    with pytest.raises(UserError, match=r"half_written\.py, line 1"):
        build_conf_loss("half_written:Loss")


def test_registering_is_one_decorator_and_a_name_is_taken_once(monkeypatch):
    monkeypatch.delitem(CONF_LOSSES, "squared", raising=False)

    @conf_loss("squared")
    class Squared(nn.Module):
        def forward(self, logits, targets):
            return (logits - targets) ** 2

    try:
        assert type(build_conf_loss("squared")) is Squared
        with pytest.raises(UserError, match="'squared' is taken"):
            conf_loss("squared")(nn.Identity)
    finally:
        del CONF_LOSSES["squared"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("normalizer", "sum"), ("gain", 0), ("gain", float("nan")), ("prior_pi", 1.0)],
)
def test_an_impossible_declaration_is_an_error(name, value):
    loss = build_conf_loss("bce")
    setattr(loss, name, value)
    with pytest.raises(UserError, match=name):
        conf_settings(loss)
