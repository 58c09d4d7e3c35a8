"""What the tests of train.py share: a run that takes a second, and ways to look at it."""

import csv
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import torch

from train import Config, make_settings

ROOT = Path(__file__).resolve().parent.parent
STATEFUL = {"conf_loss": "ghm", "log_period": 1}  # a loss with a memory, all steps looked at


def flags(voc, save_dir=None, **more):
    """The flags of a run that takes a second."""
    values = {
        "train": f"{voc}:train",
        "val": f"{voc}:val",
        "classes_path": voc / "classes.txt",
        "anchors_path": ROOT / "model_data" / "yolo_anchors.txt",
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


def training_settings(phases, **changes):
    """train.py's constants for these phases: with SGD, without workers, each epoch evaluated."""
    plain = make_settings(Config(epochs=1), torch.device("cpu"))
    quick = {"optimizer": "sgd", "num_workers": 0, "eval_period": 1}
    return dataclasses.replace(plain, phases=phases, **{**quick, **changes})


def run_train(*arguments, cwd=ROOT, **environment):
    """Run train.py as a user does, in a folder. Returns the finished process."""
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def trained(voc, folder, **more):
    """An uninterrupted run of three epochs in `folder`: the folder and what it printed."""
    done = run_train(*flags(voc, folder, **more))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def rows_of(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def without_times(rows):
    timed = ("images_per_second", "seconds", "memory_gb")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def checkpoint_of(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)


def same_tensors(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[key], second[key]) for key in first)
