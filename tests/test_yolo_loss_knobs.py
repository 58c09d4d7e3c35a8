"""The confidence plug in YOLOLoss, and its knobs: each changes its own terms, or is an error."""

import re
from contextlib import suppress

import pytest
import torch
from torch import nn

from losses.conf import CONF_LOSSES
from losses.yolo_loss import YOLOLoss
from nets.decode import decode
from tests.reference_loss import ANCHORS
from tests.test_yolo_loss import SHAPE, make_loss, make_outputs, make_targets, values
from utils.errors import UserError


class Recorder(nn.Module):
    """Squared error that keeps what it was given and declares what it is told to."""

    def __init__(self, wants_iou=False, wants_mask=False, normalizer="mean", gain=1.0):
        super().__init__()
        self.wants_iou, self.wants_mask = wants_iou, wants_mask
        self.normalizer, self.gain = normalizer, gain
        self.calls = []

    def forward(self, logits, targets, *mask):
        self.calls.append((logits.detach(), targets, *mask))
        self.autocast = torch.is_autocast_enabled(logits.device.type)
        return (logits - targets) ** 2


def recorded(targets=None, **declared):
    """The loss, its terms and the one call of a Recorder."""
    arguments = ", ".join(f"{key}={value!r}" for key, value in declared.items())
    loss = make_loss(
        conf_loss=f"tests.test_yolo_loss_knobs:Recorder({arguments})", ignore_threshold=0.2
    )
    terms = loss(make_outputs(), make_targets() if targets is None else targets)
    (call,) = loss.conf_loss.calls
    return terms, call


def test_the_plug_is_called_once_with_all_cells_in_decodes_order():
    _, (logits, targets) = recorded()
    decoded = decode([raw.detach() for raw in make_outputs()], ANCHORS, SHAPE)
    torch.testing.assert_close(logits.sigmoid(), decoded[..., 4])
    assert set(targets.unique().tolist()) == {0, 1}


def test_a_loss_that_wants_the_mask_gets_the_counted_cells():
    terms, (logits, targets, mask) = recorded(wants_mask=True)
    assert mask.dtype == torch.bool
    assert mask.shape == logits.shape
    assert (~mask).sum() == terms["ignored"] > 0
    assert mask[targets > 0].all()


def test_a_loss_that_wants_iou_gets_the_iou_of_each_positives_box():
    target = torch.tensor([[1, 0, 0.5, 0.5, 0.3, 0.5]])
    _, (_, targets) = recorded(target, wants_iou=True)
    _, (_, binary) = recorded(target)
    ((image, cell),) = binary.nonzero().tolist()
    box = decode([raw.detach() for raw in make_outputs()], ANCHORS, SHAPE)[image, cell, :4]
    truth = torch.tensor([0.35 * 96, 0.25 * 64, 0.65 * 96, 0.75 * 64])
    inner = (torch.minimum(box[2:], truth[2:]) - torch.maximum(box[:2], truth[:2])).clamp(min=0)
    areas = [(corners[2:] - corners[:2]).prod() for corners in (box, truth)]
    iou = inner.prod() / (sum(areas) - inner.prod())
    assert targets[image, cell].item() == pytest.approx(iou.item(), rel=1e-4)
    assert targets.count_nonzero() == 1


def test_an_iou_target_stays_above_zero():
    _, (_, targets) = recorded(make_targets(60), wants_iou=True)
    _, (_, binary) = recorded(make_targets(60))
    assert torch.equal(targets > 0, binary > 0)
    assert targets[targets > 0].min().item() == pytest.approx(1e-3)


def test_iou_target_mixes_one_and_the_iou():
    def targets_of(ratio):
        loss = make_loss(
            conf_loss="tests.test_yolo_loss_knobs:Recorder", ignore_threshold=0.2, iou_target=ratio
        )
        loss(make_outputs(), make_targets())
        return loss.conf_loss.calls[0][1]

    none, half, whole = (targets_of(ratio) for ratio in (0, 0.5, 1))
    assert torch.equal(whole, recorded(wants_iou=True)[1][1])
    assert set(none.unique().tolist()) == {0, 1}
    torch.testing.assert_close(half[none > 0], (1 + whole[none > 0]) / 2, atol=1e-3, rtol=0)
    assert torch.equal(half > 0, none > 0)


@pytest.mark.parametrize(("knob", "term"), [("loc_gain", "loc"), ("cls_gain", "cls")])
def test_a_gain_multiplies_its_term_and_no_other(knob, term):
    outputs, targets = make_outputs(), make_targets()
    plain = values(make_loss()(outputs, targets))
    usual = {"loc_gain": 0.05, "cls_gain": 1.0}[knob]
    changed = values(make_loss(**{knob: 3 * usual})(outputs, targets))
    assert changed.pop(term) == pytest.approx(3 * plain.pop(term))
    assert {k: changed[k] for k in plain if k != "total"} == {
        k: plain[k] for k in plain if k != "total"
    }


def test_aligned_weights_positives_by_their_quality_over_all_scales():
    loss = make_loss(
        assigner="aligned",
        conf_loss="tests.test_yolo_loss_knobs:Recorder",
        iou_target=1,
        scale_xy=(2, 2, 2),
    )
    terms = loss(make_outputs(), make_targets())
    targets = loss.conf_loss.calls[0][1]
    assert terms["positives"] == targets.count_nonzero() > 0
    assert targets.max() <= 1
    assert terms["loc"] <= loss.loc_gain * 3  # a mean of 1 - CIoU, which is below 3
    assert terms["total"].isfinite()


def test_gain_and_normalizer_are_applied_as_declared():
    mean, (logits, targets, mask) = recorded(wants_mask=True, gain=3.0)
    positives, _ = recorded(normalizer="positives", gain=3.0)
    losses = ((logits - targets) ** 2 * mask).split([288, 72, 18], dim=1)
    counts = [part.sum() for part in mask.split([288, 72, 18], dim=1)]
    sums = [balance * part.sum() for balance, part in zip((4, 1, 0.4), losses, strict=True)]
    factor = 5 * 64 * 96 / 416**2
    expected = 3 * factor * sum(s / n for s, n in zip(sums, counts, strict=True))
    torch.testing.assert_close(mean["conf"].detach(), expected)
    torch.testing.assert_close(positives["conf"].detach(), 3 * sum(sums) / (targets > 0).sum())
    nothing, (logits, _) = recorded(torch.zeros(0, 6), normalizer="positives")
    parts = (logits**2).split([288, 72, 18], dim=1)
    expected = sum(b * part.sum() for b, part in zip((4, 1, 0.4), parts, strict=True))
    torch.testing.assert_close(nothing["conf"].detach(), expected)


def test_the_focal_knobs_change_the_confidence_term_and_nothing_else():
    outputs, targets = make_outputs(), make_targets()
    plain = values(make_loss()(outputs, targets))
    seen = {plain["conf"]}
    for knobs in ({}, {"focal_alpha": 0.5}, {"focal_gamma": 1.0}):
        focal = values(make_loss(focal_loss=True, **knobs)(outputs, targets))
        assert (focal["loc"], focal["cls"]) == (plain["loc"], plain["cls"])
        seen.add(focal["conf"])
    assert len(seen) == 4


def test_focal_with_gamma_0_and_alpha_half_is_ten_halves_of_bce():
    outputs, targets = make_outputs(), make_targets()
    focal = make_loss(focal_loss=True, focal_gamma=0, focal_alpha=0.5)(outputs, targets)
    assert focal["conf"].item() == pytest.approx(5 * make_loss()(outputs, targets)["conf"].item())


def test_the_shorthand_is_the_spec():
    outputs, targets = make_outputs(), make_targets()
    short = make_loss(focal_loss=True, focal_alpha=0.4, focal_gamma=1.5)(outputs, targets)
    spec = make_loss(conf_loss="focal(alpha=0.4, gamma=1.5)")(outputs, targets)
    assert values(short) == values(spec)


@pytest.mark.parametrize(
    ("knobs", "terms"),
    [
        ({"box_loss": "giou"}, {"loc"}),
        ({"label_smoothing": 0.1}, {"cls"}),
        ({"cls_loss": "focal"}, {"cls"}),
        ({"cls_loss": "focal(gamma=1)"}, {"cls"}),
        ({"assigner": "iou_threshold"}, {"loc", "conf", "cls"}),
        ({"ignore_threshold": 0.2}, {"conf"}),
        ({"scale_xy": (1.2, 1.1, 1.05)}, {"loc"}),
        ({"balance": (1.0, 1.0, 1.0)}, {"conf"}),
        ({"conf_loss": "focal"}, {"conf"}),
    ],
)
def test_each_knob_changes_its_terms(knobs, terms):
    outputs, targets = make_outputs(), make_targets()
    before, after = (values(make_loss(**k)(outputs, targets)) for k in ({}, knobs))
    changed = {name for name in ("loc", "conf", "cls") if before[name] != after[name]}
    assert changed - {"conf"} == terms - {"conf"}
    assert changed >= terms


def test_anchor_threshold_and_input_shape_change_something():
    outputs, targets = make_outputs(), make_targets()
    few, many = (
        make_loss(assigner="iou_threshold", anchor_threshold=t)(outputs, targets)
        for t in (0.9, 0.1)
    )
    assert few["positives"] < many["positives"]
    small, large = (YOLOLoss(ANCHORS, 3, s)(outputs, targets) for s in ((64, 96), (128, 96)))
    assert large["conf"].item() == pytest.approx(2 * small["conf"].item())
    assert large["cls"] == small["cls"]


def test_cls_focal_is_the_elementwise_focal_without_the_gain_of_the_confidence():
    outputs, targets = make_outputs(), make_targets()
    half = make_loss(cls_loss="focal(alpha=0.5, gamma=0)")(outputs, targets)
    assert half["cls"].item() == pytest.approx(make_loss()(outputs, targets)["cls"].item() / 2)


def test_targets_of_another_shape_and_unknown_classes_do_no_harm():
    outputs = make_outputs()
    with pytest.raises(UserError, match=r"\(3, 5\)"):
        make_loss()(outputs, torch.zeros(3, 5))
    unknown = torch.tensor([[0, 99, 0.5, 0.5, 0.2, 0.2]])
    assert make_loss()(outputs, unknown)["positives"] == 0


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"focal_loss": True, "conf_loss": "focal"}, "both given"),
        ({"conf_loss": "fokal"}, "Did you mean 'focal'"),
        ({"focal_loss": True, "focal_gamma": -1.0}, "gamma"),
        ({"cls_loss": "softmax"}, "cls_loss 'softmax' is unknown"),
        ({"cls_loss": "fo cal"}, "cannot be read"),
        ({"cls_loss": "focal", "label_smoothing": 0.1}, "label_smoothing"),
        ({"cls_loss": "my_losses:Mine"}, "code of your own"),
        ({"cls_loss": "ohem"}, "needs all cells"),
        ({"cls_loss": "varifocal"}, "or boxes"),
        ({"cls_loss": "focal(gain=2)"}, "belong to conf_loss"),
        ({"box_loss": "piou"}, "ciou, siou, eiou"),
        ({"assigner": "all"}, "best_anchor, iou_threshold"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"ignore_threshold": 2.0}, "ignore_threshold"),
        ({"anchor_threshold": float("nan")}, "anchor_threshold"),
        ({"balance": (1.0, 1.0)}, "balance"),
        ({"scale_xy": (1.0,)}, "scale_xy"),
        ({"num_classes": 0}, "num_classes"),
    ],
)
def test_a_bad_argument_is_an_error_that_says_so(knobs, message):
    with pytest.raises(UserError, match=message):
        make_loss(**knobs)


@pytest.mark.parametrize("spec", ["softmax", "fo cal", "my_losses:Mine", "ohem", "varifocal"])
def test_a_wrong_class_loss_is_told_the_class_losses_and_no_others(spec):
    with pytest.raises(UserError) as error:
        make_loss(cls_loss=spec)
    allowed = str(error.value).partition("Allowed: ")[2]
    able = set()
    for name in CONF_LOSSES:
        with suppress(UserError):
            make_loss(cls_loss=name)
            able.add(name)
    assert {"bce", "focal", "poly1"} <= able
    assert "ghm" not in able
    assert set(re.findall(r"(\w+)\(", allowed)) == able
    assert "module:Class" not in allowed
    assert "gain=" not in allowed


def test_a_wrong_key_of_a_class_loss_is_told_the_keys_but_no_setting_of_the_confidence():
    with pytest.raises(UserError, match=r"cls_loss: .*'gama'.*focal\(alpha.*'gamma'") as error:
        make_loss(cls_loss="focal(gama=1)")
    assert "gain" not in str(error.value)


def test_anchors_that_are_not_nine_pairs_are_an_error():
    with pytest.raises(UserError, match="nine"):
        YOLOLoss(ANCHORS[:6], 3, SHAPE)


@pytest.mark.parametrize(
    "outputs",
    [
        make_outputs(num_classes=4),
        make_outputs()[:2],
        make_outputs()[::-1],
        [],
        [raw[0] for raw in make_outputs()],
    ],
)
def test_outputs_that_do_not_fit_are_an_error_that_names_the_classes(outputs):
    with pytest.raises(UserError, match="3 classes need three maps of 24 channels"):
        make_loss()(outputs, make_targets())


def test_constants_follow_the_device_and_stay_out_of_checkpoints():
    loss = make_loss(focal_loss=True)
    assert not loss.state_dict()
    assert {name for name, _ in loss.named_buffers()} == {"anchors", "scales", "balance"}
    assert make_loss().prior_pi is None


class OwnParameter(nn.Module):
    """A plug-in with a weight of its own that does not look at the logits."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, logits, targets):
        return self.weight * torch.ones_like(targets)


class Reduced(nn.Module):
    """The usual slip: reduction left at its default."""

    def forward(self, logits, targets):
        return nn.functional.binary_cross_entropy_with_logits(logits, targets)


def test_a_plug_that_reduces_is_told_how_not_to():
    with pytest.raises(UserError, match=r'Reduced returns shape \(\) .* reduction="none"'):
        make_loss(conf_loss="tests.test_yolo_loss_knobs:Reduced")


def test_a_plug_that_ignores_the_logits_has_no_gradient_to_share_but_works():
    loss = make_loss(conf_loss="tests.test_yolo_loss_knobs:OwnParameter")
    for requires_grad in (False, True):
        outputs = [raw.detach().requires_grad_(requires_grad) for raw in make_outputs()]
        terms = loss(outputs, make_targets(), cells=True)
        assert terms["total"].isfinite()
        assert ("groups" in terms) == requires_grad
    assert not terms["groups"][..., 1].any()
    assert terms["groups"][..., 0].any()
