"""The examples run as shown, and their losses are what they say."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import sigmoid_focal_loss

import train
from examples import faster_rcnn_focal
from examples.faster_rcnn_focal import box_losses, build_model, count_found
from losses.conf import build_conf_loss, registry, spec
from tools.make_sample_voc import make_sample
from utils.errors import UserError
from weights.checkpoint import read_checkpoint

ROOT = Path(__file__).resolve().parent.parent
PARTS = (
    *("data", "engine", "examples", "losses", "metrics", "model_data", "nets", "tools", "utils"),
    *("weights", "train.py"),
)
TINY = "--width 0.01 --depth 0.01 --input_shape 64 64 --epochs 1 --batch_size 4 --device cpu"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project whose drawn sample has ten images."""
    folder = tmp_path_factory.mktemp("project")
    for name in PARTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    sample = folder / "VOCdevkit" / "Sample"
    make_sample(sample, images=10, seed=0, difficulty="easy", progress=False)
    return folder


@pytest.fixture
def custom_conf_loss(monkeypatch):
    """The example as a module; the name that it registers goes with the test."""
    monkeypatch.setattr(registry, "CONF_LOSSES", dict(registry.CONF_LOSSES))
    monkeypatch.setattr(spec, "CONF_LOSSES", registry.CONF_LOSSES)
    monkeypatch.delitem(sys.modules, "examples.custom_conf_loss", raising=False)
    return importlib.import_module("examples.custom_conf_loss")


def run(project, *arguments):
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def trained_loss(folder):
    """The confidence loss that a run's config.json and its checkpoint name."""
    config = json.loads((folder / "config.json").read_text())
    return config["conf_loss"], read_checkpoint(folder / "best.pt")["conf_loss"]


def test_the_custom_loss_takes_less_than_40_lines():
    assert len((ROOT / "examples" / "custom_conf_loss.py").read_text().splitlines()) < 40


def test_the_custom_loss_trains_as_a_script(project, tmp_path):
    printed = run(project, "examples/custom_conf_loss.py", *TINY.split(), "--save_dir", tmp_path)
    spec = "examples.custom_conf_loss:ModifiedHuber(margin=4)"
    assert trained_loss(tmp_path) == (spec, spec)
    assert f"--conf_loss '{spec}'" in printed  # the command that a user would type
    assert "set to 0.02" in printed  # the declared prior
    assert "epoch   1" in printed


def test_the_custom_loss_runs_as_a_module_and_hands_flags_to_train(project):
    assert "--focal_gamma" in run(project, "-m", "examples.custom_conf_loss", "--help")


@pytest.mark.usefixtures("custom_conf_loss")
def test_the_decorated_name_trains_once_the_file_is_imported(project, tmp_path, monkeypatch):
    sample = "VOCdevkit/Sample"
    data = f"--train {sample}:train --val {sample}:val --classes_path {sample}/classes.txt"
    flags = f"{data} {TINY} --num_workers 0 --conf_loss modified_huber(margin=2) --save_dir"
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split(), str(tmp_path)])
    train.main()
    assert trained_loss(tmp_path) == ("modified_huber(margin=2)",) * 2


def test_modified_huber_is_as_worked_out_by_hand(custom_conf_loss):
    logits = torch.tensor([-6.0, -2, 0, 1, 2, 6])
    for_positives = torch.tensor([12.0, 4, 1, 0.25, 0, 0])
    loss = custom_conf_loss.ModifiedHuber(margin=2)
    torch.testing.assert_close(loss(logits, torch.ones(6)), for_positives)
    torch.testing.assert_close(loss(-logits, torch.zeros(6)), for_positives)
    assert loss(torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_modified_huber_of_half_precision_is_that_of_float32(custom_conf_loss, dtype):
    logits = torch.tensor([-6e4, -300, -3, 0.5, 3, 6e4], dtype=dtype)
    loss = custom_conf_loss.ModifiedHuber(margin=0.01)
    for targets in (torch.zeros(6, dtype=dtype), torch.ones(6, dtype=dtype)):
        losses = loss(logits, targets)
        assert losses.isfinite().all()
        assert torch.equal(losses, loss(logits.float(), targets.float()))


def test_modified_huber_pulls_no_harder_than_its_tail(custom_conf_loss):
    logits = torch.tensor([-1e4, -4, 0, 4, 1e4], requires_grad=True)
    build_conf_loss("modified_huber")(logits, torch.ones(5)).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([-1, -1, -0.5, 0, 0]))


def proposals_of_a_step(labels):
    """Random outputs of a head with three classes, and targets, for proposals with these labels."""
    generator = torch.Generator().manual_seed(0)
    shapes = (len(labels), 3), (len(labels), 12), (len(labels), 4)
    logits, deltas, targets = (torch.randn(s, generator=generator) for s in shapes)
    return logits.requires_grad_(), deltas.requires_grad_(), torch.tensor(labels), targets


def test_the_box_classifier_has_torchvisions_focal_loss_over_the_positives():
    logits, deltas, labels, targets = proposals_of_a_step([0, 2, 0, 1, 3, 0, 2])
    one_hot = F.one_hot(labels, 4)[:, 1:].float()
    expected = sigmoid_focal_loss(logits, one_hot, alpha=0.25, gamma=2, reduction="sum") / 4
    losses = box_losses(logits, deltas, labels, targets)
    torch.testing.assert_close(losses["loss_classifier"], expected)


def test_smooth_l1_stays_as_it_was():
    logits, deltas, labels, targets = proposals_of_a_step([0, 2, 0, 1, 3, 0, 2])
    background = torch.full((len(labels), 4), 9.0)  # torchvision has columns for it
    padded = torch.zeros(len(labels), 4), torch.cat((background, deltas), dim=1)
    _, expected = fastrcnn_loss(*padded, [labels], [targets])
    losses = box_losses(logits, deltas, labels, targets)
    torch.testing.assert_close(losses["loss_box_reg"], expected)


@pytest.mark.parametrize("labels", [[0, 0, 0], []])
def test_without_positive_proposals_the_loss_is_that_of_the_negatives(labels):
    logits, deltas, _, targets = proposals_of_a_step(labels)
    losses = box_losses(logits, deltas, torch.tensor(labels, dtype=torch.int64), targets)
    sum(losses.values()).backward()
    expected = sigmoid_focal_loss(logits, torch.zeros_like(logits), reduction="sum")
    torch.testing.assert_close(losses["loss_classifier"], expected)
    assert losses["loss_box_reg"].item() == 0
    assert logits.grad.isfinite().all()
    assert deltas.grad.eq(0).all()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(num_classes=2).eval()


def test_scores_are_sigmoids_and_overlaps_go_within_a_class_only(model):
    boxes = torch.tensor([[10.0, 10, 50, 60], [11, 10, 50, 60], [80, 20, 120, 90]])
    logits = torch.tensor([[2.0, 1.5], [1.0, 2.5], [-3, -0.5]])
    detect = model.roi_heads.postprocess_detections
    (found,), (scores,), (labels,) = detect(logits, torch.zeros(3, 8), [boxes], [(100, 110)])
    torch.testing.assert_close(scores, torch.tensor([2.5, 2.0, -0.5]).sigmoid())
    assert labels.tolist() == [2, 1, 2]
    clipped = torch.tensor([80.0, 20, 110, 90])
    torch.testing.assert_close(found, torch.stack((boxes[1], boxes[0], clipped)))


def test_no_proposals_are_no_detections(model):
    nothing = torch.zeros(0, 2), torch.zeros(0, 8), [torch.zeros(0, 4)] * 2, [(64, 64)] * 2
    for parts in zip(*model.roi_heads.postprocess_detections(*nothing), strict=True):
        assert [len(part) for part in parts] == [0, 0, 0]


def test_a_new_classifier_sees_objects_nowhere(model):
    classifier = model.roi_heads.box_predictor.cls_score
    torch.testing.assert_close(classifier.bias.sigmoid(), torch.full((2,), 0.01))
    target = {"boxes": torch.tensor([[10.0, 10, 50, 60]]), "labels": torch.tensor([1])}
    assert count_found(model, [(torch.rand(3, 64, 80), target)]) == 0


def test_an_object_is_found_by_a_box_of_its_class_only(model, monkeypatch):
    seen = {"boxes": torch.tensor([[10.0, 10, 50, 60], [9, 9, 50, 60]])}
    answer = [seen | {"labels": torch.tensor([1, 1])}]
    monkeypatch.setattr(model, "forward", lambda images: answer)
    boxes = torch.tensor([[10.0, 12, 50, 60], [10, 12, 50, 60], [60, 12, 90, 60]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2, 1])}
    assert count_found(model, [(torch.zeros(3, 64, 80), target)]) == 1


def test_faster_rcnn_learns_with_the_focal_loss(project):
    flags = "--images 2 --steps 10 --lr 2e-4 --device cpu"
    printed = run(project, "examples/faster_rcnn_focal.py", *flags.split())
    words = printed.split()
    assert float(words[words.index("last") + 1]) < 0.8 * float(words[words.index("steps") + 1][:-1])
    assert "objects that it was trained on" in printed


@pytest.fixture
def run_example(project, monkeypatch):
    """Run the Faster R-CNN example in the project's folder; its training gives these losses."""
    monkeypatch.chdir(project)

    def run(flags, losses=()):
        monkeypatch.setattr(faster_rcnn_focal, "train", lambda *_, **__: list(losses))
        monkeypatch.setattr(sys, "argv", ["example", *flags.split(), "--device", "cpu"])
        faster_rcnn_focal.main()

    return run


def test_the_fall_of_the_loss_is_judged_from_20_steps_on(run_example, capsys):
    run_example("--steps 19 --images 1", [1.0] * 18 + [2.0])
    assert "of the last 1.333" in capsys.readouterr().out
    run_example("--steps 20 --images 1", [2.0] + [1.0] * 19)
    with pytest.raises(UserError, match="did not fall"):
        run_example("--steps 20 --images 1", [1.0] * 20)
    with pytest.raises(UserError, match="did not fall"):
        run_example("--steps 20 --images 1", [1.0] * 19 + [float("nan")])


def test_without_images_there_is_nothing_to_learn(run_example):
    with pytest.raises(UserError, match="at least 1"):
        run_example("--images 0")


@pytest.mark.parametrize("root", ["my_images", "elsewhere/VOCdevkit/Sample"])
def test_nothing_is_drawn_into_a_folder_that_the_user_named(run_example, root, project):
    with pytest.raises(UserError, match=r"classes\.txt"):
        run_example(f"--root {root}")
    assert not (project / root).exists()


def test_the_sample_is_drawn_where_it_is_missing(run_example, tmp_path, monkeypatch):
    drawn = []

    def draw(root, **_):
        drawn.append(root)
        raise UserError("drawn enough")

    monkeypatch.setattr(faster_rcnn_focal, "make_sample", draw)
    monkeypatch.setattr(faster_rcnn_focal, "SAMPLE", tmp_path / "Sample")
    with pytest.raises(UserError, match="drawn enough"):
        run_example(f"--root {tmp_path / 'Sample'}")
    assert drawn == [tmp_path / "Sample"]
