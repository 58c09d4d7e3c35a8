"""predict.py on weights of darknet and of the original fork."""

import json
import sys

import pytest
from PIL import Image

from predict import main
from tests.foreign_files import SINGLE, flags_of, write_shelf
from tests.test_predictor import CLASS_NAMES, THRESHOLD, random_image
from utils.errors import run_script


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = write_shelf(tmp_path_factory.mktemp("weights of others"))
    (folder / "images").mkdir()
    for index in range(3):
        Image.fromarray(random_image(50, 80, index)).save(folder / f"images/Bild {index}.png")
    return folder


@pytest.fixture
def predict(shelf, tmp_path, monkeypatch, capsys):
    """Run predict.py in this process: status, what it printed, and the boxes of each image."""

    def run(*flags):
        fixed = ["--source", shelf / "images", "--save_dir", tmp_path / "out", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", list(map(str, ["predict.py", *fixed, *flags])))
        try:
            run_script(main)
        except SystemExit as end:
            return end.code, capsys.readouterr().err, None
        lines = (tmp_path / "out/detections.jsonl").read_text(encoding="utf-8").splitlines()
        return 0, capsys.readouterr().out, [json.loads(line)["boxes"] for line in lines]

    return run


@pytest.mark.parametrize(("name", "how"), [("a.weights", "cfg"), ("a.pth", "flags")])
def test_it_finds_what_the_checkpoint_of_the_same_weights_finds(shelf, predict, name, how):
    _, _, expected = predict("--weights", shelf / "best.pt")
    assert all(expected)
    status, printed, found = predict(
        *flags_of(shelf, name, how), "--conf_threshold", str(THRESHOLD)
    )
    assert status == 0, printed
    assert found == expected
    assert any(box["class_name"] == CLASS_NAMES[box["class_id"]] != "disc" for box in found[0])
    assert "is a default" not in printed


def test_darknets_own_threshold_stands_in_and_it_is_said(shelf, predict):
    status, printed, found = predict(*flags_of(shelf, "a.weights", "cfg"))
    assert status == 0, printed
    assert "score >= 0.25 is a default" in printed
    assert min(box["score"] for boxes in found for box in boxes) >= 0.25


def test_thresholds_of_classes_are_not_known_of_such_a_file(shelf, predict):
    status, printed, _ = predict(*flags_of(shelf, "a.weights", "cfg"), "--class_thresholds")
    assert status == 2
    assert "class_thresholds" in printed


@pytest.mark.parametrize("name", ["a.weights", "a.pth"])
def test_what_is_missing_is_one_message_and_exit_status_2(shelf, predict, tmp_path, name):
    status, printed, _ = predict("--weights", shelf / name, "--width", 0.1, "--depth", 0.1)
    assert status == 2
    assert printed.startswith("error: ")
    assert all(flag in printed for flag in SINGLE[:3])
    assert not list(tmp_path.iterdir())


def test_what_a_checkpoint_says_itself_cannot_be_said_again(shelf, predict):
    status, printed, _ = predict("--weights", shelf / "best.pt", "--scale_xy", 1, 1, 1)
    assert status == 2
    assert "is a checkpoint, which stores all metadata: leave --scale_xy out" in printed
