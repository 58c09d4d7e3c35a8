import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.console import slow_start
from engine.runlog import COLUMNS, RunLog, new_run_folder, read_metrics, removed_if_unused
from engine.statistics import COUNTS, NO_GROUPS, TERMS
from utils.errors import UserError


def row(epoch, **more):
    values = dict.fromkeys(("loss", "loc", "conf", "cls", "val_loss", "lr"), 0.5)
    return {"epoch": epoch, "step": epoch * 10, "images_per_second": 3.0, **values, **more}


def test_a_run_folder_must_be_empty_and_is_made(tmp_path):
    folder = new_run_folder(str(tmp_path / "a" / "b"))
    assert folder.is_dir()
    assert new_run_folder(str(folder)) == folder  # empty: fine
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"another --save_dir, or empty it\.$"):
        new_run_folder(str(folder))
    (folder / "last.pt").write_bytes(b"a run")
    with pytest.raises(UserError, match=f"resume it with --resume {folder}"):
        new_run_folder(str(folder))
    with pytest.raises(UserError, match="cannot make"):
        new_run_folder(str(folder / "notes.txt" / "c"))
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt])
def test_a_folder_in_which_nothing_was_begun_goes(tmp_path, error):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "last.pt").write_bytes(b"a run")
    for folder in (new_run_folder(str(tmp_path / "new")), tmp_path / "used"):
        with pytest.raises(error), removed_if_unused(folder):
            raise error
    assert [path.name for path in tmp_path.iterdir()] == ["used"]


def test_a_quarter_of_a_training_that_taught_nothing_is_reported_once_it_is_over():
    rows = [{"loss": f"{3 - i / 100}", "step": str(13 * (i + 1))} for i in range(25)]
    note = slow_start(rows, epochs=100, best_ap50=0.004)
    assert "AP50 is still below 0.01 after 25 epochs (325 steps)" in note
    assert "from 3 to 2.76" in note
    assert slow_start(rows[:24], epochs=100, best_ap50=0.004) == ""
    assert slow_start(rows, epochs=100, best_ap50=0.02) == ""
    assert slow_start(rows[:4], epochs=4, best_ap50=0.0) == ""
    assert slow_start(rows, epochs=100, best_ap50=float("nan")) == ""


def test_two_runs_of_one_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {new_run_folder("") for _ in range(5)}
    assert len(folders) == 5


def test_metrics_config_curves_and_events_are_written(tmp_path):
    with RunLog(tmp_path, {"lr": None, "name": "Größe"}) as log:
        line = log.epoch(row(1))
        assert "AP50" not in line
        line = log.epoch(row(2, val_ap50=0.25, val_ap=0.1, f1=0.4, conf_threshold=0.3))
        assert "AP50 0.2500" in line
        log.image("train_batch", np.zeros((32, 32, 3), np.uint8), 1)
    assert json.loads((tmp_path / "config.json").read_text("utf-8"))["name"] == "Größe"
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert ",".join(rows[0]).startswith("epoch,step,lr,loss,loc,conf,cls,val_loss,val_ap50,")
    assert [r["val_ap50"] for r in rows] == ["", "0.25"]
    for name in ("loss.png", "map.png", "train_batch.jpg"):
        assert (tmp_path / name).stat().st_size > 100, name
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [10, 20]
    assert events.Scalars("val/val_ap50")[0].value == 0.25


def test_figures_of_validation_are_filed_under_val(tmp_path):
    with RunLog(tmp_path, {}) as log:
        log.epoch(row(1, val_ap50=0.25, val_ap=0.1, f1=0.4, conf_threshold=0.3, ece=0.05))
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]
    assert {tag for tag in tags if tag.startswith("val/")} == {
        *("val/val_loss", "val/val_ap50", "val/val_ap", "val/f1", "val/conf_threshold", "val/ece")
    }
    assert not {"train/f1", "train/conf_threshold", "train/ece"} & {*tags}


def test_a_measured_alpha_is_filed_at_each_step_and_told_the_first_time(tmp_path):
    figures = dict.fromkeys((*TERMS, *COUNTS, "grad_norm"), 1.0)
    other = tmp_path / "other"
    other.mkdir()
    with RunLog(tmp_path, {}) as log:
        told = [log.step(step, figures | {"conf_alpha": 0.99}, NO_GROUPS) for step in (1, 2)]
        log.epoch(row(1, conf_alpha=0.99))
    with RunLog(other, {}) as log:
        assert log.step(1, figures, NO_GROUPS) == ""
    assert "positives by 0.99, negatives by 0.01" in told[0]
    assert told[1] == ""
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("step/conf_alpha")] == [1, 2]
    assert read_metrics(tmp_path / "metrics.csv", 1)[0]["conf_alpha"] == "0.99"


def test_a_resumed_log_drops_later_and_cut_rows(tmp_path):
    with RunLog(tmp_path, {}) as log:
        for epoch in (1, 2, 3):
            log.epoch(row(epoch))
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("4,40,0.5")  # killed in the middle of a line
    with RunLog(tmp_path, {}, last_epoch=2) as log:
        log.epoch(row(3, loss=0.75))
    rows = read_metrics(tmp_path / "metrics.csv", 99)
    assert [r["epoch"] for r in rows] == ["1", "2", "3"]
    assert rows[2]["loss"] == "0.75"
    assert set(rows[0]) == set(COLUMNS)


def test_a_folder_in_use_by_a_living_process_is_refused(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        (tmp_path / "running.pid").write_text(str(other.pid))
        with pytest.raises(UserError, match=f"in use by process {other.pid}"):
            RunLog(tmp_path, {})
        other.communicate(b"\n")
    with RunLog(tmp_path, {}):  # the other has died: its mark does not count
        assert (tmp_path / "running.pid").read_text() == str(os.getpid())
    assert not (tmp_path / "running.pid").exists()
