import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import box_convert

from data.letterbox import image_to_letterbox
from data.voc import scan_split
from losses.yolo_loss import YOLOLoss
from metrics.evaluator import evaluate, evaluating, forward_batches
from metrics.scoring import format_table
from nets.decode import STRIDES, read_anchors
from tests.factory import add_image, write_split
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
ANCHORS = read_anchors(ROOT / "model_data" / "yolo_anchors.txt")
NAMES = ("cat", "dog", "cow")  # no image has a cow
INPUT_SHAPE = (64, 96)
SETTINGS = {
    "class_names": NAMES,
    "anchors": ANCHORS,
    "input_shape": INPUT_SHAPE,
    "scale_xy": (1.2, 1.1, 1.05),
    "device": torch.device("cpu"),
    "progress": False,
}
IMAGES = {
    "wide": ((40, 120), [("cat", (10, 5, 40, 30)), ("dog", (60, 5, 110, 35))]),
    "tall": ((150, 70), [("cat", (5, 20, 60, 90)), ("dog", (10, 100, 50, 140), True)]),
    "bare": ((64, 96), []),
}


class Recorded(nn.Module):
    """A network that gives prepared maps, image after image."""

    def __init__(self, maps):
        super().__init__()
        self.maps, self.next = maps, 0
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images):
        assert images.shape[1:] == (3, *INPUT_SHAPE)
        assert 0 <= images.min() <= images.max() <= 1
        self.norm(images)  # in training mode this would move its statistics
        first, self.next = self.next, (self.next + len(images)) % len(self.maps[0])
        return tuple(part[first : first + len(images)] for part in self.maps)


def make_loss():
    return YOLOLoss(ANCHORS, len(NAMES), INPUT_SHAPE, conf_loss="focal", scale_xy=(1.2, 1.1, 1.05))


def raw_maps(images, objectness=8.0):
    """Maps whose boxes are the given ones: a list of (xyxy in input pixels, class id) an image."""
    maps = [
        torch.full((len(images), 3, 5 + len(NAMES), INPUT_SHAPE[0] // s, INPUT_SHAPE[1] // s), -9.0)
        for s in STRIDES
    ]
    for image, boxes in enumerate(images):
        for box_xyxy, class_id in boxes:
            cx, cy, w, h = box_convert(box_xyxy, "xyxy", "cxcywh").tolist()
            level, anchor = 1, class_id
            column, row = int(cx / 16), int(cy / 16)
            s = SETTINGS["scale_xy"][level]
            offsets = torch.tensor([cx / 16 - column, cy / 16 - row])
            cell = maps[level][image, anchor, :, row, column]
            cell[:2] = ((offsets + (s - 1) / 2) / s).logit()
            cell[2] = math.log(w / ANCHORS[3 * level + anchor][0])
            cell[3] = math.log(h / ANCHORS[3 * level + anchor][1])
            cell[4], cell[5 + class_id] = objectness, 8.0
    return [part.flatten(1, 2) for part in maps]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    root = tmp_path_factory.mktemp("voc")
    for name, (image_hw, boxes) in IMAGES.items():
        add_image(root, name, np.full((*image_hw, 3), 90, np.uint8), boxes)
    write_split(root, "val", IMAGES)
    return scan_split(f"{root}:val", NAMES)[0]


def perfect_model(samples, **settings):
    images = []
    for sample in samples:
        boxes = torch.from_numpy(sample.boxes_xyxy)
        in_input = image_to_letterbox(boxes, sample.image_hw, INPUT_SHAPE)
        images.append(list(zip(in_input, sample.class_ids.tolist(), strict=True)))
    return Recorded(raw_maps(images, **settings))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_boxes_on_every_object_reach_one_in_pixels_of_the_images(samples, batch_size):
    evaluation = evaluate(perfect_model(samples), samples, batch_size=batch_size, **SETTINGS)
    figures = evaluation.AP50, evaluation.AP50_11point, evaluation.AP, evaluation.AP75
    assert figures == pytest.approx((1, 1, 1, 1))
    assert evaluation.per_class == {"cat": 1, "dog": 1, "cow": pytest.approx(math.nan, nan_ok=True)}
    assert evaluation.counts == {
        "images": 3,
        "ground_truth": 3,
        "difficult": 1,
        "detections": 4,
    }
    for rows, sample in zip(evaluation.detections, samples, strict=True):
        expected = sample.boxes_xyxy[np.argsort(sample.class_ids)]
        np.testing.assert_allclose(rows[np.argsort(rows[:, 5]), :4], expected, atol=0.01)


def test_the_best_threshold_keeps_the_true_boxes_and_drops_the_weak_one(samples):
    model = perfect_model(samples)
    weak = raw_maps([[], [], [(torch.tensor([5.0, 5, 60, 60]), 0)]], objectness=-2.0)
    model.maps = [torch.maximum(*pair) for pair in zip(model.maps, weak, strict=True)]
    evaluation = evaluate(model, samples, **SETTINGS)
    assert evaluation.counts["detections"] == 5
    assert (evaluation.f1, evaluation.precision, evaluation.recall) == (1, 1, 1)
    assert evaluation.conf_threshold > 0.9


def test_a_missed_class_halves_the_mean(samples):
    model = perfect_model(samples)
    model.maps[1].unflatten(1, (3, -1))[:, 1, 4] = -9.0  # dogs lie on the second anchor
    evaluation = evaluate(model, samples, **SETTINGS)
    assert evaluation.per_class["dog"] == 0
    assert evaluation.AP50 == 0.5


def test_when_nothing_passes_the_highest_score_is_said(samples):
    evaluation = evaluate(perfect_model(samples, objectness=-8.0), samples, **SETTINGS)
    highest = torch.tensor([-8.0, 8.0]).sigmoid().prod().item()
    assert evaluation.AP50 == 0
    assert evaluation.counts["detections"] == 0
    assert evaluation.highest_score == pytest.approx(highest, rel=1e-4)
    assert f"the highest seen is {highest:.2g}" in format_table(evaluation)


def test_a_model_of_nan_ends_with_zero_and_a_valid_json(samples):
    model = perfect_model(samples)
    model.maps = [part * math.nan for part in model.maps]
    evaluation = evaluate(model, samples, **SETTINGS)
    assert evaluation.AP50 == 0
    assert evaluation.to_json()["highest_score"] is None
    assert "nan" in format_table(evaluation)


def test_without_objects_figures_are_null_in_json_never_nan(samples):
    bare = [sample for sample in samples if not len(sample.boxes_xyxy)]
    evaluation = evaluate(perfect_model(bare), bare, **SETTINGS)
    values = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))
    assert [values[key] for key in ("AP50", "AP50_11point", "AP", "AP75")] == [None] * 4
    assert values["per_class"] == dict.fromkeys(NAMES)
    assert values["conf_threshold"] == 0.5


def test_json_holds_figures_counts_and_thresholds(samples):
    values = evaluate(perfect_model(samples), samples, **SETTINGS).to_json()
    assert values["per_class"] == {"cat": 1, "dog": 1, "cow": None}
    assert values["counts"]["images"] == 3
    assert values["thresholds"] == {"score": 0.001, "nms_iou": 0.45, "match_iou": 0.5}
    assert values["images_per_second"] > 0


def test_the_table_shows_every_class_and_the_thresholds_in_force(samples):
    table = format_table(evaluate(perfect_model(samples), samples, **SETTINGS))
    for part in (*NAMES, "0.001", "0.45", "best F1 1.0000", "1 difficult"):
        assert part in table


def test_an_empty_split_is_the_users_to_mend():
    with pytest.raises(UserError, match="no image"):
        evaluate(Recorded([torch.zeros(0)]), [], **SETTINGS)


def losses_by_hand(model, samples, batch_size):
    """Each batch's terms, with its number of images."""
    batches = forward_batches(
        model,
        samples,
        input_shape=INPUT_SHAPE,
        device=SETTINGS["device"],
        batch_size=batch_size,
        progress=False,
    )
    loss = make_loss()
    return [(loss(outputs, targets, cells=True), len(batch)) for batch, outputs, targets in batches]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_losses_are_means_over_images(samples, batch_size):
    model = perfect_model(samples)
    losses = evaluate(model, samples, loss=make_loss(), batch_size=batch_size, **SETTINGS).losses
    assert set(losses) == {"total", "loc", "conf", "cls"}
    by_hand = losses_by_hand(model, samples, batch_size)
    for name, value in losses.items():
        expected = sum(terms[name].item() * count for terms, count in by_hand) / len(samples)
        assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_cells_are_those_of_all_images_and_their_loss_is_the_mean(samples, batch_size):
    model = perfect_model(samples)
    evaluation = evaluate(model, samples, loss=make_loss(), batch_size=batch_size, **SETTINGS)
    groups = [evaluation.cells[name] for name in ("positive", "negative")]
    conf = sum(sum(group["loss"]) for group in groups) / len(samples)
    assert conf == pytest.approx(evaluation.losses["conf"], rel=1e-5)
    seen = [terms["cells"] for terms, _ in losses_by_hand(model, samples, batch_size)]
    positives = sum(int(cells.positive.sum()) for cells in seen)
    counted = sum(int(cells.counted.sum()) for cells in seen)
    assert [sum(group["cells"]) for group in groups] == [positives, counted - positives]
    assert positives == 3  # on other anchors than the boxes, so that none is found: logit -9
    (difficulty,) = np.array(evaluation.cells["difficulty"])[np.flatnonzero(groups[0]["cells"])]
    assert difficulty == pytest.approx(torch.tensor(9.0).sigmoid().item(), abs=1e-5)


def test_without_a_loss_there_are_no_losses_and_no_cells(samples):
    evaluation = evaluate(perfect_model(samples), samples, **SETTINGS)
    assert evaluation.losses == {}
    assert evaluation.cells is None


def test_modes_and_statistics_are_as_before_afterwards(samples):
    model, loss = perfect_model(samples).train(), make_loss().train()
    model.frozen = nn.BatchNorm2d(3).eval()
    evaluate(model, samples, loss=loss, **SETTINGS)
    assert model.training
    assert model.norm.training
    assert loss.training
    assert not model.frozen.training
    assert model.norm.num_batches_tracked == 0


def test_modes_come_back_after_an_error():
    model = nn.Dropout().train()
    modes = []

    def fail_inside():
        with evaluating(model):
            modes.append(model.training)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_inside()
    assert modes == [False]
    assert model.training


RANK_PROGRAM = """
import sys
from utils.distributed import process_group, rank
from tests.test_evaluator import *

samples = scan_split(sys.argv[1], NAMES)[0]
with process_group(SETTINGS["device"]):
    share = [samples[i] for i in ((0, 2), (1, 0))[rank()]]  # the second starts again at the end
    evaluation = evaluate(perfect_model(share), samples, loss=make_loss(), **SETTINGS)
    positives = sum(evaluation.cells["positive"]["cells"])
    print(evaluation.AP50, [len(rows) for rows in evaluation.detections], positives)
"""


def test_two_ranks_share_the_images_and_agree(samples):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    split = f"{Path(samples[0].image_path).parent.parent}:val"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_PROGRAM, split],
            cwd=ROOT,
            env={**os.environ, **world, "RANK": rank, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    for process in ranks:
        output, errors = process.communicate(timeout=120)
        # Five positives: the first image, with two, has come to both.
        assert output == "1.0 [2, 2, 0] 5.0\n", errors
