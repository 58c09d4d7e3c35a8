"""train.py that starts from weights of other programs: what is loaded, kept, said and resumed."""

import sys
from collections import OrderedDict

import pytest
import torch

import train
from nets.decode import YOLOV4_ANCHORS
from nets.yolo import YoloV4
from tests.training import checkpoint_of, flags, rows_of
from utils.errors import run_script
from weights.checkpoint import save_checkpoint
from weights.darknet import layout_of, layout_of_cut, save_darknet_weights, size_of
from weights.fork import BACKBONE, fork_names

SIZE = {"width": 0.01, "depth": 0.01}  # that of tests.training
SCRATCH = [2.0, 2.0, 2.0]
DARKNET = [1.2, 1.1, 1.05]
FORK = [1.0, 1.0, 1.0]


@pytest.fixture(scope="module")
def donor():
    torch.manual_seed(5)
    model = YoloV4(2, **SIZE)
    model.set_objectness_prior(0.5)  # much to learn in a few steps
    return model


@pytest.fixture(scope="module")
def shelf(donor, tmp_path_factory):
    """The donor in files of darknet and of the fork, whole and in parts."""
    folder = tmp_path_factory.mktemp("weights of others")
    save_darknet_weights(donor, folder / "whole.weights")
    whole = (folder / "whole.weights").read_bytes()
    for part in ("137", "backbone"):
        length = 20 + size_of(layout_of_cut(donor, part))
        (folder / f"{part}.weights").write_bytes(whole[:length])
    names = fork_names(donor.state_dict())
    fork = OrderedDict((names[name], tensor) for name, tensor in donor.state_dict().items())
    torch.save(fork, folder / "whole.pth")
    backbone = {name: tensor for name, tensor in fork.items() if name.startswith(BACKBONE)}
    backbone = {name.removeprefix(BACKBONE): tensor for name, tensor in backbone.items()}
    torch.save(backbone, folder / "backbone.pth")
    three = YoloV4(3, **SIZE)
    save_darknet_weights(three, folder / "three.weights")
    (folder / "three.txt").write_text("cat\ngreen\ndog\n")
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """train.py in this process: status and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        status = 0
        try:
            run_script(train.main)
        except SystemExit as end:
            status = end.code
        found = capsys.readouterr()
        return status, found.out + found.err

    return run


@pytest.fixture
def trained(run, tiny_voc, tmp_path):
    """A run that must end well: its folder, and what it printed."""

    def trained(name, **more):
        folder = tmp_path / name
        short = {"epochs": 1, "eval_period": 9, "mosaic_prob": 0}
        status, printed = run(*flags(tiny_voc, folder, **{**short, **more}))
        assert status == 0, printed
        return folder, printed

    return trained


def backbone_of(state):
    return {name: state[name] for name in state if name.startswith(BACKBONE)}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first | second)


@pytest.mark.parametrize(
    ("name", "scale_xy", "heads"),
    [
        ("whole.weights", DARKNET, True),
        ("137.weights", SCRATCH, False),  # without heads there is no decode to go on with
        ("backbone.pth", SCRATCH, False),
    ],
)
def test_a_training_starts_from_each_kind_of_file_and_its_decode(
    shelf, donor, trained, name, scale_xy, heads
):
    more = {"weights": shelf / name, "freeze_epochs": 1, "freeze_batch_size": 4}
    folder, printed = trained("run", conf_loss="focal_pi", **more)
    assert f"{shelf / name} (" in printed
    assert "tensors loaded" in printed
    assert f"decode: scale_xy {' '.join(map(str, scale_xy))} at" in printed
    assert ("heads: kept as loaded" if heads else "heads: set to 0.01") in printed
    assert "note: scale_xy" not in printed
    checkpoint = checkpoint_of(folder)
    assert checkpoint["scale_xy"] == scale_xy
    # as it was, running statistics included; the counter is not in darknet's files
    frozen = {k: v for k, v in backbone_of(checkpoint["raw_model"]).items() if "num_b" not in k}
    assert same(frozen, {key: donor.state_dict()[key] for key in frozen})
    moved = [n for n in layout_of(donor) if not n.startswith(BACKBONE)]
    assert not same({n: checkpoint["raw_model"][n] for n in moved},
                    {n: donor.state_dict()[n] for n in moved})  # fmt: skip


def figures(folder):
    return [(row["loss"], row["val_loss"]) for row in rows_of(folder)]


def test_the_same_weights_train_alike_whatever_file_they_come_from_but_not_with_another_decode(
    shelf, trained
):
    darknet, printed = trained("darknet", weights=shelf / "whole.weights")
    assert "note: scale_xy" not in printed
    fork, printed = trained("fork", weights=shelf / "whole.pth", scale_xy=tuple(DARKNET))
    told = "note: scale_xy here is 1.2 1.1 1.05, the loaded heads were trained with 1 1 1: "
    assert told in printed
    assert checkpoint_of(fork)["scale_xy"] == DARKNET
    own, printed = trained("own", weights=shelf / "whole.pth")
    assert "decode: scale_xy 1.0 1.0 1.0" in printed
    assert "note: scale_xy" not in printed
    assert checkpoint_of(own)["scale_xy"] == FORK
    assert figures(darknet) == figures(fork)  # the loss reads them with the same reach
    assert figures(own) != figures(fork)


def test_a_checkpoints_decode_is_gone_on_with_and_other_anchors_are_told(donor, trained, tmp_path):
    anchors = YOLOV4_ANCHORS
    known = {"class_names": ["red", "green"], "anchors": anchors, "scale_xy": [1.5, 1.4, 1.3]}
    save_checkpoint(tmp_path / "a.pt", {"model": donor.state_dict(), **known})
    others = " ".join(f"{w + 1},{h}" for w, h in anchors)
    (tmp_path / "other.txt").write_text(others)
    more = {"weights": tmp_path / "a.pt", "anchors_path": tmp_path / "other.txt"}
    folder, printed = trained("run", **more)
    assert "note: anchors here is 13,16 20,36" in printed
    assert "note: scale_xy" not in printed
    assert checkpoint_of(folder)["scale_xy"] == [1.5, 1.4, 1.3]


def test_classes_that_the_file_shares_are_carried_over_and_the_run_goes_on_without_the_files(
    shelf, trained, run, tmp_path
):
    for name in ("three.weights", "three.txt"):
        (tmp_path / name).write_bytes((shelf / name).read_bytes())
    given = {"weights": tmp_path / "three.weights", "weights_classes": tmp_path / "three.txt"}
    folder, printed = trained("run", scale_xy=(1.5, 1.4, 1.3), **given)
    assert "1 of 2 classes carried over: green; new: red" in printed
    for path in given.values():
        path.unlink()
    status, printed = run("--resume", folder, "--epochs", 2)
    assert status == 0, printed
    assert [row["epoch"] for row in rows_of(folder)] == ["1", "2"]
    assert checkpoint_of(folder)["scale_xy"] == [1.5, 1.4, 1.3]
    assert "decode: scale_xy 1.5 1.4 1.3" in printed


def test_fine_tuning_with_a_frozen_backbone_learns_and_goes_on_without_the_weights_file(
    shelf, donor, trained, run, tmp_path
):
    weights = tmp_path / "whole.weights"
    weights.write_bytes((shelf / "whole.weights").read_bytes())
    frozen = {"freeze_epochs": 5, "freeze_batch_size": 4, "lr": 0.5}
    folder, _ = trained("run", weights=weights, epochs=5, **frozen)
    losses = [float(row["loss"]) for row in rows_of(folder)]
    assert losses[-1] < 0.97 * losses[0]
    frozen = backbone_of(checkpoint_of(folder)["raw_model"])
    before = backbone_of(donor.state_dict())
    assert frozen.keys() == before.keys()
    assert same(frozen, before)
    weights.unlink()
    status, printed = run("--resume", folder, "--epochs", 6)
    assert status == 0, printed
    assert len(rows_of(folder)) == 6
    after = checkpoint_of(folder)
    assert after["scale_xy"] == DARKNET
    assert not same(backbone_of(after["raw_model"]), before)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"weights_classes": "three.txt"}, "names the classes of --weights; give both"),
        (
            {"weights": "three.weights", "weights_classes": "none.txt"},
            "cannot read the class names",
        ),
        ({"weights": "whole.pth", "weights_classes": "three.txt"}, "for 2 classes, but 3 names"),
        ({"weights": "whole.weights", "width": 0.3}, "darknet file of version 0.2.5"),
        ({"weights": "whole.pth", "width": 0.3}, "backbone does not fit"),
        ({"weights": "three.txt"}, "not a weights file"),
        ({"weights": "none.weights"}, "No such file"),
        ({"scale_xy": (0, 1, 1)}, "scale_xy 0.0 1.0 1.0: give three"),
    ],
)
def test_what_cannot_be_started_from_is_said_before_a_folder_is_made(
    shelf, run, tiny_voc, tmp_path, more, message
):
    paths = ("weights", "weights_classes")
    more = {key: shelf / value if key in paths else value for key, value in more.items()}
    status, printed = run(*flags(tiny_voc, tmp_path / "run", **more))
    assert status == 2
    assert message in printed
    assert not (tmp_path / "run").exists()
