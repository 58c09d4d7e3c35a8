import os
import sys

import pytest

from benchmarks import loss, original
from benchmarks.original import NEEDED, Config, check_clone, check_totals, make_rows, original_call
from utils.errors import UserError

CLONE = os.environ.get("YOLOV4_PYTORCH", "")  # folder of the original, to test with its own code
TINY = (
    *("--input_shape", 64, 64, "--rounds", 1, "--loss_batch", 2, "--samples", 2, "--images", 4),
    *("--step_batch", 1, "--steps", 1, "--detections", 1),
)
# Stands for the original's loss: a number that tells in which form maps and boxes came.
LOSS = """
import torch

class YOLOLoss(torch.nn.Module):
    def __init__(self, anchors, num_classes, input_shape, cuda):
        super().__init__()
        self.shape = input_shape

    def forward(self, scale, raw, targets):
        boxes = sum(float(t[:, 4].sum()) * 10 ** number for number, t in enumerate(targets))
        return raw.sum() * 0 + (scale + 1) * self.shape[0] / raw.shape[2] + 1000 * boxes
"""


@pytest.fixture
def fake_clone(tmp_path):
    folder = tmp_path / "yolov4-pytorch"
    for name in NEEDED:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(LOSS if name == "nets/yolo_training.py" else "")
    return folder


def test_a_folder_that_is_not_the_original_is_refused(fake_clone):
    with pytest.raises(UserError, match=r"--path is not given.*git clone https://github\.com/"):
        check_clone("")
    with pytest.raises(UserError, match=r"nowhere: there is no such folder.*git clone"):
        check_clone(f"{fake_clone}/nowhere")
    check_clone(str(fake_clone))
    (fake_clone / "utils/dataloader.py").unlink()
    with pytest.raises(UserError, match=r"not the original: utils/dataloader\.py is missing"):
        check_clone(str(fake_clone))


def test_an_unknown_row_is_told_which_there_are(fake_clone, monkeypatch):
    flags = ["--path", str(fake_clone), "--rows", "speed"]
    monkeypatch.setattr(sys, "argv", ["original", *flags])
    with pytest.raises(UserError, match="--rows speed: choose from loss, sample, step, detect"):
        original.main()


def test_the_clones_loss_runs_on_our_maps_and_boxes(fake_clone, tmp_path):
    config = Config(path=str(fake_clone), input_shape=(64, 96), loss_batch=2, loss_boxes=3)
    row = make_rows(config)["loss"]
    found = original_call("loss", row, config.path, tmp_path)()
    _, targets = loss.make_batch(row.settings)
    classes = [targets[targets[:, 0] == index, 1].sum().item() for index in range(2)]
    # Strides 32, 16, 8 in this order, and the classes of each image in the last column.
    expected = 1 * 32 + 2 * 16 + 3 * 8 + 3 * 1000 * (classes[0] + 10 * classes[1])
    assert found["total"] == expected
    assert not list(fake_clone.rglob("__pycache__"))


def test_a_clone_that_fails_is_shown(fake_clone, tmp_path):
    (fake_clone / "nets/yolo_training.py").write_text("import scipy_of_old\n")
    row = make_rows(Config(loss_batch=1, input_shape=(64, 64)))["loss"]
    with pytest.raises(UserError, match=r"(?s)original_child\.py.*No module named 'scipy_of_old'"):
        original_call("loss", row, str(fake_clone), tmp_path)()


def test_two_losses_that_differ_are_an_error():
    check_totals({"original": [{"total": 24.0}], "ours": [{"total": 24.0001}]})
    for other in (24.1, float("nan")):
        with pytest.raises(UserError, match=r"differ: 24\.0 in the original"):
            check_totals({"original": [{"total": 24.0}], "ours": [{"total": other}]})


@pytest.mark.skipif(not CLONE, reason="YOLOV4_PYTORCH names no clone of the original")
@pytest.mark.parametrize("row", ["loss", "sample", "step", "detect"])
def test_the_original_itself_runs(run_script, row):
    done = run_script("-m", "benchmarks.original", "--path", CLONE, "--rows", row, *TINY)
    assert done.returncode == 0, done.stderr
    assert "(original / ours)" in done.stdout
    assert "x the original's time" in done.stdout
