import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from evaluate import format_fixed, main
from metrics.calibration import OperatingPoint
from nets.decode import read_anchors
from nets.yolo import YoloV4
from tests.factory import add_image, write_split
from utils.errors import run_script
from weights.checkpoint import read_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("cat", "dog")


@pytest.fixture
def run_in_process(monkeypatch, capsys):
    """What `python evaluate.py` does, without the seconds of starting it: status and errors."""

    def run(*flags):
        argv = ["evaluate.py", "--device", "cpu", "--num_workers", "0", *map(str, flags)]
        monkeypatch.setattr(sys, "argv", argv)
        try:
            run_script(main)
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "best.pt"
    torch.manual_seed(0)  # some of its boxes, of every size and at every place, lie on an object
    model = YoloV4(len(NAMES), width=0.05, depth=0.1)
    checkpoint = {
        "model": model.state_dict(),
        "class_names": NAMES,
        "anchors": read_anchors(ROOT / "model_data" / "yolo_anchors.txt"),
        "input_shape": (64, 96),
        "width": 0.05,
        "depth": 0.1,
        "scale_xy": (1.0, 1.0, 1.0),
        "conf_loss": "bce",
        "conf_threshold": 0.5,
        "config": {},
        "epoch": 1,
        "metrics": {},
    }
    save_checkpoint(path, checkpoint)
    return path


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "with space"
    noise = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        image = noise.integers(0, 255, (70, 90, 3), dtype=np.uint8)
        add_image(root, name, image, [("cat", (10, 10, 60, 50)), ("cat", (1, 1, 9, 9), True)])
    write_split(root, "test", ["a", "b", "c"])
    return root


def test_a_checkpoint_is_evaluated_and_the_results_written(weights, voc, tmp_path):
    folder = tmp_path / "new" / "results"
    flags = ["--weights", weights, "--data", f"{voc}:test", "--save_dir", folder, "--batch-size=2"]
    command = [sys.executable, ROOT / "evaluate.py", "--device=cpu", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    values = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert {"AP50", "AP50_11point", "AP", "AP75", "counts", "thresholds"} <= values.keys()
    assert values["per_class"].keys() == set(NAMES)
    assert values["per_class"]["dog"] is None
    assert values["counts"]["images"] == 3
    assert values["counts"]["ground_truth"] == 3
    assert values["counts"]["difficult"] == 3
    assert values["config"]["weights"] == str(weights)
    for name in ("precision_recall.png", "reliability.png"):
        assert cv2.imread(str(folder / name)) is not None
    parts = ("3 images", "cat", "COCO", "NMS IoU 0.45", "images/s", "calibration", str(folder))
    for part in parts:
        assert part in done.stdout


def test_the_checkpoints_own_threshold_is_measured_beside_the_best(
    weights, voc, tmp_path, run_in_process
):
    def evaluate_with(threshold):
        checkpoint = {**read_checkpoint(weights), "conf_threshold": threshold}
        save_checkpoint(tmp_path / "own.pt", checkpoint)
        flags = ["--weights", tmp_path / "own.pt", "--data", f"{voc}:test", "--save_dir", tmp_path]
        status, errors = run_in_process(*flags)
        assert status == 0, errors
        return json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))

    nothing = evaluate_with(1.0)["at_checkpoint_threshold"]
    assert nothing == {"conf_threshold": 1.0, "f1": 0, "precision": 0, "recall": 0}
    values = evaluate_with(0.0)
    assert 0 < values["at_checkpoint_threshold"]["f1"] < values["f1"]
    best = {key: values[key] for key in nothing}
    assert evaluate_with(best["conf_threshold"])["at_checkpoint_threshold"] == best


@pytest.mark.parametrize(
    ("metrics", "told"), [({}, "a default"), ({"f1": 0.0}, "a default"), ({"f1": 0.5}, "chosen")]
)
def test_where_the_checkpoints_threshold_comes_from_is_told(metrics, told):
    line = format_fixed(
        OperatingPoint(0.5, 0.1, 0.2, 0.3), {"metrics": metrics, "config": {}}, "VOC:val"
    )
    assert f"score >= 0.5000 ({told}" in line
    assert ("a default" in line) == (told == "a default")


def test_difficult_objects_are_counted_when_asked_for(weights, voc, tmp_path, run_in_process):
    flags = ["--weights", weights, "--data", f"{voc}:test", "--save_dir", tmp_path]
    status, errors = run_in_process(*flags, "--include-difficult")
    assert status == 0, errors
    values = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert values["counts"]["ground_truth"] == 6
    assert values["counts"]["difficult"] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--weights"),
        (["--weights", "nowhere.pt"], "nowhere.pt"),
        (["--weights", "WEIGHTS", "--data", "VOC:nosplit"], "nosplit"),
    ],
)
def test_what_the_user_can_mend_is_one_message_and_exit_status_2(
    flags, message, weights, voc, run_in_process
):
    given = {"WEIGHTS": weights, "VOC:nosplit": f"{voc}:nosplit"}
    status, errors = run_in_process(*(given.get(flag, flag) for flag in flags))
    assert status == 2
    assert errors.splitlines()[0].startswith("error: ")
    assert message in errors
    assert "Traceback" not in errors


def test_a_folder_that_cannot_be_made_is_said_before_the_work(weights, voc, run_in_process):
    data = ["--data", f"{voc}:test", "--save_dir", weights / "below a file"]
    status, errors = run_in_process("--weights", weights, *data)
    assert status == 2
    assert "--save_dir" in errors
