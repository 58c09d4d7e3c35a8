import json
import signal
import subprocess
import sys

import pytest

from lab.plan import Run
from lab.runs import (
    LOG_LINES,
    Child,
    Laboratory,
    check_free,
    epochs_of,
    evaluate_command,
    log_end,
    train_command,
)
from tests.test_compare_plan import plan
from utils.errors import UserError

MINE = "my_losses:Mine(scale=1)"


def test_a_run_begins_anew_unless_it_can_go_on(tmp_path):
    for run in plan(["bce", MINE], [4]).runs(tmp_path):
        assert train_command(run, plan(lr=["1"]))[1:] == [
            *("--conf_loss", run.loss, "--seed", "4", "--save_dir", str(run.folder)),
            *("--train", "R:train", "--val", "R:val", "--epochs", "3", "--lr", "1"),
        ]
        run.folder.mkdir(parents=True)
        (run.folder / "config.json").write_text("{}")
        assert "--resume" not in train_command(run, plan())
        assert not run.folder.exists()
        run.folder.mkdir()
        (run.folder / "last.pt").write_bytes(b"")
        own = ["--conf_loss", MINE] if run.loss == MINE else []
        assert train_command(run, plan())[1:] == ["--resume", str(run.folder), *own]


def test_the_evaluation_runs_as_the_training_did(tmp_path):
    run = Run("bce", 0, tmp_path / "seed-0")
    run.folder.mkdir()
    config = {"device": "cuda:1", "batch_size": 16, "num_workers": 0, "skip_bad": True, "lr": 3}
    (run.folder / "config.json").write_text(json.dumps({**config, "include_difficult": False}))
    assert evaluate_command(run, plan())[1:] == [
        *("--weights", str(run.folder / "best.pt"), "--data", "R:test"),
        *("--save_dir", str(run.test_folder), "--device", "cuda:1"),
        *("--batch_size", "16", "--num_workers", "0", "--skip_bad"),
    ]


def test_an_evaluation_that_a_crash_cut_off_does_not_count(tmp_path):
    run = Run("bce", 0, tmp_path / "seed-0")
    assert run.evaluation() is None
    run.test_folder.mkdir()
    (run.test_folder / "evaluation.json").write_text('{"AP50": 0.5, "per_cl')
    assert run.evaluation() is None
    (run.test_folder / "evaluation.json").write_text('{"AP50": 0.5}')
    assert run.evaluation() == {"AP50": 0.5}


def test_a_run_that_a_process_still_trains_is_left_alone(tmp_path):
    run = plan().runs(tmp_path)[0]
    run.folder.mkdir(parents=True)
    check_free(run)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (run.folder / "running.pid").write_text(str(process.pid))
    with pytest.raises(UserError, match=f"process {process.pid} still trains"):
        Laboratory(plan(), tmp_path, jobs=1)
    process.communicate(b"\n")
    Laboratory(plan(), tmp_path, jobs=1)


def test_progress_counts_whole_rows(tmp_path):
    run = Run("bce", 0, tmp_path)
    assert epochs_of(run) == 0
    for text, epochs in [("", 0), ("epoch,step\n", 0), ("epoch,step\n1,2\n2,4\n3", 2)]:
        (tmp_path / "metrics.csv").write_text(text)
        assert epochs_of(run) == epochs


def test_the_end_of_a_log_is_short(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"\n".join(b"line %d \xff" % number for number in range(99)) + b"\n\n")
    lines = log_end(path).splitlines()
    assert len(lines) == LOG_LINES
    assert lines[-1].startswith("  line 98")


def test_flags_that_training_refuses_stop_the_whole_plan(tmp_path):
    laboratory = Laboratory(plan(widht=["3"]), tmp_path, jobs=1)
    with pytest.raises(UserError, match=r"(?s)widht.*correct the flags"):
        laboratory.work()
    assert not (tmp_path / "runs" / "focal").exists()


def test_runs_that_crash_are_told_and_the_others_go_on(tmp_path, capsys):
    laboratory = Laboratory(plan(), tmp_path, jobs=4)
    killed, failed, good, last = laboratory.waiting
    laboratory.waiting.clear()
    failed.folder.mkdir(parents=True)
    (failed.folder / "config.json").write_text("{}")  # status 2, but not from the start
    write = f"open({str(good.test_folder / 'evaluation.json')!r}, 'w').write('{{\"AP50\": 0.5}}')"
    good.test_folder.mkdir(parents=True)
    for run, code in [
        (killed, "import os; print('out of', 'memory', flush=True); os.kill(os.getpid(), 9)"),
        (failed, "raise SystemExit(2)"),
        (good, write),
        (last, "pass"),
    ]:
        laboratory.children.append(Child(run, ["-c", code], threads=1, evaluates=True))
    assert laboratory.work()
    assert laboratory.finished == {good}
    assert len(laboratory.failures) == 3
    said = "".join(laboratory.failures)
    assert "bce, seed 0 was killed by signal 9" in said
    assert "focal, seed 0 ended with status 2" in said
    assert "focal, seed 1 left no evaluation.json, see " in said
    assert "  out of memory" in capsys.readouterr().out
    notes = [run.failure.read_text() for run in (killed, failed, last)]
    assert notes == ["was killed by signal 9", "ended with status 2", "left no evaluation.json"]
    assert not good.failure.exists()
    Child(killed, ["-c", ""], threads=1, evaluates=True).process.wait()
    assert not killed.failure.exists()  # it is being tried again


def test_a_stop_ends_the_children_and_starts_no_other(tmp_path):
    laboratory = Laboratory(plan(), tmp_path, jobs=1)
    code = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"
    child = Child(laboratory.waiting.popleft(), ["-c", code], threads=1, evaluates=False)
    laboratory.children.append(child)
    assert not laboratory.work()
    assert child.process.returncode == -signal.SIGTERM
    assert len(laboratory.waiting) == 3
    assert laboratory.failures == []


@pytest.mark.parametrize(("given", "threads"), [({}, "3"), ({"OMP_NUM_THREADS": "7"}, "7")])
def test_a_child_has_its_share_of_the_cores_unless_told_otherwise(
    tmp_path, monkeypatch, given, threads
):
    monkeypatch.delenv("OMP_NUM_THREADS")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    run = plan().runs(tmp_path)[0]
    code = "import os; print(os.environ['OMP_NUM_THREADS'])"
    Child(run, ["-c", code], threads=3, evaluates=False).process.wait()
    assert run.log.read_text().splitlines()[-1] == threads
