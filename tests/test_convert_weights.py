import itertools
import shutil
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from nets.yolo import YoloV4
from tests.test_predictor import ANCHORS, CLASS_NAMES, INPUT_SHAPE, write_checkpoint
from tools.convert_weights import main
from utils.errors import run_script as run_main
from weights.checkpoint import REQUIRED_KEYS, read_checkpoint, save_checkpoint
from weights.darknet import (
    Header,
    layout_of,
    layout_of_cut,
    save_darknet_weights,
    size_of,
    write_darknet_tensors,
)
from weights.darknet_cfg import Cfg, read_cfg, write_cfg
from weights.reading import read_weights

ROOT = Path(__file__).resolve().parent.parent
SIZE = ["--width", 0.1, "--depth", 0.1]
KINDS = ("pt", "pth", "weights")
SEEN = 2**33 + 7  # more than 32 bits hold


@pytest.fixture
def convert(monkeypatch, capsys):
    """`python -m tools.convert_weights` in this process: status and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_weights", *map(str, arguments)])
        status = 0
        try:
            run_main(main)
        except SystemExit as end:
            status = end.code
        found = capsys.readouterr()
        return status, found.out + found.err

    return run


@pytest.fixture
def done(convert):
    """A conversion that must succeed: what it printed."""

    def run(*arguments):
        status, printed = convert(*arguments)
        assert status == 0, printed
        return printed

    return run


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder with a file of every kind."""
    folder = tmp_path_factory.mktemp("Regal mit Dateien, 重み")
    write_checkpoint(folder / "best.pt", epoch=7, metrics={"f1": 0.5})
    (folder / "folder.pt").mkdir()
    (folder / "names.txt").write_text("\n".join(CLASS_NAMES), encoding="utf-8")
    (folder / "anchors.txt").write_text(" ".join(f"{w},{h}" for w, h in ANCHORS))
    (folder / "two.txt").write_text("a\nb\n")
    darknet = darknet_file(folder / "a.weights").read_bytes()
    cut = 20 + size_of(layout_of_cut(network(), "backbone"))
    (folder / "cut.weights").write_bytes(darknet[:cut])
    model = read_checkpoint(folder / "best.pt")["model"]
    kept = {name: tensor for name, tensor in model.items() if not name.startswith("spp.")}
    torch.save(kept, folder / "holes.pth")
    write_cfg_of(folder / "a.cfg", len(CLASS_NAMES))
    write_cfg_of(folder / "two.cfg", 2)
    return folder


def write_cfg_of(path, num_classes):
    cfg = Cfg(num_classes, tuple(ANCHORS), INPUT_SHAPE, (1.2, 1.1, 1.05))
    path.write_text(write_cfg(network(num_classes), cfg))


@pytest.fixture
def folder(shelf, tmp_path):
    """A folder with a checkpoint, and the metadata that other kinds of files lack."""
    for name in ("best.pt", "names.txt", "anchors.txt"):
        shutil.copy(shelf / name, tmp_path)
    return tmp_path


def network(num_classes=3):
    with torch.device("meta"):
        return YoloV4(num_classes, width=0.1, depth=0.1)


def darknet_file(path, *, version=(0, 2, 5), seen=SEEN):
    tensors = read_checkpoint(path.parent / "best.pt")["model"]
    write_darknet_tensors(tensors, list(layout_of(network())), path, Header(version, seen))
    return path


def metadata_of(folder):
    """What darknet's and the fork's files lack, as flags."""
    paths = ["--classes_path", folder / "names.txt", "--anchors_path", folder / "anchors.txt"]
    return [*SIZE, *paths, "--input_shape", *INPUT_SHAPE]


def flags_for(source, folder, target=Path("x.pth")):
    """The flags that a conversion of this source needs."""
    if source.suffix == ".pt":
        return []
    return metadata_of(folder) if target.suffix == ".pt" else SIZE


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first | second)


@pytest.mark.parametrize("ways", list(itertools.permutations(KINDS, 2)))
def test_every_way_and_back_again_gives_the_same_weights_and_decode(folder, done, ways):
    there, back = folder / f"there.{ways[1]}", folder / f"back.{ways[0]}"
    start = folder / f"start.{ways[0]}"
    done(folder / "best.pt", start)
    done(start, there, *flags_for(start, folder, there))
    done(there, back, *flags_for(there, folder, back))
    found = [read_weights(path, network()) for path in (start, there, back)]
    expected = layout_of(network())
    for weights in found:
        tensors = {name: weights.tensors[name] for name in expected}
        assert same(tensors, {name: found[0].tensors[name] for name in expected})
        assert weights.scale_xy == (1.2, 1.1, 1.05)
    if ways[0] == "weights":
        assert start.read_bytes() == back.read_bytes()
    if ways[0] == "pth":  # where the counters of BN are 0, as a way through darknet makes them
        assert same(found[0].tensors, found[2].tensors)


@pytest.mark.parametrize(
    ("version", "seen"), [((0, 1, 0), 2**32 - 1), ((0, 2, 5), SEEN), ((1, 0, 0), 0)]
)
def test_a_darknet_file_comes_back_byte_for_byte_with_version_and_seen(folder, done, version, seen):
    path = start = darknet_file(folder / "start.weights", version=version, seen=seen)
    for index, kind in enumerate(("pth", "pt", "weights")):
        path, source = folder / f"{index}.{kind}", path
        done(source, path, *flags_for(source, folder, path))
    assert path.read_bytes() == start.read_bytes()


def test_a_checkpoint_comes_back_with_all_that_darknet_has_no_place_for(folder, done):
    done(folder / "best.pt", folder / "a.weights", "--cfg_out", folder / "a.cfg")
    names = ["--classes_path", folder / "names.txt"]
    done(folder / "a.weights", folder / "b.pt", *SIZE, *names, "--cfg", folder / "a.cfg")
    before, after = (read_checkpoint(folder / name) for name in ("best.pt", "b.pt"))
    for key in ("class_names", "width", "depth"):
        assert after[key] == before[key], key
    for key in ("anchors", "input_shape", "scale_xy"):
        assert torch.equal(torch.tensor(after[key]), torch.tensor(before[key])), key
    assert same(after["model"], before["model"])
    assert set(after) == {"format_version", "version", *REQUIRED_KEYS, "darknet"}


def test_a_cfg_that_was_written_says_what_the_checkpoint_says(folder, done):
    printed = done(folder / "best.pt", folder / "a.weights", "--cfg_out", folder / "a b.cfg")
    assert f"-> {folder / 'a b.cfg'}" in printed
    cfg = read_cfg(folder / "a b.cfg", width=0.1, depth=0.1)
    assert (cfg.num_classes, cfg.input_shape) == (len(CLASS_NAMES), INPUT_SHAPE)
    assert (cfg.anchors, cfg.scale_xy) == (tuple(ANCHORS), (1.2, 1.1, 1.05))


def test_a_cfg_needs_no_class_names_and_can_be_written_beside_any_kind(folder, done):
    done(darknet_file(folder / "a.weights"), folder / "b.pth", *SIZE)
    metadata = ["--anchors_path", folder / "anchors.txt", "--input_shape", *INPUT_SHAPE]
    first, second = folder / "c.cfg", folder / "d.cfg"
    done(folder / "b.pth", folder / "c.weights", *SIZE, *metadata, "--cfg_out", first)
    done(folder / "b.pth", folder / "d.pth", *SIZE, "--cfg", first, "--cfg_out", second)
    assert first.read_text() == second.read_text()


@pytest.mark.parametrize("part", ["137", "backbone"])
def test_cut_files_travel_through_the_fork_and_back_byte_for_byte(folder, done, part):
    whole = darknet_file(folder / "whole.weights")
    length = 20 + size_of(layout_of_cut(network(), part))
    (folder / "cut.weights").write_bytes(whole.read_bytes()[:length])
    done(folder / "cut.weights", folder / "cut.pth", *SIZE)
    done(folder / "cut.pth", folder / "back.weights", *SIZE)
    done(whole, folder / "own.weights", *SIZE, "--part", part)
    done(whole, folder / "part.pth", *SIZE, "--part", part)
    done(folder / "part.pth", folder / "other.weights", *SIZE)
    for name in ("back", "own", "other"):
        written = (folder / f"{name}.weights").read_bytes()
        assert written == (folder / "cut.weights").read_bytes(), name
    names = torch.load(folder / "cut.pth", weights_only=True)
    assert ("stages.0.downsample_conv.conv.weight" in names) == (part == "backbone")


def test_a_part_leaves_out_what_counts_for_the_whole_alone(folder, done):
    printed = done(folder / "best.pt", folder / "a.pth", "--part", "backbone")
    assert "note" not in printed
    assert torch.load(folder / "a.pth", weights_only=True)._metadata == {}


def test_the_state_of_a_training_stays_behind(folder, done):
    last = {**read_checkpoint(folder / "best.pt"), "optimizer": {"m": torch.ones(10**6)}}
    save_checkpoint(folder / "last.pt", last)
    done(folder / "last.pt", folder / "small.pt")
    found = read_checkpoint(folder / "small.pt")
    assert set(found) == {"format_version", "version", *REQUIRED_KEYS}
    assert (found["epoch"], found["metrics"]) == (7, {"f1": 0.5})
    assert (folder / "small.pt").stat().st_size < (folder / "last.pt").stat().st_size - 3.9e6


def test_tensors_are_written_once_however_much_of_a_file_they_share(folder, done):
    darknet = darknet_file(folder / "a.weights")
    done(darknet, folder / "a.pth", *SIZE)
    done(darknet, folder / "a.pt", *metadata_of(folder))
    for name in ("a.pth", "a.pt"):
        assert (folder / name).stat().st_size < 1.2 * darknet.stat().st_size


@pytest.mark.parametrize("flags", [["--scale_xy", 1.5, 1.4, 1.3], ["--cfg", "CFG"]])
def test_a_decode_that_was_given_goes_into_the_fork_file_with_a_note(folder, done, flags):
    checkpoint = {**read_checkpoint(folder / "best.pt"), "scale_xy": [1.5, 1.4, 1.3]}
    save_checkpoint(folder / "reach.pt", checkpoint)
    cfg = folder / "reach.cfg"
    printed = done(folder / "reach.pt", folder / "reach.weights", "--cfg_out", cfg)
    assert "give --width 0.1 --depth 0.1 when you use it here" in printed
    assert "expect scale_xy 1.5 1.4 1.3" in printed  # a .weights file alone would count as 1.2 ...
    flags = [cfg if flag == "CFG" else flag for flag in flags]
    printed = done(folder / "reach.weights", folder / "reach.pth", *SIZE, *flags)
    assert "the fork's own program decodes with 1.0 1.0 1.0" in printed
    assert read_weights(folder / "reach.pth", network()).scale_xy == (1.5, 1.4, 1.3)


def test_a_decode_that_nobody_knows_is_told(folder, done):
    torch.save(read_checkpoint(folder / "best.pt")["model"], folder / "state.pth")
    assert "not known; it counts as scale_xy 1.0 1.0 1.0" in done(
        folder / "state.pth", folder / "a.pth", *SIZE
    )
    assert "not known; it counts as scale_xy 1.2 1.1 1.05" in done(
        folder / "state.pth", folder / "a.weights", *SIZE
    )
    assert "not known" not in done(
        folder / "state.pth", folder / "b.pth", *SIZE, "--scale_xy", 1, 1, 1
    )


def test_what_this_network_has_no_place_for_is_told(folder, done):
    done(folder / "best.pt", folder / "a.pth")
    state = torch.load(folder / "a.pth", weights_only=True)
    torch.save(OrderedDict(state, extra=torch.ones(2)), folder / "b.pth")
    assert "skipped, unknown to this network: extra" in done(
        folder / "b.pth", folder / "b.weights", *SIZE
    )
    assert "skipped, unknown" not in done(folder / "a.pth", folder / "a.weights", *SIZE)


def test_the_user_is_told_to_keep_what_the_new_file_does_not_hold(folder, done):
    best, everything = folder / "best.pt", "class names, anchors, input size"
    assert f"does not hold {everything} or score threshold: keep {best}" in done(
        best, folder / "a.pth"
    )
    printed = done(best, folder / "a.weights")
    assert f"does not hold {everything} or score threshold: keep {best}" in printed
    assert "--cfg_out" in printed
    printed = done(best, folder / "b.weights", "--cfg_out", folder / "b.cfg")
    assert f"does not hold class names or score threshold: keep {best}" in printed
    assert "--cfg_out" not in printed
    assert "note" not in done(best, folder / "b.pt")


def missing_flags(printed):
    return [line.split()[0] for line in printed.splitlines() if line.startswith("  --")]


def test_all_that_a_file_does_not_say_is_named_at_once(folder, convert):
    darknet = darknet_file(folder / "a.weights")
    status, printed = convert(darknet, folder / "b.pt", *SIZE)
    assert status == 2
    assert missing_flags(printed) == ["--classes_path", "--anchors_path", "--input_shape"]
    assert f"names of its {len(CLASS_NAMES)} classes" in printed
    assert "--cfg FILE" in printed
    _, printed = convert(darknet, folder / "b.pt", *SIZE, "--input_shape", 64, 96)
    assert missing_flags(printed) == ["--classes_path", "--anchors_path"]
    _, printed = convert(darknet, folder / "b.pth", *SIZE, "--cfg_out", folder / "b.cfg")
    assert missing_flags(printed) == ["--anchors_path", "--input_shape"]
    torch.save(read_checkpoint(folder / "best.pt")["model"], folder / "state.pth")
    _, printed = convert(folder / "state.pth", folder / "b.pt", *metadata_of(folder))
    assert missing_flags(printed) == ["--scale_xy"]
    assert not list(folder.glob("b.*"))


REFUSED = {
    "unknown suffix": (["best.pt", "new.onnx"], "suffix selects the format: .weights"),
    "no suffix": (["best.pt", "new"], "suffix selects the format"),
    "swapped": (["new.weights", "best.pt"], "best.pt is there already"),
    "onto itself": (["best.pt", "best.pt"], "is there already"),
    "onto a folder": (["best.pt", "folder.pt"], "is there already"),
    "missing folder": (["best.pt", "no where/new.pth"], "no folder"),
    "missing source": (["nothing.pt", "new.pth"], "No such file"),
    "a folder": (["folder.pt", "new.pth"], "Is a directory"),
    "text": (["names.txt", "new.pth"], "not a weights file"),
    "cfg as source": (["a.cfg", "new.pth"], "not a weights file"),
    "weights as cfg": (["a.weights", "new.pth", *SIZE, "--cfg", "a.weights"], "cannot read a dark"),
    "cfg onto target": (["best.pt", "new.weights", "--cfg_out", "new.weights"], "target itself"),
    "cfg that is there": (["best.pt", "new.weights", "--cfg_out", "a.cfg"], "is there already"),
    "cfg folder": (["best.pt", "new.weights", "--cfg_out", "nowhere/a.cfg"], "no folder"),
    "metadata": (
        ["best.pt", "new.pth", "--cfg", "a.cfg", "--width", 1],
        "leave --cfg, --width out",
    ),
    "scale": (["best.pt", "new.pth", "--scale_xy", 1, 1, 1], "leave --scale_xy out"),
    "width": (["a.weights", "new.pth"], "a darknet file of version 0.2.5 with"),
    "class count": (["a.weights", "new.pth", *SIZE, "--classes_path", "two.txt"], "for 3 classes"),
    "cfg count": (["a.weights", "new.pth", *SIZE, "--cfg", "two.cfg"], "is for 2 classes"),
    "shape": (["a.weights", "new.pth", *SIZE, "--input_shape", 64, 90], "multiples of 32"),
    "decode": (["a.weights", "new.pth", *SIZE, "--scale_xy", 1, "nan", 1], "1.0 nan 1.0: give"),
    "part of ours": (["best.pt", "new.pt", "--part", "137"], "a checkpoint is whole"),
    "cut to ours": (["cut.weights", "new.pt", *SIZE], "part of a network, without outputs"),
    "cut to whole": (["cut.weights", "new.pth", *SIZE, "--part", "137"], "not hold all of part"),
    "cfg of a cut": (["cut.weights", "new.pth", *SIZE, "--cfg_out", "new.cfg"], "there is no .cfg"),
    "holes": (["holes.pth", "new.weights", *SIZE], "tensors are missing in between"),
    "long name": (["best.pt", f"{'n' * 300}.pt"], "File name too long"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_one_message_and_nothing_is_written(
    shelf, convert, monkeypatch, case
):
    arguments, message = REFUSED[case]
    monkeypatch.chdir(shelf)
    before = {path: path.read_bytes() for path in shelf.iterdir() if path.is_file()}
    status, printed = convert(*arguments)
    assert status == 2
    assert printed.startswith("error: ")
    assert message in printed
    after = {path: path.read_bytes() for path in shelf.iterdir() if path.is_file()}
    assert after == before


@pytest.fixture
def full_disk():
    """No file can grow beyond 700 kB: writing more fails as it does on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("target", ["new.pt", "new.pth", "new.weights"])
def test_a_disk_that_is_full_is_told_and_leaves_nothing(
    shelf, tmp_path, convert, full_disk, target
):
    status, printed = convert(shelf / "best.pt", tmp_path / target)
    assert status == 2
    assert f"{target}: cannot write the file" in printed
    assert not list(tmp_path.iterdir())


def test_a_conversion_that_is_killed_leaves_nothing_under_the_name_or_all_of_it(tmp_path, done):
    with torch.device("meta"):
        model = YoloV4(2, width=0.5)  # 64 MB: long enough to be met while it is written
    source, target = tmp_path / "source.weights", tmp_path / "target.pth"
    model = model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(1)
    save_darknet_weights(model, source, seen=5)
    arguments = [str(source), str(target), "--width", "0.5"]
    command = [sys.executable, "-m", "tools.convert_weights", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    half = target.with_name(f".{target.name}.tmp")
    end = time.monotonic() + 120
    while not half.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    assert half.exists() != target.exists()  # killed before or after the renaming
    target.unlink(missing_ok=True)
    done(*arguments)
    assert not half.exists()
    found = read_weights(target, model)
    assert found.header.seen == 5
    written = [found.tensors[name] for name in layout_of(model)]
    assert all((tensor == 1).all() for tensor in written)
