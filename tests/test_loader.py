import os
import shutil
import subprocess
import sys
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info

from data.dataset import VocDataset
from data.image import read_image
from data.loader import BlockSampler, TrainingLoader, check_shared_memory, collate
from data.sampler import BLOCK, EpochBatchSampler
from data.voc import read_split
from tests.factory import add_image, write_split
from tests.training import ROOT
from utils.errors import UserError


@pytest.mark.parametrize("batch_size", [1, 3, 8, 32, 40])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("start_step", [0, 1, 5])
def test_joined_batches_are_the_batches_and_stay_in_their_block(batch_size, world_size, start_step):
    sampler = EpochBatchSampler(900, batch_size, rank=world_size - 1, world_size=world_size)
    sampler.set_epoch(2, start_step)
    joined = list(BlockSampler(sampler))
    assert list(chain(*joined)) == list(chain(*sampler))
    steps = max(1, BLOCK // (batch_size * world_size))
    assert {len(indices) for indices in joined[1:-1]} <= {steps * batch_size}
    assert len(joined[0]) == (steps - start_step % steps) * batch_size


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Three blocks of images."""
    root, rng = tmp_path_factory.mktemp("loader"), np.random.default_rng(1)
    names = [str(i) for i in range(3 * BLOCK)]
    for name in names:
        add_image(root, name, rng.integers(0, 256, (40, 60, 3), np.uint8), [("a", (1, 1, 9, 9))])
    write_split(root, "train", names)
    return read_split(f"{root}:train", ["a"])


@pytest.mark.parametrize("num_workers", [0, 3])
def test_batches_come_in_the_samplers_order_with_what_it_names(samples, num_workers):
    train_set = VocDataset(samples, (32, 32), train=True)
    sampler = EpochBatchSampler(len(samples), 8)
    loader = TrainingLoader(train_set, sampler, num_workers=num_workers)
    for epoch, start_step in ((0, 0), (1, 0), (1, 6)):
        train_set.set_epoch(epoch)
        sampler.set_epoch(epoch, start_step)
        found = list(loader)
        assert len(found) == 12 - start_step
        for batch, indices in zip(found, sampler, strict=True):
            expected = collate([train_set[index] for index in indices])
            assert all(torch.equal(a, b) for a, b in zip(batch, expected, strict=True))


def test_three_workers_decode_each_image_about_once(samples, monkeypatch, tmp_path):
    log = tmp_path / "decoded"

    def noting(path, **options):
        worker = get_worker_info().id
        with open(log, "a") as file:  # short lines of several processes do not mix
            os.write(file.fileno(), f"{worker} {path}\n".encode())
        return read_image(path, **options)

    monkeypatch.setattr("data.cache.read_image", noting)
    train_set = VocDataset(samples, (32, 32), train=True, mosaic_prob=1)
    sampler = EpochBatchSampler(len(samples), 8)
    loader = TrainingLoader(train_set, sampler, num_workers=3)
    loader._loader.multiprocessing_context = "fork"  # the workers see what is patched
    assert len(list(loader)) == 12
    decoded = Counter(line.split()[1] for line in log.read_text().splitlines())
    assert {line.split()[0] for line in log.read_text().splitlines()} == {"0", "1", "2"}
    assert len(decoded) == decoded.total() == len(samples)


def test_too_little_shared_memory_is_said_before_the_first_batch(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    check_shared_memory(1, tmp_path)
    check_shared_memory(2**60, tmp_path / "missing")  # a system without such a folder
    with pytest.raises(UserError, match=r"MB free: start Docker with --shm-size"):
        check_shared_memory(free + 2**40, tmp_path)


FULL_SHARED_MEMORY = """
import torch
from torch.utils.data import DataLoader, Dataset
from data.loader import collate
from utils.errors import run_script

class Zeros(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.zeros(416, 416, 3, dtype=torch.uint8).permute(2, 0, 1), torch.zeros(3, 5)

def main():
    for _ in DataLoader(Zeros(), batch_size=8, num_workers=4, collate_fn=collate):
        pass

run_script(main)
"""
SMALL = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=8m tmpfs /dev/shm && exec "$@"', "sh"]


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run([*SMALL, "true"], capture_output=True).returncode,
    reason="needs the right to mount a small /dev/shm",
)
def test_shared_memory_that_runs_out_ends_the_run_with_a_message():
    command = [*SMALL, sys.executable, "-c", FULL_SHARED_MEMORY]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "\nerror: a data loading process has no shared memory left: start" in "\n" + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("boxes", "rows"), [(0, 64), (30, 64), (33, 128)])
def test_padded_targets_have_one_of_few_lengths(boxes, rows):
    items = [(torch.zeros(8, 8, 3, dtype=torch.uint8).permute(2, 0, 1), torch.rand(boxes, 5))] * 2
    plain, padded = collate(items)[1], collate(items, pad=True)[1]
    assert padded.shape == (rows, 6)
    assert torch.equal(padded[: 2 * boxes], plain)
    assert (padded[2 * boxes :] == torch.tensor([0, -1, 0, 0, 0, 0])).all()
