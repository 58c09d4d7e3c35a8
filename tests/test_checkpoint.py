import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nets.yolo import YoloV4
from utils.errors import UserError
from weights.checkpoint import (
    build_model,
    cpu_copy,
    read_checkpoint,
    save_checkpoint,
)

ROOT = Path(__file__).resolve().parent.parent


def metadata(**changes):
    torch.manual_seed(0)
    model = YoloV4(2, width=0.01, depth=0.01)
    values = {
        "model": cpu_copy(model.state_dict()),
        "class_names": ["a", "b"],
        "anchors": [[10.0 + i, 10.0 + i] for i in range(9)],
        "input_shape": [64, 64],
        "width": 0.01,
        "depth": 0.01,
        "scale_xy": [1.2, 1.1, 1.05],
        "conf_loss": "bce",
        "conf_threshold": 0.3,
        "config": {"epochs": 1, "input_shape": (64, 64)},
        "epoch": 1,
        "metrics": {"AP50": 0.5, "per_class": {"a": float("nan")}},
    }
    return values | changes


def test_a_checkpoint_comes_back_as_it_was_and_is_plain(tmp_path):
    path = tmp_path / "best.pt"
    save_checkpoint(path, metadata())
    plain = torch.load(path, weights_only=True)
    assert plain["format_version"] == 1
    read = read_checkpoint(path)
    assert read["config"] == metadata()["config"]
    for key, value in metadata()["model"].items():
        assert torch.equal(read["model"][key], value), key
    assert list(tmp_path.iterdir()) == [path]  # no temporary file stays


def test_the_network_is_rebuilt_with_its_weights_in_eval_mode(tmp_path):
    save_checkpoint(tmp_path / "best.pt", metadata())
    model = build_model(read_checkpoint(tmp_path / "best.pt"), "cpu")
    torch.manual_seed(0)
    expected = YoloV4(2, width=0.01, depth=0.01).eval()
    assert not model.training
    image = torch.rand(1, 3, 64, 96)
    for ours, theirs in zip(model(image), expected(image), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not a weights file"),
        (b"<!DOCTYPE html><html>sign in</html>", "a web page, not weights"),
        (b"PK\x03\x04 cut", "damaged"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content, expected):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=expected):
        read_checkpoint(path)


def test_a_truncated_checkpoint_is_refused(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, metadata())
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(path)


class Evil:
    def __reduce__(self):
        return (Path("hacked").touch, ())


def test_an_executable_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"format_version": 1, "model": Evil()}, tmp_path / "evil_zip.pt")
    for name in ("evil.pt", "evil_zip.pt"):
        with pytest.raises(UserError):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "hacked").exists()


def test_missing_keys_newer_versions_and_best_for_a_resume_are_told(tmp_path):
    path = tmp_path / "a.pt"
    with pytest.raises(UserError, match="cannot read"):
        read_checkpoint(path)
    content = metadata()
    del content["anchors"]
    save_checkpoint(path, content)
    with pytest.raises(UserError, match="lacks anchors"):
        read_checkpoint(path)
    save_checkpoint(path, metadata(format_version=99))
    with pytest.raises(UserError, match="format 99"):
        read_checkpoint(path)
    save_checkpoint(path, metadata())
    with pytest.raises(UserError, match=r"Resume from last\.pt"):
        read_checkpoint(path, for_resume=True)


def test_a_place_that_cannot_be_written_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        save_checkpoint(tmp_path / "no" / "last.pt", metadata())


def test_a_process_killed_while_saving_leaves_a_whole_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, metadata(epoch=0))
    code = (
        "import sys; from tests.test_checkpoint import *; import itertools\n"
        "for i in itertools.count(1): save_checkpoint(sys.argv[1], metadata(epoch=i)); print(i)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    time.sleep(0.07)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read_checkpoint(path)["epoch"] >= 1
