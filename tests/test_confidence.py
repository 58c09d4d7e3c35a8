"""The confidence plug: the contract of every registered loss, and how specs are read."""

import sys
from typing import Literal

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from losses.conf import (
    CONF_LOSSES,
    ConfSettings,
    build_conf_loss,
    conf_loss,
    conf_settings,
)
from losses.conf.focal import Focal
from losses.focal import sigmoid_focal_loss
from utils.errors import UserError

OF_A_TEST = "brier_of_a_test"  # registered below: the contract is for a user's losses, too
EVERY = pytest.mark.parametrize("name", sorted({*CONF_LOSSES, OF_A_TEST}))

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


class Brier(nn.Module):
    def forward(self, logits, targets):
        return (logits.float().sigmoid() - targets) ** 2


class Steps(nn.Module):
    def __init__(self, steps: int = 3, kind: Literal["up", "down"] = "up", gain=2):
        super().__init__()
        self.kind, self.steps, self.gain_of_its_own = kind, steps, gain

    def forward(self, logits, targets):
        return logits - targets


@pytest.fixture(scope="module", autouse=True)
def registered():
    conf_loss(OF_A_TEST)(Brier)
    yield
    del CONF_LOSSES[OF_A_TEST]


def run(loss, logits, targets, mask=None):
    """As YOLOLoss calls it; without a mask all cells are counted."""
    if not conf_settings(loss).wants_mask:
        return loss(logits, targets)
    mask = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    return loss(logits, targets, mask)


def losses_of(name, logits, targets, mask=None):
    return run(build_conf_loss(name), logits, targets, mask)


def random_batch(shape=(2, 60)):
    """Logits, targets 0, 1 or between, and a mask with some cells uncounted."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator) * 4
    targets = (torch.rand(shape, generator=generator) * 2 - 1).clamp(0, 0.5) * 2
    return logits, targets, torch.rand(shape, generator=generator) < 0.8


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    (tmp_path / "my_conf_losses.py").write_text(USER_FILE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_conf_losses", None)


@EVERY
@pytest.mark.parametrize("shape", [(0,), (), (5,), (2, 3, 4), (3, 0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_losses_are_float32_in_the_shape_of_the_logits(name, shape, dtype):
    logits = torch.zeros(shape, dtype=dtype, requires_grad=True)
    losses = losses_of(name, logits, torch.ones(shape))
    assert losses.shape == shape
    assert losses.dtype == torch.float32
    losses.sum().backward()
    assert logits.grad.shape == shape


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_extreme_cell_does_not_poison_the_step(name, dtype):
    cells = [-1e4, -200.0, -30.0, 0.0, 30.0, 200.0, 1e4]
    logits = torch.tensor(cells * 3, dtype=dtype, requires_grad=True)
    losses = losses_of(name, logits, torch.tensor([0.0, 0.5, 1.0]).repeat_interleave(len(cells)))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logits.grad.isfinite().all()


@EVERY
def test_a_right_and_certain_cell_costs_nothing_and_a_wrong_one_costs_something(name):
    targets = torch.tensor([1.0, 0.0, 0.0])
    right = losses_of(name, torch.tensor([30.0, -30.0, -30.0]), targets)
    assert right.abs().max() < 1e-6
    wrong = losses_of(name, torch.tensor([-2.0, 2.0, -30.0]), targets)
    assert (wrong[:2] > 0.1).all()


@EVERY
def test_what_is_not_counted_changes_nothing_that_is(name):
    logits, targets, mask = random_batch()
    losses = losses_of(name, logits, targets, mask)
    others = torch.where(mask, logits, 1e4 * torch.randn_like(logits))
    changed = losses_of(name, others, targets, mask)
    assert torch.equal(losses[mask], changed[mask])
    assert changed.isfinite().all()


@EVERY
def test_a_loss_without_a_mask_counts_every_cell(name):
    logits, targets, _ = random_batch()
    expected = losses_of(name, logits, targets)
    torch.testing.assert_close(build_conf_loss(name)(logits, targets), expected)


@EVERY
def test_a_step_asks_the_device_for_no_value(name):
    loss, batch = build_conf_loss(name), random_batch()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # shapes without values
        logits, targets, mask = map(mode.from_tensor, batch)
        losses = run(loss, logits.requires_grad_(), targets, mask)
        losses.sum().backward()
        assert logits.grad.shape == batch[0].shape


@EVERY
def test_evaluation_leaves_the_state_and_a_saved_state_continues_alike(name):
    logits, targets, mask = random_batch()
    loss, copy = build_conf_loss(name), build_conf_loss(name)
    run(loss, logits - 1, targets, mask)
    copy.load_state_dict(loss.state_dict())
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    run(loss.eval(), logits + 1, targets, ~mask)
    assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())
    for mode in (True, False):
        ours, theirs = (run(x.train(mode), logits, targets, mask) for x in (loss, copy))
        assert torch.equal(ours, theirs)


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
def test_every_loss_takes_the_declared_settings_as_keys(name):
    usual = conf_settings(build_conf_loss(name))
    changed = build_conf_loss(f"{name}(gain=3, normalizer='positives', prior_pi=0.2)")
    expected = usual._replace(gain=3, normalizer="positives", prior_pi=0.2)
    assert conf_settings(changed) == expected
    assert conf_settings(build_conf_loss(name)) == usual  # the class itself is as it was
    assert conf_settings(build_conf_loss(f"{name}(prior_pi=None)")).prior_pi is None
    logits, targets, mask = random_batch()
    losses = losses_of(name, logits, targets, mask)
    assert torch.equal(run(changed, logits, targets, mask), losses)  # never inside forward


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
        ("", "Allowed: .*bce\\(\\), .*focal\\(alpha=0.25, gamma=2.0\\)"),
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
        ("focal(alpha='high')", 'a finite number or "auto"'),
        ("focal(gamma='auto')", "a finite number\\."),
        ("focal(alpha=[])", '"auto"'),
        ("bce(gamma=1)", "Every loss also takes gain=, normalizer=, prior_pi="),
        ("bce(gian=1)", "Did you mean 'gain'"),
        ("fokal", "Every loss also takes gain="),
        ("bce(gain=0)", "above 0"),
        ("bce(gain='2')", "above 0"),
        ("bce(gain=True)", "above 0"),
        ("bce(gain=1e999)", "above 0"),
        ("bce(normalizer='sum')", "Allowed: mean, positives"),
        ("bce(normalizer=['mean'])", "Allowed: mean, positives"),
        ("bce(prior_pi=1)", "0 < pi < 1"),
        ("bce(prior_pi='low')", "0 < pi < 1"),
        ("tests.test_confidence:Steps(steps=2.5)", "a whole number"),
        ("tests.test_confidence:Steps(steps=True)", "a whole number"),
        ("tests.test_confidence:Steps(kind='left')", 'must be "up" or "down"'),
        ("tests.test_confidence:Steps(kind=1)", 'must be "up" or "down"'),
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


def test_a_users_class_is_found_by_its_registered_name_in_its_own_file_only(user_file):
    text = "from losses.conf import conf_loss\n" + USER_FILE.replace(
        "class Scaled", '@conf_loss("scaled_error")\nclass Scaled'
    )
    (user_file / "my_conf_losses.py").write_text(text)
    try:
        loss = build_conf_loss("my_conf_losses:scaled_error(factor=2)")
        assert (type(loss).__name__, loss.factor) == ("Scaled", 2)
        assert type(build_conf_loss("scaled_error(factor=3)")) is type(loss)
        with pytest.raises(UserError, match=r"no nn.Module named 'focal'"):
            build_conf_loss("my_conf_losses:focal")
    finally:
        CONF_LOSSES.pop("scaled_error", None)


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


def test_a_users_own_gain_is_an_argument_of_its_constructor():
    loss = build_conf_loss("tests.test_confidence:Steps(gain=5, kind='down', prior_pi=0.1)")
    assert (loss.gain_of_its_own, loss.kind) == (5, "down")
    assert conf_settings(loss) == ConfSettings(prior_pi=0.1)


def test_registering_is_one_decorator_and_a_name_is_taken_once():
    assert type(build_conf_loss(OF_A_TEST)) is Brier
    assert conf_loss(OF_A_TEST)(Brier) is Brier  # its module may be imported again
    with pytest.raises(UserError, match=f"{OF_A_TEST!r} is taken"):
        conf_loss(OF_A_TEST)(nn.Identity)
    namesake = type("Focal", (nn.Module,), {"__module__": __name__, "__qualname__": "Focal"})
    with pytest.raises(UserError, match=r"'focal' is taken by losses\.conf\.focal\.Focal"):
        conf_loss("focal")(namesake)


@pytest.mark.parametrize(
    ("name", "value"),
    [("normalizer", "sum"), ("gain", 0), ("gain", float("nan")), ("prior_pi", 1.0)],
)
def test_an_impossible_declaration_is_an_error(name, value):
    loss = build_conf_loss("bce")
    setattr(loss, name, value)
    with pytest.raises(UserError, match=name):
        conf_settings(loss)
