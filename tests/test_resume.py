import dataclasses
from pathlib import Path

import pytest

from engine.config import (
    check_resumed,
    check_same_anchors,
    check_same_classes,
    check_same_settings,
    default_for_resume,
    folder_of_resumed,
    resumed_file,
    stored_config,
)
from train import CHANGEABLE, Config
from utils.errors import UserError


def test_a_stored_config_comes_back_and_unknown_knobs_are_dropped():
    values = dataclasses.asdict(Config(width=0.5)) | {"knob_of_another_version": 1}
    assert stored_config(Config, values) == Config(width=0.5)


def test_code_named_in_a_checkpoint_is_not_run_unless_asked_for_again():
    stored = Config(conf_loss="evil:Loss")
    default = default_for_resume(stored, Path("last.pt"))
    assert default.conf_loss == ""
    for given in ("", "evil:Loss()", "bce"):
        refused = dataclasses.replace(default, conf_loss=given)
        with pytest.raises(UserError, match=r"--resume last\.pt --conf_loss evil:Loss$"):
            check_resumed(refused, stored, CHANGEABLE)
    asked = dataclasses.replace(default, conf_loss="evil:Loss")
    check_resumed(asked, stored, CHANGEABLE)


def test_registered_losses_come_from_the_checkpoint():
    default = default_for_resume(Config(conf_loss="focal(gamma=1)"), Path("last.pt"))
    assert default.conf_loss == "focal(gamma=1)"


def test_only_what_does_not_change_the_learning_may_change():
    stored = Config()
    check_resumed(Config(epochs=400, num_workers=0, device="cpu"), stored, CHANGEABLE)
    with pytest.raises(UserError, match="cannot change width, seed"):
        check_resumed(Config(width=0.1, seed=5), stored, CHANGEABLE)


def test_other_classes_are_refused_with_both_lists():
    stored = {"class_names": ["b", "a"]}
    check_same_classes(("a", "b"), "c.txt", None)
    check_same_classes(("b", "a"), "c.txt", stored)
    with pytest.raises(UserError, match=r"c\.txt holds a, b.* learns b, a"):
        check_same_classes(("a", "b"), "c.txt", stored)


def test_other_anchors_are_refused():
    stored = {"anchors": [[1, 2]]}
    check_same_anchors([(1, 3)], None)
    check_same_anchors([(1, 2)], stored)
    with pytest.raises(UserError, match="anchors file has changed"):
        check_same_anchors([(1, 3)], stored)


def test_a_run_that_is_not_there_is_said_in_the_words_of_the_flag(tmp_path):
    for given in (tmp_path, tmp_path / "last.pt"):
        with pytest.raises(UserError, match=f"{tmp_path} holds no last.pt, so there is nothing"):
            resumed_file(str(given))
    with pytest.raises(UserError, match="--resume logs/none: there is no such run"):
        resumed_file("logs/none")
    (tmp_path / "last.pt").write_bytes(b"")
    assert resumed_file(str(tmp_path)) == tmp_path / "last.pt"


def test_metrics_and_best_move_along_to_another_folder(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.csv").write_text("epoch\n1\n")
    (tmp_path / "old" / "best.pt").write_bytes(b"weights")
    last = tmp_path / "old" / "last.pt"
    assert folder_of_resumed(last, "") == tmp_path / "old"
    new = folder_of_resumed(last, str(tmp_path / "new"))
    assert (new / "metrics.csv").read_text() == "epoch\n1\n"
    assert (new / "best.pt").read_bytes() == b"weights"


def test_a_loss_that_declares_otherwise_now_does_not_go_on():
    checkpoint = {"config": {"conf_settings": {"gain": 1.0, "normalizer": "mean"}}}
    check_same_settings({"gain": 1.0, "normalizer": "mean"}, checkpoint)
    check_same_settings({"gain": 0.1, "normalizer": "mean"}, None)
    with pytest.raises(UserError, match=r"begun with gain 1\.0, now it declares 0\.1"):
        check_same_settings({"gain": 0.1, "normalizer": "mean"}, checkpoint)
