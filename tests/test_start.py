import math

import numpy as np
import pytest
import torch

from data.voc import Sample
from engine.start import (
    SCRATCH_SCALE_XY,
    build_network,
    choose_anchors,
    choose_scale_xy,
    other_decode,
    set_prior,
)
from nets.decode import YOLOV4_ANCHORS
from nets.yolo import OBJECTNESS, SCRATCH_PRIOR
from tests.weight_files import ANCHORS, SMALL, same, small_model
from utils.errors import UserError
from weights.checkpoint import save_checkpoint
from weights.darknet import layout_of_cut, save_darknet_weights, size_of
from weights.loading import LoadReport

NAMES = ("cat", "dog")


def report(heads_loaded=True, **known):
    return LoadReport("a file", ["x"], {}, {}, heads_loaded, **known)


def build(weights="", names=NAMES, weights_classes=""):
    torch.manual_seed(1)
    paths = {"weights": str(weights), "weights_classes": str(weights_classes)}
    return build_network(names, **SMALL, **paths)


@pytest.fixture(scope="module")
def donor():
    return small_model(len(NAMES))


@pytest.fixture(scope="module")
def darknet(donor, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "a.weights"
    save_darknet_weights(donor, path)
    return path


def objectness(model):
    """Probabilities that the biases of the heads give, one for each anchor."""
    heads = (model.head_p3, model.head_p4, model.head_p5)
    biases = [head.output.bias.view(3, -1)[:, OBJECTNESS] for head in heads]
    return torch.cat(biases).sigmoid().tolist()


def samples_of(*sides, image_hw=(200, 400)):
    """An image with square objects of these sides, the last one difficult."""
    boxes = np.array([[0, 0, side, side] for side in sides], np.float32).reshape(-1, 4)
    difficult = np.arange(len(sides)) == len(sides) - 1
    return [Sample("", "a", image_hw, np.zeros(len(sides), np.int64), boxes, difficult)]


@pytest.mark.parametrize(
    ("sides", "factor"),
    [
        ((36, 40, 48, 5), 20 / math.sqrt(40 * 28)),  # letterboxed to half the size
        ((60, 60, 5), 1),  # 30 pixels are near enough
        ((300, 300, 5), 1),
        ((4, 4, 5), 0.2),
        ((), 1),
        ((5,), 1),  # a difficult object alone
    ],
)
def test_anchors_shrink_with_the_median_object(sides, factor, capsys):
    found = choose_anchors("", samples_of(*sides), (128, 200), report=None, resume=None)
    if factor == 1:
        assert found == YOLOV4_ANCHORS
        assert capsys.readouterr().out == ""
    else:
        for anchor, stock in zip(found, YOLOV4_ANCHORS, strict=True):
            assert anchor == pytest.approx([side * factor for side in stock], abs=0.051)
        assert f"YOLOv4's x {factor:.2f}" in capsys.readouterr().out


def test_anchors_of_a_file_of_a_resumed_run_and_of_loaded_heads_come_first(tmp_path):
    own = [[1.0, 2.0]] * 9
    (tmp_path / "own.txt").write_text("1,2 " * 9)
    few, shape = samples_of(4, 4, 5), (128, 200)

    def chosen(path="", **known):
        return choose_anchors(str(path), few, shape, **{"report": None, "resume": None, **known})

    expected = tuple(map(tuple, own))
    assert chosen(tmp_path / "own.txt", resume={"anchors": YOLOV4_ANCHORS}) == expected
    assert chosen(resume={"anchors": own}, report=report()) == expected
    assert chosen(report=report(anchors=own)) == expected
    assert chosen(report=report()) == YOLOV4_ANCHORS  # darknet's file does not say
    backbone = report(heads_loaded=False, anchors=own)
    assert chosen(report=backbone)[0] == (2.4, 3.2)


@pytest.mark.parametrize(
    ("given", "source", "resume", "expected"),
    [
        (None, None, None, SCRATCH_SCALE_XY),
        (None, report(), None, SCRATCH_SCALE_XY),
        (None, report(scale_xy=(1.0, 1.0, 1.0)), None, (1.0, 1.0, 1.0)),
        ((1.5, 1.4, 1.3), report(scale_xy=(1.0, 1.0, 1.0)), None, (1.5, 1.4, 1.3)),
        (None, None, {"scale_xy": [1.0, 2.0, 3.0]}, (1.0, 2.0, 3.0)),
        ((1.5, 1.4, 1.3), None, None, (1.5, 1.4, 1.3)),
    ],
)
def test_the_reach_is_the_given_one_else_that_of_the_weights_else_yolov4s(
    given, source, resume, expected
):
    assert choose_scale_xy(given, source, resume) == expected


def test_weights_without_heads_leave_the_reach_to_the_default():
    cut = report(scale_xy=(1.2, 1.1, 1.05), heads_loaded=False)
    assert choose_scale_xy(None, cut, None) == SCRATCH_SCALE_XY


def test_the_forks_initial_weights_are_normal(tmp_path):
    model, _ = build_network(
        NAMES, width=0.25, depth=0.1, weights="", weights_classes="", init="normal"
    )
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    kernels = torch.cat([p.flatten() for p in model.parameters() if p.ndim == 4])
    gammas = torch.cat([m.weight for m in norms])
    assert kernels.std().item() == pytest.approx(0.02, rel=0.02)
    assert (gammas.mean().item(), gammas.std().item()) == pytest.approx((1, 0.02), abs=0.01)
    assert objectness(model) == [0.5] * 9
    with pytest.raises(UserError, match="init 'xavier' is unknown"):
        build_network(NAMES, width=0.1, depth=0.1, weights="", weights_classes="", init="xavier")


def test_a_reach_that_no_centre_can_have_is_refused():
    with pytest.raises(UserError, match=r"scale_xy 1\.0 0\.0 1\.0"):
        choose_scale_xy((1.0, 0.0, 1.0), None, None)


def test_from_scratch_there_is_no_report_and_nothing_is_said(capsys):
    model, found = build()
    assert found is None
    assert model.num_classes == len(NAMES)
    assert capsys.readouterr().out == ""


def test_class_names_of_weights_that_are_not_given_are_refused(tmp_path):
    (tmp_path / "names.txt").write_text("cat")
    with pytest.raises(UserError, match=r"--weights_classes .*names\.txt"):
        build(weights_classes=tmp_path / "names.txt")


def test_weights_are_loaded_and_the_report_is_printed(darknet, donor, capsys):
    model, found = build(darknet)
    assert same(model, donor.state_dict())
    assert (found.heads_loaded, found.scale_xy) == (True, (1.2, 1.1, 1.05))
    assert capsys.readouterr().out == f"{found}\n"
    assert str(darknet) in str(found)


def test_the_outputs_of_classes_that_the_file_shares_are_carried_by_name(darknet, donor, tmp_path):
    (tmp_path / "names.txt").write_text("dog\nbird\n")
    fresh, _ = build()
    model, found = build(darknet, weights_classes=tmp_path / "names.txt")
    assert found.heads_loaded
    assert "1 of 2 classes carried over: dog; new: cat" in str(found)
    new, theirs, ours = (m.head_p4.output.weight.view(3, 7, -1) for m in (fresh, donor, model))
    assert torch.equal(ours[:, :5], theirs[:, :5])
    assert torch.equal(ours[:, 6], theirs[:, 5])  # dog: the first class there, the second here
    assert torch.equal(ours[:, 5], new[:, 5])


def test_names_for_another_number_of_classes_than_the_file_has_are_refused(darknet, tmp_path):
    (tmp_path / "names.txt").write_text("dog\nbird\ncow\n")
    with pytest.raises(UserError, match="for 2 classes, but 3 names: dog"):
        build(darknet, weights_classes=tmp_path / "names.txt")


def test_names_beside_a_checkpoint_that_says_others_are_refused(donor, tmp_path):
    save_checkpoint(tmp_path / "a.pt", {"model": donor.state_dict(), "class_names": list(NAMES)})
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    with pytest.raises(UserError, match="stores its own classes, cat, dog"):
        build(tmp_path / "a.pt", weights_classes=tmp_path / "names.txt")


@pytest.mark.parametrize(("part", "names"), [("137", NAMES), ("whole", ("a", "b", "c"))])
def test_new_heads_start_at_the_prior_of_the_loss_and_it_is_said(
    darknet, donor, tmp_path, capsys, part, names
):
    content = darknet.read_bytes()
    if part != "whole":
        content = content[: 20 + size_of(layout_of_cut(donor, part))]
    (tmp_path / "b.weights").write_bytes(content)
    model, found = build(tmp_path / "b.weights", names)
    assert objectness(model) == pytest.approx([SCRATCH_PRIOR] * 9)
    set_prior(model, 0.2, found)
    assert objectness(model) == pytest.approx([0.2] * 9)
    assert "heads: set to 0.2 (the loss declares 0.2)" in capsys.readouterr().out


@pytest.mark.parametrize("in_file", [None, "dog\nbird\n"])
def test_heads_that_were_loaded_keep_their_objectness_and_it_is_said(
    darknet, donor, tmp_path, capsys, in_file
):
    donor_objectness = objectness(donor)
    if in_file:
        (tmp_path / "names.txt").write_text(in_file)
    model, found = build(darknet, weights_classes=tmp_path / "names.txt" if in_file else "")
    set_prior(model, 0.2, found)
    assert objectness(model) == donor_objectness
    assert "heads: kept as loaded (the loss declares 0.2)" in capsys.readouterr().out


def test_a_loss_that_declares_no_prior_changes_and_says_nothing(capsys):
    model, found = build()
    set_prior(model, None, found)
    assert objectness(model) == pytest.approx([SCRATCH_PRIOR] * 9)
    set_prior(model, 0.3, None)  # from scratch all heads are new
    assert objectness(model) == pytest.approx([0.3] * 9)
    assert math.isclose(SCRATCH_PRIOR, 0.01)
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (None, []),
        (report(), []),
        (report(scale_xy=(1.2, 1.1, 1.05), anchors=[list(pair) for pair in ANCHORS]), []),
        (report(heads_loaded=False, scale_xy=(1.0, 1.0, 1.0), anchors=ANCHORS[::-1]), []),
        (
            report(scale_xy=(1.0, 1.0, 1.0)),
            ["scale_xy here is 1.2 1.1 1.05, the loaded heads were trained with 1 1 1"],
        ),
        (
            report(anchors=((12.5, 16), *ANCHORS[1:])),
            ["anchors here is 12,16 19,36", "trained with 12.5,16 19,36"],
        ),
    ],
)
def test_heads_that_are_read_in_another_way_than_they_were_trained_are_told(source, told):
    notes = other_decode(source, anchors=ANCHORS, scale_xy=(1.2, 1.1, 1.05))
    assert len(notes) == bool(told)
    assert all(part in notes[0] for part in told)
