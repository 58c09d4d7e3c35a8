import ast
import dataclasses
import inspect
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from engine.settings import TrainingSettings
from losses.yolo_loss import YOLOLoss
from tests.training import (
    ROOT,
    STATEFUL,
    checkpoint_of,
    flags,
    rows_of,
    run_train,
    same_tensors,
    trained,
    without_times,
)
from train import Config
from utils.errors import run_script as run_main

FILES = {
    *("config.json", "metrics.csv", "best.pt", "last.pt", "loss.png", "map.png"),
    *("train_batch.jpg", "val_detections.jpg", "reliability.png", "cumulative_loss.png"),
    "conf_cells.json",
}


@pytest.fixture(scope="module")
def whole_run(tiny_voc, tmp_path_factory):
    """An uninterrupted run of three epochs: its folder and what it printed."""
    return trained(tiny_voc, tmp_path_factory.mktemp("runs") / "whole", **STATEFUL)


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
    assert all(float(row["val_loss"]) > 0 for row in rows[1:])
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
    for name in ("val/conf_threshold", "val/f1", "val/val_ap50"):
        assert [event.step for event in events.Scalars(name)] == [4, 6], name
    for name in ("reliability", "cumulative_loss", "val_detections"):
        assert [event.step for event in events.Images(name)] == [4, 6], name
    cells = json.loads((folder / "conf_cells.json").read_text())
    total = sum(cells["positive"]["loss"]) + sum(cells["negative"]["loss"])
    assert total > 0


def test_the_measured_alpha_is_told_once_and_logged_where_the_cells_are(tiny_voc, tmp_path):
    more = {"conf_loss": "focal(alpha='auto')", "log_period": 2, "batch_size": 2}
    folder, printed = trained(tiny_voc, tmp_path / "run", **more)
    assert printed.count('alpha="auto" weighs positives by ') == 1
    events = EventAccumulator(str(folder)).Reload().Scalars("step/conf_alpha")
    assert [event.step for event in events] == [1, 3, 5, 7, 9, 11]
    alphas = [event.value for event in events]
    assert f"{alphas[0]:.5g}, negatives by {1 - alphas[0]:.5g}" in printed
    rows = rows_of(folder)
    assert [float(row["conf_alpha"]) for row in rows] == pytest.approx(alphas[1::2], rel=1e-5)
    measured = checkpoint_of(folder)["loss"]
    positives, counted = (measured[f"conf_loss.measured.{k}"] for k in ("positives", "counted"))
    assert alphas[-1] == pytest.approx((1 - positives / counted).item(), abs=0.01)
    assert 0.9 < alphas[-1] < 1


def test_a_given_alpha_is_no_figure(whole_run):
    folder, printed = whole_run
    assert [row["conf_alpha"] for row in rows_of(folder)] == [""] * 3
    assert 'alpha="auto"' not in printed


def test_checkpoints_hold_what_the_contract_says_and_are_plain(whole_run):
    folder, _ = whole_run
    best, last = checkpoint_of(folder, "best.pt"), checkpoint_of(folder)
    wanted = [
        "format_version",
        "version",
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


@pytest.mark.parametrize("more", [{"num_workers": 2}, {"recompute": ()}])
def test_the_same_seed_gives_the_same_run_whatever_it_costs(whole_run, tiny_voc, tmp_path, more):
    folder, _ = whole_run
    other, _ = trained(tiny_voc, tmp_path / "b", **more, **STATEFUL)
    assert without_times(rows_of(other)) == without_times(rows_of(folder))


def test_images_from_a_file_train_as_those_from_disk(whole_run, tiny_voc, tmp_path):
    more = {"cache": (), "cache_gb": 0, "cache_dir": tmp_path / "images"}
    other, _ = trained(tiny_voc, tmp_path / "b", **more, **STATEFUL)
    assert without_times(rows_of(other)) == without_times(rows_of(whole_run[0]))
    assert len(list((tmp_path / "images").glob("images-*.cache"))) == 1


def test_a_frozen_backbone_keeps_weights_and_statistics(whole_run, tiny_voc, tmp_path):
    weights = whole_run[0] / "best.pt"
    more = {"weights": weights, "epochs": 2, "freeze_epochs": 2, "freeze_batch_size": 4}
    folder, _ = trained(tiny_voc, tmp_path / "run", **more)
    before, after = (
        checkpoint_of(whole_run[0], "best.pt")["model"],
        checkpoint_of(folder)["raw_model"],
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any(name.startswith("backbone.") for name in changed)


def test_unfreezing_moves_the_backbone_with_its_own_batch_size(whole_run, tiny_voc, tmp_path):
    weights = whole_run[0] / "best.pt"
    more = {"weights": weights, "epochs": 2, "freeze_epochs": 1, "freeze_batch_size": 8}
    folder, _ = trained(tiny_voc, tmp_path / "run", **more)
    assert [row["step"] for row in rows_of(folder)] == ["1", "3"]
    before, after = (
        checkpoint_of(whole_run[0], "best.pt")["model"],
        checkpoint_of(folder)["raw_model"],
    )
    assert any(not torch.equal(before[n], after[n]) for n in before if n.startswith("backbone."))


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
        ({"hsv": (5, 0, 0), "train": "nowhere:train"}, "hue is 5"),  # before the data are read
        ({"multi_scale": 1}, "multi_scale is 1"),
        ({"multi_scale": 0.1}, "changes nothing"),
        ({"focal_gamma": 3}, "--focal_loss"),
        ({"cache_dir": "elsewhere"}, "give --cache"),
        ({"cache_gb": "inf"}, "cache_gb is inf"),
        ({"cache": (), "cache_gb": 0, "cache_dir": "/dev/null"}, "cache_dir /dev/null"),
        ({"cls_loss": "my_losses:Broken"}, "Allowed: asymmetric("),
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
    done = run_train(cwd=tmp_path)
    assert done.returncode == 2
    assert "VOCdevkit/VOC2007" in done.stderr
    assert "python -m tools.make_sample_voc" in done.stderr
    assert not list((tmp_path / "logs").glob("*"))  # no empty run folder stays


def test_a_folder_with_something_in_it_is_left_alone(tiny_voc, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = run_train(*flags(tiny_voc, tmp_path))
    assert done.returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_every_knob_is_read():
    """By its name, by a list that `shared` is given, or by the part that has it as an argument."""
    tree = ast.parse((ROOT / "train.py").read_text(encoding="utf-8"))
    read = set(inspect.signature(YOLOLoss).parameters)
    read |= {field.name for field in dataclasses.fields(TrainingSettings)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            read |= {node.attr} if node.value.id == "config" else set()
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "shared":
            listed = node.args[1]
            read |= set(ast.literal_eval(listed)) if isinstance(listed, ast.Tuple) else set()
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
    assert [row["step"] for row in rows] == ["2", "4", "6"]  # 8 images, 6 a step
    for row in rows:  # of both ranks, each way
        scales = [float(row[f"s{stride}_positives"]) for stride in (8, 16, 32)]
        assert sum(scales) == pytest.approx(float(row["positives"]), rel=1e-4)
    assert done.stdout.count("run folder:") == 1


def test_faults_of_both_splits_are_said_at_once(tiny_voc, tmp_path):
    voc = tmp_path / "Broken"
    shutil.copytree(tiny_voc, voc)
    for split in ("train", "val"):
        first = (voc / "ImageSets" / "Main" / f"{split}.txt").read_text().splitlines()[0]
        (voc / "Annotations" / f"{first}.xml").write_text(f"<broken in {split}")
    done = run_train(*flags(voc, tmp_path / "run"))
    assert done.returncode == 2
    for split in ("train", "val"):
        name = (voc / "ImageSets" / "Main" / f"{split}.txt").read_text().splitlines()[0]
        assert f"{name}.xml" in done.stderr
    assert not (tmp_path / "run").exists()
