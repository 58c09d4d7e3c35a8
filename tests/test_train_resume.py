"""A run that was stopped goes on as if it had not been, and says what it cannot change."""

import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

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

STOPPING = """
import os
import signal
from torch import nn
from torch.nn import functional as F

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
OWN = "my_losses:Stopping()"


@pytest.fixture(scope="module")
def whole_run(tiny_voc, tmp_path_factory):
    """The folder of an uninterrupted run of three epochs."""
    return trained(tiny_voc, tmp_path_factory.mktemp("runs") / "whole", **STATEFUL)[0]


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    assert condition(), "the process ended or took too long"


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(whole_run, tiny_voc, tmp_path, kind):
    cut = tmp_path / "cut"
    command = [sys.executable, "train.py", *flags(tiny_voc, cut, **STATEFUL)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for((cut / "last.pt").exists, process)
    process.send_signal(kind)
    process.wait(timeout=120)
    resumed = run_train("--resume", cut)
    assert resumed.returncode == 0, resumed.stderr
    assert without_times(rows_of(cut)) == without_times(rows_of(whole_run))
    ours, whole = checkpoint_of(cut), checkpoint_of(whole_run)
    for part in ("raw_model", "model", "loss"):
        assert same_tensors(ours[part], whole[part])
    assert whole["loss"]["conf_loss.shares"].sum() > 0


def test_a_resume_cannot_change_the_network_and_says_so(whole_run):
    done = run_train("--resume", whole_run, "--width", 0.5)
    assert done.returncode == 2
    assert "cannot change width" in done.stderr
    done = run_train("--resume", whole_run, "--weights", whole_run / "best.pt")
    assert done.returncode == 2
    assert "leave --weights out" in done.stderr
    done = run_train("--resume", whole_run / "best.pt")
    assert done.returncode == 2
    assert "last.pt" in done.stderr


def test_a_finished_run_can_be_given_more_epochs(whole_run, tmp_path):
    folder = tmp_path / "more"
    shutil.copytree(whole_run, folder)
    done = run_train("--resume", folder, "--epochs", 4)
    assert done.returncode == 0, done.stderr
    assert [row["epoch"] for row in rows_of(folder)] == ["1", "2", "3", "4"]


@pytest.fixture(scope="module")
def stopped(tiny_voc, tmp_path_factory):
    """A user's folder with a loss in my_losses.py, a whole run and one that was cut at step 3."""
    folder = tmp_path_factory.mktemp("a user's")
    (folder / "my_losses.py").write_text(STOPPING)
    more = {"conf_loss": OWN, "batch_size": 2, "epochs": 2, "log_period": 2}
    whole = run_train(*flags(tiny_voc, folder / "whole", **more), cwd=folder)
    assert whole.returncode == 0, whole.stderr
    cut = run_train(*flags(tiny_voc, folder / "cut", **more), cwd=folder, STOP_AT="3")
    assert cut.returncode == 130, cut.stderr
    return folder, cut.stdout


def command_in(text):
    """The arguments of the train.py command that a message ends with."""
    assert "python train.py " in text
    return shlex.split(text.rpartition("python train.py ")[2])


@pytest.mark.parametrize("spelling", [[], ["--conf_loss", "my_losses:Stopping"]])
def test_a_loss_of_ones_own_is_refused_with_the_command_that_was_said_after_the_stop(
    stopped, spelling
):
    folder, said = stopped
    done = run_train("--resume", folder / "cut", *spelling, cwd=folder)
    assert done.returncode == 2
    assert command_in(done.stderr) == command_in(said)
    assert command_in(said) == ["--resume", str(folder / "cut"), "--conf_loss", OWN]


def test_a_run_stopped_between_two_steps_goes_on_at_that_step_with_that_command(stopped):
    folder, said = stopped
    last = checkpoint_of(folder / "cut")
    assert (last["epoch"], last["step"], last["schedule"]["epoch_step"]) == (0, 3, 3)
    resumed = run_train(*command_in(said), cwd=folder)
    assert resumed.returncode == 0, resumed.stderr
    rows = [without_times(rows_of(folder / name)) for name in ("whole", "cut")]
    assert rows[0] == rows[1]
    models = [checkpoint_of(folder / name)["raw_model"] for name in ("whole", "cut")]
    assert same_tensors(*models)
