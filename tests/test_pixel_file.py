import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data.cache import ImageCache
from data.dataset import VocDataset
from data.loader import collate
from data.pixel_file import STALE_SECONDS, PixelFile, pixel_file
from data.voc import read_split
from tests.factory import add_image, write_split
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def samples(tmp_path):
    """Five images of noise, 40 x 60 to 80 x 60."""
    rng = np.random.default_rng(0)
    for i in range(5):
        image = rng.integers(0, 256, (40 + 10 * i, 60, 3), np.uint8)
        add_image(tmp_path / "VOC", str(i), image, [("a", (2, 2, 50, 30))])
    write_split(tmp_path / "VOC", "train", [str(i) for i in range(5)])
    return read_split(f"{tmp_path / 'VOC'}:train", ["a"])


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("budget", [0, 10000, 10**7])
def test_images_from_the_file_are_those_from_memory(samples, tmp_path, budget):
    memory = ImageCache(samples, (70, 70), 10**7, reduced=True)
    mapped = ImageCache(samples, (70, 70), budget, reduced=True, folder=str(tmp_path / "cache"))
    assert mapped.kept == 5
    assert (tmp_path / "cache").exists() == (budget < 10**7)
    for i in range(5):
        for size in (80, 40, 20, 5):
            (image, scale), (other, expected) = (
                c.read_for(i, (size, size)) for c in (mapped, memory)
            )
            assert scale == expected
            assert (image == other).all()


def test_the_next_run_reads_no_image(samples, tmp_path):
    first = ImageCache(samples, (99, 99), 0, folder=str(tmp_path / "cache"))
    before = [first.read(i).copy() for i in range(5)]
    (name,) = files(tmp_path / "cache")
    written = (tmp_path / "cache" / name).stat().st_mtime_ns
    second = ImageCache(samples, (99, 99), 0, folder=str(tmp_path / "cache"))
    assert (tmp_path / "cache" / name).stat().st_mtime_ns == written
    assert all((second.read(i) == before[i]).all() for i in range(5))


def test_a_changed_image_makes_another_file(samples, tmp_path):
    folder = tmp_path / "cache"
    ImageCache(samples, (99, 99), 0, folder=str(folder))
    add_image(tmp_path / "VOC", "0", np.full((40, 60, 3), 7, np.uint8), [])
    changed = ImageCache(samples, (99, 99), 0, folder=str(folder))
    assert (changed.read(0) == 7).all()
    assert len(files(folder)) == 2


def test_an_image_of_the_same_size_in_bytes_makes_another_file_too(samples, tmp_path):
    folder, path = tmp_path / "cache", Path(samples[0].image_path)
    ImageCache(samples, (99, 99), 0, folder=str(folder))
    status, data = path.stat(), path.read_bytes()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    ImageCache(samples, (99, 99), 0, folder=str(folder))
    assert len(files(folder)) == 2


def test_other_images_sizes_and_reductions_have_files_of_their_own(samples, tmp_path):
    folder = str(tmp_path / "cache")
    for limit_hw, reduced in [((99, 99), False), ((50, 50), False), ((99, 99), True)]:
        for part in (samples[:2], samples[2:4]):
            ImageCache(part, limit_hw, 0, reduced=reduced, folder=folder)
    assert len(files(tmp_path / "cache")) == 6


def test_a_file_larger_than_memory_can_be_mapped(tmp_path):
    path = tmp_path / "huge"
    with open(path, "wb") as file:
        file.truncate(2**40)  # without blocks on disk
    assert PixelFile(path).pixels[-1] == 0


def test_a_file_cut_short_is_written_again(samples, tmp_path):
    folder = tmp_path / "cache"
    ImageCache(samples, (99, 99), 0, folder=str(folder))
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    ImageCache(samples, (99, 99), 0, folder=str(folder))
    assert path.read_bytes() == whole


def test_spawned_workers_map_the_file_themselves(samples, tmp_path):
    arguments = {
        "train": True,
        "cache": True,
        "cache_gb": 0.0,
        "cache_dir": str(tmp_path / "cache"),
    }
    dataset = VocDataset(samples, (32, 32), **arguments)
    _ = dataset[0]
    assert len(pickle.dumps(dataset)) < 20_000  # 35 kB of pixels stay where they are
    context = {"num_workers": 1, "multiprocessing_context": "spawn"}
    (found,) = DataLoader(dataset, batch_size=5, collate_fn=collate, **context)
    expected = collate([dataset[i] for i in range(5)])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


WRITER = """
import sys, time
import numpy as np
from data.pixel_file import pixel_file

def parts():
    for i in range(20):
        yield np.full(1000, i, np.uint8)
        time.sleep({pause})

pixel_file(sys.argv[1], [(sys.argv[2], 1)], 20000, parts())
"""


def start_writer(folder, image, pause):
    command = [sys.executable, "-c", WRITER.format(pause=pause), str(folder), str(image)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_two_at_once_leave_one_whole_file(samples, tmp_path):
    folder = tmp_path / "cache"
    writers = [start_writer(folder, samples[0].image_path, 0.02) for _ in range(2)]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    (path,) = folder.iterdir()
    assert path.read_bytes() == b"".join(bytes([i]) * 1000 for i in range(20))


def test_a_killed_writer_leaves_nothing_that_is_taken_for_whole(samples, tmp_path):
    folder = tmp_path / "cache"
    writer = start_writer(folder, samples[0].image_path, 0.5)
    while not (folder.is_dir() and files(folder)):
        time.sleep(0.05)
    writer.send_signal(signal.SIGKILL)
    writer.wait(30)
    (left,) = folder.iterdir()
    old = time.time() - 2 * STALE_SECONDS
    os.utime(left, (old, old))
    made = pixel_file(str(folder), [(samples[0].image_path, 1)], 3, [np.arange(3, dtype=np.uint8)])
    assert files(folder) == [made.path.name]
    (folder / left.name).write_bytes(b"")
    os.utime(folder / left.name, (old, old))
    made = pixel_file(str(folder), [(samples[0].image_path, 1)], 3, iter(()))  # it is there
    assert made.pixels.tolist() == [0, 1, 2]
    assert files(folder) == [made.path.name]


@pytest.mark.parametrize("name", ["file", "file/below", "n" * 300])
@pytest.mark.parametrize("budget", [0, 10000])
def test_a_folder_that_cannot_be_one_is_said_before_anything_is_decoded(
    samples, tmp_path, name, budget, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("data.cache.read_image", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(UserError, match=r"cache_dir .*cannot be used"):
        ImageCache(samples, (99, 99), budget, folder=str(tmp_path / name))


def test_an_image_that_went_after_the_split_was_read_is_a_user_error(samples, tmp_path):
    Path(samples[3].image_path).unlink()
    with pytest.raises(UserError, match=r"3\.png"):
        ImageCache(samples, (99, 99), 0, folder=str(tmp_path / "cache"))


def test_a_full_disk_is_said_before_anything_is_decoded(samples, tmp_path):
    with pytest.raises(UserError, match=r"do not fit into the .* GB that are free"):
        pixel_file(str(tmp_path), [(samples[0].image_path,)], 10**18, iter(()))


def test_a_broken_image_leaves_no_file(samples, tmp_path):
    wrong = replace(samples[1], image_hw=(1, 1))
    with pytest.raises(UserError, match="height and width"):
        ImageCache([samples[0], wrong], (99, 99), 0, folder=str(tmp_path / "cache"))
    assert files(tmp_path / "cache") == []
