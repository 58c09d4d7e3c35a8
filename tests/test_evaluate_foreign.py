"""evaluate.py on weights of darknet and of the original fork."""

import json
import sys

import pytest

from engine.predictor import Predictor
from evaluate import main
from tests.factory import add_image, write_split
from tests.foreign_files import SINGLE, flags_of, write_shelf
from tests.test_predictor import CLASS_NAMES, THRESHOLD, random_image
from utils.errors import run_script

MEASURED = ("AP50", "AP50_11point", "AP", "AP75", "per_class", "counts", "f1", "conf_threshold")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return write_shelf(tmp_path_factory.mktemp("weights of others"))


@pytest.fixture(scope="module")
def voc(shelf, tmp_path_factory):
    """Images whose objects lie where the checkpoint finds them: other boxes measure less."""
    root, predictor = tmp_path_factory.mktemp("data") / "voc", Predictor(shelf / "best.pt")
    for name, image in (("a", random_image(70, 90, 1)), ("b", random_image(70, 90, 2))):
        found = predictor(image)
        names = [CLASS_NAMES[index] for index in found.class_ids]
        boxes = list(zip(names, map(tuple, found.boxes_xyxy.tolist()), strict=True))
        add_image(root, name, image, boxes)
    write_split(root, "test", ["a", "b"])
    return root


@pytest.fixture
def evaluate(voc, tmp_path, monkeypatch, capsys):
    """Run evaluate.py in this process: status, what it printed, evaluation.json or None."""

    def run(*flags):
        fixed = ["--data", f"{voc}:test", "--save_dir", tmp_path, "--device", "cpu"]
        argv = ["evaluate.py", *fixed, "--num_workers", 0, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        try:
            run_script(main)
        except SystemExit as end:
            return end.code, capsys.readouterr().err, None
        results = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
        return 0, capsys.readouterr().out, results

    return run


@pytest.fixture
def expected(shelf, evaluate):
    _, _, results = evaluate("--weights", shelf / "best.pt")
    assert results["AP"] > 0.6
    return results


@pytest.mark.parametrize(("name", "how"), [("a.weights", "cfg"), ("a.pth", "flags")])
def test_it_measures_what_the_checkpoint_of_the_same_weights_measures(
    shelf, evaluate, expected, name, how
):
    status, printed, found = evaluate(*flags_of(shelf, name, how))
    assert status == 0, printed
    for key in MEASURED:
        assert found[key] == expected[key], key
    assert found["at_checkpoint_threshold"]["conf_threshold"] != THRESHOLD
    assert "a default: no evaluation has measured the threshold of best F1" in printed


def test_without_the_reach_of_centres_that_it_was_trained_with_it_measures_another_thing(
    shelf, evaluate, expected
):
    _, _, found = evaluate(*flags_of(shelf, "a.pth", "flags")[:-4])
    assert found["AP"] < expected["AP"] - 0.1


@pytest.mark.parametrize("name", ["a.weights", "a.pth"])
def test_what_is_missing_is_one_message_and_exit_status_2(shelf, evaluate, tmp_path, name):
    status, printed, _ = evaluate("--weights", shelf / name, "--width", 0.1, "--depth", 0.1)
    assert status == 2
    assert printed.startswith("error: ")
    assert all(flag in printed for flag in SINGLE[:3])
    assert not list(tmp_path.iterdir())


def test_what_a_checkpoint_says_itself_cannot_be_said_again(shelf, evaluate):
    status, printed, _ = evaluate("--weights", shelf / "best.pt", "--cfg", shelf / "a.cfg")
    assert status == 2
    assert "is a checkpoint, which stores all metadata: leave --cfg out" in printed
