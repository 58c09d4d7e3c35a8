import ast
import csv
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from train import Config
from utils.errors import run_script as run_main

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    *("config.json", "metrics.csv", "best.pt", "last.pt", "loss.png", "map.png"),
    *("train_batch.jpg", "val_detections.jpg", "reliability.png", "cumulative_loss.png"),
    "conf_cells.json",
}
STATEFUL = {"conf_loss": "ghm", "log_period": 1}  # a loss with a memory, all steps looked at


def flags(voc, save_dir=None, **more):
    """The flags of a run that takes a second."""
    values = {
        "train": f"{voc}:train",
        "val": f"{voc}:val",
        "classes_path": voc / "classes.txt",
        "width": 0.01,
        "depth": 0.01,
        "input_shape": (64, 96),
        "epochs": 3,
        "batch_size": 4,
        "num_workers": 0,
        "eval_period": 2,
        "device": "cpu",
        **more,
    }
    if save_dir is not None:
        values["save_dir"] = save_dir
    found = []
    for key, value in values.items():
        found += [f"--{key}", *map(str, value if isinstance(value, tuple) else (value,))]
    return found


def rows_of(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def without_times(rows):
    timed = ("pictures_per_second", "seconds", "memory_gb")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def same_tensors(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def whole_run(tiny_voc, tmp_path_factory):
    """An uninterrupted run of three epochs: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    command = [sys.executable, "train.py", *flags(tiny_voc, folder, **STATEFUL)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_run_writes_its_folder_and_says_what_to_do_next(whole_run):
    folder, printed = whole_run
    names = {path.name for path in folder.iterdir()}
    assert names >= FILES
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert f"python evaluate.py --weights {folder / 'best.pt'}" in printed
    assert "python predict.py --weights" in printed
    assert "red" in printed  # the data report names the classes
    rows = rows_of(folder)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    assert all(float(row["val_loss"]) > 0 for row in rows)
    assert [bool(row["val_ap50"]) for row in rows] == [False, True, True]  # period 2, and the last
    assert json.loads((folder / "config.json").read_text())["input_shape"] == [64, 96]


def test_metrics_and_tensorboard_say_what_the_loss_does_to_the_cells(whole_run):
    folder, _ = whole_run
    for row in rows_of(folder):
        for prefix in ("conf_loss", "conf_grad", "s8_loss", "s16_grad", "s32_loss"):
            shares = [float(row[f"{prefix}_{group}"]) for group in ("positive", "easy", "hard")]
            assert sum(shares) == pytest.approx(1, abs=1e-4) or all(map(math.isnan, shares))
        scales = [float(row[f"s{stride}_positives"]) for stride in (8, 16, 32)]
        assert sum(scales) == pytest.approx(float(row["positives"]), rel=1e-4)
        assert 0 < float(row["s8_objectness_negative"]) < 1
    events = EventAccumulator(str(folder)).Reload()
    for name in ("step/conf", "cells_s8/grad_easy", "cells_conf/loss_positive"):
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3, 4, 5, 6], name
    cells = json.loads((folder / "conf_cells.json").read_text())
    total = sum(cells["positive"]["loss"]) + sum(cells["negative"]["loss"])
    assert total > 0


def test_checkpoints_hold_what_the_contract_says_and_are_plain(whole_run):
    folder, _ = whole_run
    best = torch.load(folder / "best.pt", weights_only=True)
    last = torch.load(folder / "last.pt", weights_only=True)
    wanted = [
        "format_version",
        "model",
        "class_names",
        "anchors",
        "input_shape",
        "width",
        "depth",
        "scale_xy",
        "conf_loss",
        "conf_threshold",
        "config",
        "epoch",
        "metrics",
    ]
    resume = ["raw_model", "ema", "optimizer", "scaler", "schedule", "loss", "random", "step"]
    assert set(best) == set(wanted)
    assert set(last) == {*wanted, *resume}
    assert last["epoch"] == 3
    assert last["step"] == 6
    assert best["class_names"] == ["red", "green"]
    assert isinstance(best["conf_threshold"], float)
    assert not same_tensors(last["model"], last["raw_model"])  # the EMA is not the raw model


def test_the_same_seed_gives_the_same_run_for_any_number_of_workers(whole_run, tiny_voc, tmp_path):
    folder, _ = whole_run
    run_flags = flags(tiny_voc, tmp_path / "b", num_workers=2, **STATEFUL)
    command = [sys.executable, "train.py", *run_flags]
    subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300, check=True)
    assert without_times(rows_of(tmp_path / "b")) == without_times(rows_of(folder))


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    assert condition(), "the process ended or took too long"


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(whole_run, tiny_voc, tmp_path, kind):
    folder, _ = whole_run
    cut = tmp_path / "cut"
    command = [sys.executable, "train.py", *flags(tiny_voc, cut, **STATEFUL)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for((cut / "last.pt").exists, process)
    process.send_signal(kind)
    process.wait(timeout=120)
    resumed = subprocess.run(
        [sys.executable, "train.py", "--resume", str(cut)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert without_times(rows_of(cut)) == without_times(rows_of(folder))
    ours = torch.load(cut / "last.pt", weights_only=True)
    whole = torch.load(folder / "last.pt", weights_only=True)
    assert same_tensors(ours["raw_model"], whole["raw_model"])
    assert same_tensors(ours["model"], whole["model"])
    assert same_tensors(ours["loss"], whole["loss"])
    assert whole["loss"]["conf_loss.shares"].sum() > 0


def test_a_resume_cannot_change_the_network_and_says_so(whole_run, run_script):
    folder, _ = whole_run
    done = run_script("train.py", "--resume", folder, "--width", 0.5)
    assert done.returncode == 2
    assert "cannot change width" in done.stderr
    done = run_script("train.py", "--resume", folder, "--weights", folder / "best.pt")
    assert done.returncode == 2
    assert "leave --weights out" in done.stderr
    done = run_script("train.py", "--resume", folder / "best.pt")
    assert done.returncode == 2
    assert "last.pt" in done.stderr


def test_a_finished_run_can_be_given_more_epochs(whole_run, run_script, tmp_path):
    folder = tmp_path / "more"
    shutil.copytree(whole_run[0], folder)
    done = run_script("train.py", "--resume", folder, "--epochs", 4)
    assert done.returncode == 0, done.stderr
    assert [row["epoch"] for row in rows_of(folder)] == ["1", "2", "3", "4"]


def test_a_frozen_backbone_keeps_weights_and_statistics(whole_run, tiny_voc, run_script, tmp_path):
    weights = whole_run[0] / "best.pt"
    more = {"weights": weights, "epochs": 2, "freeze_epochs": 2, "freeze_batch_size": 4}
    done = run_script("train.py", *flags(tiny_voc, tmp_path / "run", **more))
    assert done.returncode == 0, done.stderr
    before = torch.load(weights, weights_only=True)["model"]
    after = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["raw_model"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any(name.startswith("backbone.") for name in changed)


def test_unfreezing_moves_the_backbone_with_its_own_batch_size(
    whole_run, tiny_voc, run_script, tmp_path
):
    weights = whole_run[0] / "best.pt"
    more = {"weights": weights, "epochs": 2, "freeze_epochs": 1, "freeze_batch_size": 8}
    done = run_script("train.py", *flags(tiny_voc, tmp_path / "run", **more))
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows_of(tmp_path / "run")] == ["1", "3"]
    before = torch.load(weights, weights_only=True)["model"]
    after = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["raw_model"]
    assert any(not torch.equal(before[n], after[n]) for n in before if n.startswith("backbone."))


LOSSES = """
import os
import signal
from torch import nn
from torch.nn import functional as F

class Broken(nn.Module):
    def forward(self, logits, targets):
        return logits * float("nan")

class Stopping(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, logits, targets):
        self.calls += 1
        if os.environ.get("STOP_AT") == str(self.calls):
            signal.raise_signal(signal.SIGTERM)
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
"""


@pytest.fixture
def run_with_losses(tmp_path):
    """Run train.py in a folder where the user keeps my_losses.py."""
    (tmp_path / "my_losses.py").write_text(LOSSES)
    (tmp_path / "model_data").mkdir()
    shutil.copy(ROOT / "model_data" / "yolo_anchors.txt", tmp_path / "model_data")

    def run(*arguments, **environment):
        return subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def test_a_run_stopped_between_two_steps_goes_on_at_that_step(tiny_voc, tmp_path, run_with_losses):
    conf_loss = "my_losses:Stopping"
    more = {"conf_loss": conf_loss, "batch_size": 2, "accumulate": 1, "epochs": 2}
    more["log_period"] = 2
    whole = run_with_losses(*flags(tiny_voc, tmp_path / "whole", **more))
    assert whole.returncode == 0, whole.stderr
    cut = run_with_losses(*flags(tiny_voc, tmp_path / "cut", **more), STOP_AT="3")
    assert cut.returncode == 130, cut.stderr
    assert f"--resume {tmp_path / 'cut'}" in cut.stdout
    last = torch.load(tmp_path / "cut" / "last.pt", weights_only=True)
    assert (last["epoch"], last["step"], last["schedule"]["epoch_step"]) == (0, 3, 3)
    refused = run_with_losses("--resume", tmp_path / "cut")
    assert refused.returncode == 2
    assert f'--conf_loss "{conf_loss}"' in refused.stderr
    resumed = run_with_losses("--resume", tmp_path / "cut", "--conf_loss", conf_loss)
    assert resumed.returncode == 0, resumed.stderr
    rows = [without_times(rows_of(tmp_path / name)) for name in ("whole", "cut")]
    assert rows[0] == rows[1]
    models = [
        torch.load(tmp_path / name / "last.pt", weights_only=True)["raw_model"]
        for name in ("whole", "cut")
    ]
    assert same_tensors(*models)


def test_a_loss_that_is_never_finite_stops_with_terms_and_pictures(
    tiny_voc, tmp_path, run_with_losses
):
    more = {"conf_loss": "my_losses:Broken", "batch_size": 1}
    done = run_with_losses(*flags(tiny_voc, tmp_path / "run", **more))
    assert done.returncode == 2
    assert "5 updates in a row" in done.stderr
    assert "conf nan" in done.stderr
    assert "picture " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"input_shape": (64, 100)}, "multiples of 32"),
        ({"freeze_epochs": 1}, "--weights"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"optimizer": "lion"}, "sgd, adam, adamw"),
        ({"schedule": "linear"}, "cosine or step"),
        ({"conf_loss": "focall"}, "Did you mean 'focal'"),
        ({"device": "cuda:7"}, "--device cpu"),
        ({"amp": "fp8"}, "bf16"),
        ({"train": "nowhere:train"}, "nowhere"),
        ({"classes_path": "nowhere.txt"}, "nowhere.txt"),
        ({"anchors_path": "nowhere.txt"}, "nine w,h pairs"),
        ({"weights": "nowhere.pt"}, "nowhere.pt"),
        ({"lr": -1}, "lr is -1"),
        ({"focal_gamma": 3}, "--focal_loss"),
        ({"cls_loss": "my_losses:Broken"}, "Use bce or focal"),
    ],
)
def test_a_wrong_flag_is_one_message_and_status_2(
    tiny_voc, tmp_path, monkeypatch, capsys, more, expected
):
    arguments = flags(tiny_voc, tmp_path / "run", **more)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_main(train.main)
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()  # nothing is made before all is known to be right


def test_without_data_both_ways_out_are_said(tmp_path):
    for name in ("voc_classes.txt", "yolo_anchors.txt"):
        (tmp_path / "model_data").mkdir(exist_ok=True)
        shutil.copy(ROOT / "model_data" / name, tmp_path / "model_data" / name)
    command = [sys.executable, str(ROOT / "train.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "VOCdevkit/VOC2007" in done.stderr
    assert "python -m tools.make_sample_voc" in done.stderr
    assert not list((tmp_path / "logs").glob("*"))  # no empty run folder stays


def test_a_folder_with_something_in_it_is_left_alone(tiny_voc, run_script, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = run_script("train.py", *flags(tiny_voc, tmp_path))
    assert done.returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_every_knob_is_read():
    tree = ast.parse((ROOT / "train.py").read_text(encoding="utf-8"))
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id == "config"
    }
    assert {field.name for field in dataclasses.fields(Config)} <= read


@pytest.mark.parametrize("conf_loss", ["bce", "ghm"])
def test_two_ranks_train_together_and_end(tiny_voc, tmp_path, conf_loss):
    more = ["--conf_loss", conf_loss, "--log_period", "1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun.append("--nproc_per_node=2")
    done = subprocess.run(
        [*torchrun, "train.py", *flags(tiny_voc, tmp_path / "run", batch_size=3), *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == ["2", "4", "6"]  # 8 pictures, 6 a step
    for row in rows:  # of both ranks, each way
        scales = [float(row[f"s{stride}_positives"]) for stride in (8, 16, 32)]
        assert sum(scales) == pytest.approx(float(row["positives"]), rel=1e-4)
    assert done.stdout.count("run folder:") == 1
