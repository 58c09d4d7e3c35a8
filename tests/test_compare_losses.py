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
from engine.process import seed_everything
from engine.start import build_network, choose_scale_xy, set_prior
from lab.compare import (
    Config,
    carry_out,
    changed_settings,
    check_inputs,
    main,
    plan_of,
    whole_plan,
)
from lab.lock import folder_lock
from lab.plan import slug, write_plan
from losses.conf import CONF_LOSSES, build_conf_loss, conf_settings
from nets.decode import YOLOV4_ANCHORS
from tests.test_compare_plan import plan
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
MINE = "my_losses:Deadly(scale=1)"
# BCE that ends comparison and training at once, at its call of the number KILL_AT; or, with
# KILL_AT=import, the comparison alone, while the training still imports.
MY_LOSSES = """
import os
import signal
import sys
import time

from torch import nn
from torch.nn import functional as F

if os.environ.get("KILL_AT") == "import" and sys.argv[0].endswith("train.py"):
    with open("importing", "w") as file:
        file.write(str(os.getpid()))
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)


class Deadly(nn.Module):
    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale, self.calls = scale, 0

    def forward(self, logits, targets):
        self.calls += 1
        if str(self.calls) == os.environ.get("KILL_AT"):
            deadline = time.monotonic() + 60  # epoch 1 is saved behind the training
            last = os.path.join(sys.argv[sys.argv.index("--save_dir") + 1], "last.pt")
            while not os.path.exists(last) and time.monotonic() < deadline:
                time.sleep(0.1)
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
    model, report = build_network(
        ("a", "b"), width=config.width, depth=config.depth, weights="", weights_classes=""
    )
    loss = train.build_loss(config, YOLOV4_ANCHORS, 2, choose_scale_xy(None, report, None))
    set_prior(model, loss.prior_pi, report)
    return model.state_dict(), loss.prior_pi


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

    def run(*seeds, losses=("bce", MINE), **environment):
        command = [sys.executable, "-m", "lab.compare", "--losses", *losses]
        return subprocess.run(
            [*command, "--seeds", *seeds, *flags.split()],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def rows_without_times(folder):
    timed = ("images_per_second", "seconds", "memory_gb")
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def test_a_plan_that_was_killed_ends_as_if_it_had_not_been(compare, tmp_path):
    """Three calls an epoch: two steps and the validation. BCE, not interrupted, is the measure."""
    lab = tmp_path / "lab"
    killed = compare("1", KILL_AT="4")  # in epoch 2 of the second run
    assert killed.returncode == -signal.SIGKILL
    done = compare("1")
    assert done.returncode == 0, done.stderr
    assert "2 runs of 2 epochs, 1 finished" in done.stdout
    assert "2 of 2 runs are finished" in (lab / "report.html").read_text(encoding="utf-8")
    ours, bce = lab / "runs" / slug(MINE) / "seed-1", lab / "runs" / "bce/seed-1"
    assert len(rows_without_times(bce)) == 2
    assert rows_without_times(ours) == rows_without_times(bce)
    assert (ours / "train_batch.jpg").read_bytes() == (bce / "train_batch.jpg").read_bytes()
    figures = [
        json.loads((folder.with_name("seed-1-test") / "evaluation.json").read_text())
        for folder in (ours, bce)
    ]
    for name in ("AP50", "highest_score", "per_class"):
        assert figures[0][name] == figures[1][name]
    log = ours.with_name("seed-1.log").read_text(encoding="utf-8")
    started = re.findall(r"^\$ python \S+train.py (\S+)", log, re.MULTILINE)
    assert started == ["--conf_loss", "--resume"]


def test_a_stop_says_how_to_go_on(tmp_path, capsys):
    threading.Timer(1.0, signal.raise_signal, [signal.SIGTERM]).start()
    with pytest.raises(SystemExit) as stop:
        carry_out(plan(), tmp_path, jobs=2)
    assert stop.value.code == 130
    assert "stopped; resume with the same command:\n  python -m lab" in capsys.readouterr().out


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["compare_losses", *map(str, arguments)])
    main()


def test_a_second_comparison_of_a_folder_is_refused(tiny_voc, tmp_path, monkeypatch):
    flags = f"--test {tiny_voc}:val --classes_path {tiny_voc}/classes.txt --save_dir {tmp_path}"
    with folder_lock(tmp_path), pytest.raises(UserError, match=f"{tmp_path} is in use"):
        run_main(monkeypatch, *flags.split())
    assert not (tmp_path / "plan.json").exists()


def test_no_rival_starts_while_a_child_of_a_killed_comparison_imports(compare, tmp_path):
    killed = compare("0", losses=[MINE], KILL_AT="import")
    assert killed.returncode == -signal.SIGKILL
    child = int((tmp_path / "importing").read_text())
    try:
        assert not list(tmp_path.glob("lab/runs/*/*/running.pid"))
        with (
            pytest.raises(UserError, match="had started before it was killed"),
            folder_lock(tmp_path / "lab"),
        ):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("typed", [["--seeds", "0"], ["--widht", "1"], ["--jobs=2"], ["--cache"]])
def test_a_report_refuses_flags_that_it_would_ignore(monkeypatch, tmp_path, typed):
    write_plan(tmp_path, plan())
    name = typed[0].split("=")[0]
    with pytest.raises(UserError, match=f"leave {name} out"):
        run_main(monkeypatch, "--report_only", "--save-dir", tmp_path, *typed)
    assert not (tmp_path / "results.md").exists()


def test_a_report_holds_the_losses_that_are_given_in_their_order(monkeypatch, tmp_path, capsys):
    write_plan(tmp_path, plan(["bce", "focal(gamma=1)", "poly1"]))
    typed = ["--report_only", "--save_dir", tmp_path]
    run_main(monkeypatch, *typed, "--losses", "poly1", "focal( gamma = 1 )")
    assert "note: Left out of this report: bce." in capsys.readouterr().out
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| ([a-z]\S+?)<br>", text, re.MULTILINE) == ["poly1", "focal(gamma=1)"]
    assert "against poly1" in text
    assert "Left out of this report: bce." in text
    assert (tmp_path / "results.csv").read_text().count("\n") == 1 + 2 * 2
    run_main(monkeypatch, *typed)
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "against bce" in text
    assert "Left out" not in text


def test_a_report_of_a_loss_that_the_plan_lacks_or_twice_of_one_is_an_error(monkeypatch, tmp_path):
    write_plan(tmp_path, plan(["bce", "poly1"]))
    typed = ["--report_only", "--save_dir", tmp_path, "--losses", "bce"]
    with pytest.raises(UserError, match=r"no runs of 'ghm'. It has bce, poly1"):
        run_main(monkeypatch, *typed, "ghm")
    with pytest.raises(UserError, match="twice"):
        run_main(monkeypatch, *typed, "bce( )")


def test_a_spelling_of_the_folder_s_own_loss_goes_on_with_its_runs(tmp_path):
    write_plan(tmp_path, plan(["bce", "focal(gamma= 1)"]))
    config = Config(losses=(" focal(gamma=1)", "ghm"), save_dir=str(tmp_path))
    assert plan_of(config, []).losses == ("focal(gamma= 1)", "ghm")


def test_a_changed_default_of_a_loss_is_said_before_it_trains(tmp_path):
    both = plan(["focal", "bce"])
    focal, bce, *_ = both.runs(tmp_path)
    for run, gain in ((focal, 3.0), (bce, 1.0)):
        run.folder.mkdir(parents=True)
        settings = {**conf_settings(build_conf_loss(run.loss))._asdict(), "gain": gain}
        (run.folder / "config.json").write_text(json.dumps({"conf_settings": settings}))
    (note,) = changed_settings(both, tmp_path)
    assert note.startswith("focal ")
    assert "gain 3.0 (seed 0), 10.0 (now)." in note
