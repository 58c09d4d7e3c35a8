import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.weight_files import (
    assert_refused,
    copy_of,
    count_numbers,
    darknet_parts,
    full_model,
    same,
    small_model,
    structure,
    write_darknet,
)
from utils.errors import UserError
from weights.darknet import (
    Header,
    is_darknet,
    read_darknet_weights,
    read_header,
    save_darknet_weights,
)
from weights.loading import load_weights
from weights.reading import read_weights

ROOT = Path(__file__).resolve().parent.parent
HEADER_WORDS = 5
FULL_BYTES = 257_717_640


@pytest.fixture(scope="module")
def full_file(tmp_path_factory):
    """A whole file for 80 classes, and its 32-bit words."""
    path = tmp_path_factory.mktemp("darknet") / "full"
    yield path, write_darknet(path, 64_429_405, header=(0, 2, 5, 32_032_000, 0))
    path.unlink()


def assert_holds_in_order(tensors, words, num_classes=80):
    """The tensors are those of darknet's list of layers, cut where the file ends."""
    start, parts = HEADER_WORDS, darknet_parts(num_classes)
    for (name, tensor), (suffix, shape) in zip(tensors.items(), parts, strict=False):
        assert name.endswith(suffix)
        assert tuple(tensor.shape) == shape
        expected = words[start : start + tensor.numel()]
        assert np.array_equal(tensor.numpy().view(np.uint32).ravel(), expected)
        start += tensor.numel()
    assert start == len(words)


def test_a_whole_file_of_full_size_loads_and_comes_back_byte_for_byte(full_file, tmp_path):
    path, words = full_file
    assert path.stat().st_size == FULL_BYTES
    model = full_model()
    report = load_weights(model, path)
    assert (len(report.loaded), report.partly, report.skipped) == (541, {}, {})
    assert report.source == f"{path} (darknet 0.2.5, 32,032,000 images seen)"
    assert (report.heads_loaded, report.scale_xy) == (True, (1.2, 1.1, 1.05))
    save_darknet_weights(model, tmp_path / "back", seen=32_032_000)
    assert np.array_equal(np.fromfile(tmp_path / "back", np.uint32), words)


def test_numbers_lie_where_the_list_of_layers_says(full_file):
    path, words = full_file
    network = structure()
    _, tensors = read_darknet_weights(path, network)
    assert_holds_in_order(tensors, words)
    convolutions = [name for name in tensors if name.endswith(("conv.weight", "output.weight"))]
    assert convolutions == [name for name in network.state_dict() if name in convolutions]
    assert len(convolutions) == 110


@pytest.mark.parametrize(
    ("size", "num_classes", "convolutions", "scale_xy"),
    [
        (106_610_068, None, 72, None),
        (170_038_676, None, 92, None),
        (20 + 4 * (63_971_680 + 1_795 * 3 * 25), 20, 110, (1.2, 1.1, 1.05)),
    ],
    ids=["backbone", "yolov4.conv.137", "20 classes"],
)
def test_a_cut_file_or_one_of_other_classes_is_told_by_its_length(
    full_file, tmp_path, size, num_classes, convolutions, scale_xy
):
    words = full_file[1][: size // 4]
    words.tofile(tmp_path / "cut")
    assert (tmp_path / "cut").stat().st_size == size
    weights = read_weights(tmp_path / "cut", structure(3))
    assert_holds_in_order(weights.tensors, words, num_classes or 80)
    assert sum(tensor.ndim == 4 for tensor in weights.tensors.values()) == convolutions
    assert (weights.num_classes, weights.scale_xy) == (num_classes, scale_xy)


MEASURE = """
import sys
from pathlib import Path
from weights.loading import load_weights
from tests.weight_files import full_model

def resident(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024

model = full_model()
for tensor in model.state_dict().values():
    tensor.zero_()  # the system gives memory at the first use
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = resident("VmRSS")
load_weights(model, sys.argv[1])
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_loading_takes_at_most_a_tenth_of_memory_besides_the_file(full_file):
    command = [sys.executable, "-c", MEASURE, full_file[0]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 1.1 * FULL_BYTES


@pytest.mark.parametrize(
    ("version", "seen", "size"),
    [
        ((0, 1, 0), 0, 16),
        ((0, 1, 9), 2**32 - 1, 16),
        ((0, 0, 0), 7, 16),
        ((0, 2, 0), 2**40, 20),
        ((0, 2, 5), 0, 20),
        ((1, 0, 0), 2**64 - 1, 20),
        ((999, 999, 999), 1, 20),
    ],
)
def test_every_version_of_the_header_comes_back(tmp_path, version, seen, size):
    start = struct.pack("<3i", *version) + struct.pack("<Q" if size == 20 else "<I", seen)
    donor, model = small_model(), small_model(seed=1)
    save_darknet_weights(donor, tmp_path / "w", version=version, seen=seen)
    content = (tmp_path / "w").read_bytes()
    assert content[:size] == start
    assert len(content) == size + 4 * count_numbers(donor)
    header, _ = read_darknet_weights(tmp_path / "w", model)
    assert header == Header(version, seen)
    load_weights(model, tmp_path / "w")
    assert same(model, donor.state_dict(), [name for name, _ in donor.named_parameters()])


@pytest.mark.parametrize(
    ("version", "seen"),
    [
        ((0, 2), 0),
        ((), 0),
        ((0, 2, 5, 0), 0),
        ((0, 2, -1), 0),
        ((0, 1000, 0), 0),
        ((0, 2, 2.5), 0),
        ((0, 2, 5), -1),
        ((0, 2, 5), 2**64),
        ((0, 1, 0), 2**32),
    ],
)
def test_a_header_that_cannot_be_is_refused_and_the_old_file_stays(tmp_path, version, seen):
    (tmp_path / "w").write_bytes(b"old")
    with pytest.raises(UserError, match=r"three numbers from 0 to 999, and a count"):
        save_darknet_weights(small_model(), tmp_path / "w", version=version, seen=seen)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to(memory_format=torch.channels_last),
        lambda model: model.double(),
        lambda model: model.requires_grad_(False),
    ],
    ids=["channels_last", "float64", "frozen"],
)
def test_memory_format_and_precision_do_not_change_the_file(tmp_path, change):
    save_darknet_weights(small_model(), tmp_path / "plain")
    save_darknet_weights(change(small_model()), tmp_path / "changed")
    assert (tmp_path / "changed").read_bytes() == (tmp_path / "plain").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_of_half_precision_is_written_as_float32(tmp_path, dtype):
    donor, model = small_model().to(dtype), small_model(seed=1)
    save_darknet_weights(donor, tmp_path / "w")
    load_weights(model, tmp_path / "w")
    parameters = dict(donor.float().named_parameters())
    assert same(model, parameters)


def test_the_file_and_the_network_are_apart_after_loading(tmp_path):
    model = small_model()
    words = write_darknet(tmp_path / "w", count_numbers(model))
    _, tensors = read_darknet_weights(tmp_path / "w", model)
    load_weights(model, tmp_path / "w")
    loaded = copy_of(model)
    for tensor in tensors.values():
        tensor.zero_()
    assert np.array_equal(np.fromfile(tmp_path / "w", np.uint32), words)
    with open(tmp_path / "w", "r+b") as file:
        file.write(bytes(words.nbytes))
    assert same(model, loaded)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_ends_anywhere_else_is_refused_with_the_lengths_that_there_are(tmp_path, share):
    count = count_numbers(small_model())
    words = write_darknet(tmp_path / "w", count)
    words[: int(share * count)].tofile(tmp_path / "w")
    found = 4 * int(share * count) - 20
    assert_refused(
        tmp_path / "w",
        rf"version 0\.2\.5 with {found:,} bytes of weights: cut off, or of another network\. "
        rf"YOLOv4 of width 0\.05, depth 0\.1 has [\d,]+ and [\d,]+ more for each class"
        r".* Use the width and depth of the weights\.$",
    )


@pytest.mark.parametrize("change", [-4, -1, 1, 4])
def test_a_file_a_little_too_short_or_too_long_is_refused(tmp_path, change):
    save_darknet_weights(small_model(), tmp_path / "w")
    content = (tmp_path / "w").read_bytes()
    (tmp_path / "w").write_bytes((content + b"\0" * 4)[: len(content) + change])
    assert_refused(tmp_path / "w", "cut off, or of another network")


def test_a_length_that_would_mean_no_classes_is_refused(tmp_path):
    with_one, with_two = (count_numbers(small_model(count)) for count in (1, 2))
    write_darknet(tmp_path / "w", 2 * with_one - with_two)
    assert_refused(tmp_path / "w", "cut off, or of another network")


@pytest.mark.parametrize(
    ("size", "match"),
    [(12, "cut off in its header"), (19, "cut off in its header"), (20, "with 0 bytes")],
)
def test_a_file_that_is_little_more_than_a_header_is_refused(tmp_path, size, match):
    (tmp_path / "w").write_bytes(Header().to_bytes()[:size])
    assert_refused(tmp_path / "w", match)


@pytest.mark.parametrize("content", [b"", b"\0" * 11, struct.pack("<4i", 0, 2, 1000, 0)])
def test_what_does_not_begin_with_three_small_numbers_is_no_darknet_file(tmp_path, content):
    assert not is_darknet(content)
    (tmp_path / "w").write_bytes(content)
    assert_refused(tmp_path / "w", "not a weights file")
    with pytest.raises(UserError, match="no darknet file"):
        read_header(tmp_path / "w")


def test_the_lengths_in_the_message_are_those_of_the_network(tmp_path):
    (tmp_path / "w").write_bytes(Header().to_bytes())
    lengths = (
        r"has 255,994,420 and 21,540 more for each class, 170,038,656 up to layer 136 "
        r"\(yolov4\.conv\.137\) or 106,610,048 in its backbone\."
    )
    with pytest.raises(UserError, match=lengths):
        read_darknet_weights(tmp_path / "w", structure())


@pytest.mark.parametrize("size", [FULL_BYTES, 170_038_676])
def test_a_full_file_for_a_scaled_network_says_which_width_and_depth_it_has(tmp_path, size):
    with open(tmp_path / "w", "wb") as file:
        file.write(Header().to_bytes())
        file.truncate(size)
    assert_refused(tmp_path / "w", r"fits the full network: use width 1\.0 and depth 1\.0")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_file_with_a_number_that_is_none_is_refused(tmp_path, value):
    model = small_model()
    torch.nn.init.constant_(model.spp.before[1].conv.weight[0, 0], value)
    save_darknet_weights(model, tmp_path / "w")
    assert_refused(tmp_path / "w", r"NaN or infinite values in spp\.before\.1\.conv\.weight")


def test_the_backbone_of_a_cut_file_loads_and_the_rest_stays_and_is_reported(tmp_path):
    donor, model = small_model(), small_model(seed=1)
    before = copy_of(model)
    backbone = {f"backbone.{name}" for name in donor.backbone.state_dict()}
    save_darknet_weights(donor, tmp_path / "w")
    content = (tmp_path / "w").read_bytes()
    (tmp_path / "w").write_bytes(content[: 20 + 4 * count_numbers(donor.backbone)])
    report = load_weights(model, tmp_path / "w")
    assert set(report.loaded) == {name for name in backbone if "num_batches" not in name}
    assert set(report.skipped.values()) == {"not in the file"}
    assert set(report.skipped).isdisjoint(backbone)
    assert not any("num_batches" in name for name in report.skipped)
    assert (report.heads_loaded, report.scale_xy) == (False, None)
    assert same(model, donor.state_dict(), report.loaded)
    assert same(model, before, report.skipped)


def test_heads_of_another_class_count_are_a_note_and_stay_as_they_are(tmp_path):
    donor, model = small_model(20), small_model(3, seed=1)
    before = copy_of(model)
    save_darknet_weights(donor, tmp_path / "w")
    report = load_weights(model, tmp_path / "w")
    assert set(report.skipped) == {name for name in before if ".output." in name}
    assert set(report.skipped.values()) == {"output for 20 classes in the file, 3 in the model"}
    assert same(model, before, report.skipped)
    assert same(model, donor.state_dict(), report.loaded)
