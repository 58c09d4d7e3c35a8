import re
from collections import OrderedDict

import pytest
import torch

from tests.weight_files import ANCHORS, SMALL, same, small_model
from utils.errors import UserError
from weights.checkpoint import REQUIRED_KEYS, build_model, save_checkpoint
from weights.darknet import layout_of_cut, save_darknet_weights, size_of
from weights.darknet_cfg import Cfg, write_cfg
from weights.foreign import (
    DEFAULT_THRESHOLD,
    FileMetadata,
    check_scale_xy,
    read_network,
)
from weights.fork import fork_names

NAMES = ["cat", "Möhre", "猫"]
OTHER_ANCHORS = tuple((w + 1.5, h) for w, h in ANCHORS)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A network as a file of each kind, and files that say what these do not."""
    folder = tmp_path_factory.mktemp("shelf")
    model = small_model(len(NAMES))
    state = model.state_dict()
    checkpoint = {**dict.fromkeys(REQUIRED_KEYS, 0), "scale_xy": [1.0, 1.0, 1.0]}
    save_checkpoint(folder / "best.pt", {**checkpoint, "model": state, "class_names": NAMES})
    save_darknet_weights(model, folder / "a.weights", version=(0, 1, 0), seen=9)
    whole = (folder / "a.weights").read_bytes()
    (folder / "137.weights").write_bytes(whole[: 16 + size_of(layout_of_cut(model, "137"))])
    names = fork_names(state)
    fork = OrderedDict((names[name], tensor) for name, tensor in state.items())
    torch.save(fork, folder / "a.pth")
    torch.save(state, folder / "state.pth")
    (folder / "names.txt").write_text("\n".join(NAMES), encoding="utf-8")
    (folder / "two.txt").write_text("cat\ndog\n")
    for name, pairs in (("anchors", ANCHORS), ("other", OTHER_ANCHORS)):
        (folder / f"{name}.txt").write_text(" ".join(f"{w},{h}" for w, h in pairs))
    for name, classes in (("a", len(NAMES)), ("two", 2)):
        cfg = Cfg(classes, OTHER_ANCHORS, (64, 96), (1.5, 1.4, 1.3))
        (folder / f"{name}.cfg").write_text(write_cfg(small_model(classes), cfg))
    return folder


def same_network(state):
    """Whether these are the tensors of the network on the shelf, all of them."""
    model = small_model(len(NAMES))
    return list(state) == list(model.state_dict()) and same(model, state)


def metadata(folder, **given):
    """Width and depth, and what is given: paths by their names in the folder."""
    paths = ("classes_path", "anchors_path", "cfg")
    found = {name: str(folder / value) if name in paths else value for name, value in given.items()}
    return FileMetadata(**{**SMALL, **found})


def all_metadata(folder, **given):
    shape = {"input_shape": (64, 96)}
    paths = {"classes_path": "names.txt", "anchors_path": "anchors.txt"}
    return metadata(folder, **{**paths, **shape, **given})


@pytest.mark.parametrize(
    ("name", "scale_xy"), [("a.weights", [1.2, 1.1, 1.05]), ("a.pth", [1.0, 1.0, 1.0])]
)
def test_a_file_of_another_program_becomes_the_network_that_it_was_written_from(
    shelf, name, scale_xy
):
    found = read_network(shelf / name, all_metadata(shelf))
    assert set(found) - {"darknet"} == set(REQUIRED_KEYS)
    assert same_network(found["model"])
    assert (found["class_names"], found["input_shape"]) == (NAMES, [64, 96])
    assert found["anchors"] == [[float(w), float(h)] for w, h in ANCHORS]
    assert {key: found[key] for key in SMALL} == SMALL
    assert (found["scale_xy"], found["conf_threshold"]) == (scale_xy, DEFAULT_THRESHOLD)


def test_what_was_read_can_be_saved_as_a_checkpoint_and_keeps_darknets_header(shelf, tmp_path):
    found = read_network(shelf / "a.weights", all_metadata(shelf))
    save_checkpoint(tmp_path / "new.pt", found)
    again = read_network(tmp_path / "new.pt", FileMetadata())
    assert again["darknet"] == {"version": (0, 1, 0), "seen": 9}
    assert same_network(again["model"])


@pytest.mark.parametrize("name", ["a.weights", "a.pth", "state.pth"])
def test_a_flag_counts_more_than_the_cfg_and_that_more_than_the_kind_of_file(shelf, name):
    cfg = metadata(shelf, classes_path="names.txt", cfg="a.cfg")
    found = read_network(shelf / name, cfg)
    assert found["anchors"] == [list(pair) for pair in OTHER_ANCHORS]
    assert (found["input_shape"], found["scale_xy"]) == ([64, 96], [1.5, 1.4, 1.3])
    own = {"anchors_path": "anchors.txt", "input_shape": (32, 64), "scale_xy": (2.0, 1.0, 1.0)}
    found = read_network(
        shelf / name, metadata(shelf, classes_path="names.txt", cfg="a.cfg", **own)
    )
    assert found["anchors"] == [[float(w), float(h)] for w, h in ANCHORS]
    assert (found["input_shape"], found["scale_xy"]) == ([32, 64], [2.0, 1.0, 1.0])


def test_a_checkpoint_is_read_as_it_is(shelf):
    found = read_network(shelf / "best.pt", FileMetadata())
    assert found["class_names"] == NAMES
    assert same_network(found["model"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("classes_path", "names.txt"),
        ("anchors_path", "anchors.txt"),
        ("input_shape", (64, 96)),
        ("scale_xy", (1.0, 1.0, 1.0)),
        ("cfg", "a.cfg"),
        ("width", 0.05),
        ("depth", 1.0),
    ],
)
def test_a_fact_beside_a_checkpoint_is_refused_by_its_name(shelf, name, value):
    with pytest.raises(UserError, match=rf"is a checkpoint.* leave --{name} out"):
        read_network(shelf / "best.pt", FileMetadata(**{name: value}))


def missing_flags(error):
    return re.findall(r"^  (--\w+)", str(error.value), re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "given", "missing"),
    [
        ("a.weights", {}, ["--classes_path", "--anchors_path", "--input_shape"]),
        ("a.pth", {}, ["--classes_path", "--anchors_path", "--input_shape"]),
        ("state.pth", {}, ["--classes_path", "--anchors_path", "--input_shape", "--scale_xy"]),
        ("a.weights", {"cfg": "a.cfg"}, ["--classes_path"]),
        ("a.weights", {"anchors_path": "anchors.txt", "input_shape": (64, 96)}, ["--classes_path"]),
        ("a.pth", {"classes_path": "names.txt"}, ["--anchors_path", "--input_shape"]),
    ],
)
def test_all_metadata_that_are_missing_are_named_at_once(shelf, name, given, missing):
    with pytest.raises(UserError, match="lacks metadata") as error:
        read_network(shelf / name, metadata(shelf, **given))
    assert missing_flags(error) == missing
    assert ("--cfg FILE" in str(error.value)) == (missing != ["--classes_path"])
    if "--classes_path" in missing:
        assert f"its {len(NAMES)} classes" in str(error.value)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("137.weights", {}, r"part of a network.*\(train\.py --weights .*137\.weights"),
        ("a.weights", {"classes_path": "two.txt"}, "for 3 classes, but 2 names: cat, dog"),
        ("a.weights", {"cfg": "two.cfg"}, "two.cfg is for 2 classes, .* holds 3"),
        ("a.weights", {"cfg": "names.txt"}, "names.txt: cannot read a darknet cfg"),
        ("a.weights", {"cfg": "a.cfg", "depth": 1.0}, "Use the width and depth|darknet file of"),
        ("a.weights", {"width": 0.0}, "width 0.0: give a multiplier above 0"),
        ("a.pth", {"width": 0.2}, "backbone does not fit"),
        ("a.weights", {"input_shape": (64, 100)}, "64 x 100 .* multiples of 32"),
        ("a.weights", {"scale_xy": (1.0, 0.0, 1.0)}, "scale_xy 1.0 0.0 1.0: give three"),
        ("a.weights", {"anchors_path": "names.txt"}, "names.txt: cannot read anchors"),
        ("nothing.weights", {}, "No such file"),
    ],
)
def test_metadata_that_do_not_fit_the_file_are_refused(shelf, name, given, message):
    with pytest.raises(UserError, match=message):
        read_network(shelf / name, all_metadata(shelf, **given))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (None, "not in the file"),
        (torch.ones(3), r"shape \(3,\) in the file"),
        ("text", "no tensor in the file, but str"),
        (torch.full((24,), torch.inf), "NaN or infinite"),
    ],
)
def test_a_network_with_a_hole_is_not_run(shelf, tmp_path, tensor, message):
    state = small_model(len(NAMES)).state_dict()
    changed = {**state, "spp.before.0.bn.weight": tensor}
    torch.save({k: v for k, v in changed.items() if v is not None}, tmp_path / "holes.pth")
    with pytest.raises(UserError, match=rf"spp\.before\.0\.bn\.weight.*{message}|{message}.*spp"):
        read_network(tmp_path / "holes.pth", all_metadata(shelf, scale_xy=(1.0, 1.0, 1.0)))


def test_tensors_in_half_precision_are_run_in_full(shelf, tmp_path):
    state = small_model(len(NAMES)).half().state_dict()
    torch.save(state, tmp_path / "half.pth")
    found = read_network(tmp_path / "half.pth", all_metadata(shelf, scale_xy=(1.0, 1.0, 1.0)))
    assert all(torch.equal(found["model"][name], tensor) for name, tensor in state.items())
    model = build_model(found, "cpu")
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}


def test_given_flags_and_the_scaling_of_the_network():
    found = FileMetadata(depth=0.5)
    assert (found.given(), found.scaling()) == (["--depth"], {"width": 1.0, "depth": 0.5})
    assert FileMetadata().given() == []


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("inf"), float("nan")])
def test_a_grid_sensitivity_that_is_not_positive_is_refused(wrong):
    check_scale_xy((1.0, 1e-9, 3.0))
    with pytest.raises(UserError, match="scale_xy"):
        check_scale_xy((1.0, 1.0, wrong))
