import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import train
from engine.randomness import seed_everything
from losses.confidence import CONF_LOSSES
from tests.test_compare_plan import plan
from tools.compare_losses import Config, carry_out, check_inputs, main, plan_of, whole_plan
from tools.compare_plan import slug, write_plan
from utils.decode import read_anchors
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
MINE = "my_losses:Deadly(scale=1)"
# BCE that ends comparison and training at once, at its call of the number KILL_AT.
MY_LOSSES = """
import os
import signal

from torch import nn
from torch.nn import functional as F


class Deadly(nn.Module):
    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale, self.calls = scale, 0

    def forward(self, logits, targets):
        self.calls += 1
        if str(self.calls) == os.environ.get("KILL_AT"):
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        return self.scale * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
"""


def test_a_plan_of_which_no_run_has_begun_may_change(tmp_path, capsys):
    write_plan(tmp_path, plan(lr=["1"]))
    assert whole_plan(plan(lr=["2"]), tmp_path) == plan(lr=["2"])
    begun = plan().runs(tmp_path)[0].folder
    begun.mkdir(parents=True)
    (begun / "config.json").write_text("{}")
    with pytest.raises(UserError, match="--lr 1"):
        whole_plan(plan(lr=["2"]), tmp_path)
    assert whole_plan(plan(lr=["1"], seeds=[7]), tmp_path).seeds == (0, 1, 7)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"losses": ("bce", "fokal")}, "Did you mean 'focal'"),
        ({"losses": ("focal(gama=1)",)}, "gama"),
        ({"epochs": 0}, "--epochs 0"),
        ({"jobs": 0}, "--jobs 0"),
        ({"test": "nowhere:test"}, "nowhere"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(tiny_voc, changes, said):
    values = {"losses": ("bce",), "test": f"{tiny_voc}:val", "epochs": 3, **changes}
    config = Config(**values)
    with pytest.raises(UserError, match=said):
        check_inputs(
            plan_of(config, ["--classes_path", str(tiny_voc / "classes.txt")]), config.jobs
        )


def first_weights(conf_loss):
    """What train.py starts from with a loss, and the prior that the loss declares."""
    config = train.Config(conf_loss=conf_loss, width=0.01, depth=0.01, input_shape=(64, 64))
    seed_everything(3, deterministic=False)
    loss = train.build_loss(config, read_anchors(config.anchors_path), 2)
    return train.build_model(config, ("a", "b"), loss.prior_pi, None).state_dict(), loss.prior_pi


@pytest.mark.parametrize("name", sorted(CONF_LOSSES))
def test_every_loss_starts_from_the_same_weights_but_for_its_prior(name):
    bce, _ = first_weights("bce")
    own, prior_pi = first_weights(name)
    differing = [key for key in bce if not torch.equal(own[key], bce[key])]
    assert all(key.endswith(".bias") and own[key].numel() == 21 for key in differing)
    assert prior_pi is not None or not differing


@pytest.fixture
def compare(tiny_voc, tmp_path):
    """Run the tool in a folder with my_losses.py."""
    (tmp_path / "my_losses.py").write_text(MY_LOSSES)
    flags = f"--test {tiny_voc}:val --train {tiny_voc}:train --val {tiny_voc}:val --epochs 2"
    flags += f" --classes_path {tiny_voc}/classes.txt --width 0.01 --depth 0.01 --num_workers 0"
    flags += f" --anchors_path {ROOT}/model_data/yolo_anchors.txt --input_shape 64 64 --device cpu"
    flags += " --batch_size 4 --eval_period 2 --save_dir lab"

    def run(*arguments, **environment):
        command = [sys.executable, "-m", "tools.compare_losses", "--losses", "bce", MINE]
        return subprocess.run(
            [*command, "--seeds", *arguments, *flags.split()],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def rows_without_times(folder):
    timed = ("pictures_per_second", "seconds", "memory_gb")
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def test_a_plan_that_was_killed_ends_as_if_it_had_not_been(compare, tmp_path):
    """Three calls an epoch: two steps and the validation. BCE, not interrupted, is the measure."""
    lab = tmp_path / "lab"
    killed = compare("0", "1", KILL_AT="4")  # in epoch 2 of the second run
    assert killed.returncode == -signal.SIGKILL
    assert (lab / "comparing.pid").exists()
    done = compare("0", "1")
    assert done.returncode == 0, done.stderr
    assert not (lab / "comparing.pid").exists()
    assert "4 runs of 2 epochs, 1 finished" in done.stdout
    assert "4 of 4 runs are finished" in (lab / "report.html").read_text(encoding="utf-8")
    for seed in (0, 1):
        ours, bce = lab / "runs" / slug(MINE) / f"seed-{seed}", lab / "runs" / f"bce/seed-{seed}"
        assert len(rows_without_times(bce)) == 2
        assert rows_without_times(ours) == rows_without_times(bce)
        assert (ours / "train_batch.jpg").read_bytes() == (bce / "train_batch.jpg").read_bytes()
        figures = [
            json.loads((folder.with_name(f"seed-{seed}-test") / "evaluation.json").read_text())
            for folder in (ours, bce)
        ]
        assert figures[0]["AP50"] == figures[1]["AP50"]
        assert figures[0]["highest_score"] == figures[1]["highest_score"]
        assert figures[0]["per_class"] == figures[1]["per_class"]
    assert rows_without_times(ours) != rows_without_times(ours.with_name("seed-0"))
    log = ours.with_name("seed-0.log").read_text(encoding="utf-8")
    assert re.findall(r"^\$ python \S+train.py (\S+)", log, re.MULTILINE) == [
        "--conf_loss",
        "--resume",
    ]


def test_a_stop_says_how_to_go_on(tmp_path, capsys):
    threading.Timer(1.0, signal.raise_signal, [signal.SIGTERM]).start()
    with pytest.raises(SystemExit) as stop:
        carry_out(plan(), tmp_path, jobs=2)
    assert stop.value.code == 130
    assert "stopped; the same command goes on:\n  python -m tools" in capsys.readouterr().out


def test_a_second_comparison_of_a_folder_is_refused(tiny_voc, tmp_path, monkeypatch):
    (tmp_path / "comparing.pid").write_text(str(os.getppid()))
    flags = f"--test {tiny_voc}:val --classes_path {tiny_voc}/classes.txt --save_dir {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["compare_losses", *flags.split()])
    with pytest.raises(UserError, match=f"in use by process {os.getppid()}"):
        main()
    assert (tmp_path / "comparing.pid").read_text() == str(os.getppid())
    assert not (tmp_path / "plan.json").exists()
