import os
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info

from data.dataset import VocDataset, collate
from data.image import read_image
from data.loader import BlockSampler, TrainingLoader
from data.sampler import BLOCK, EpochBatchSampler
from data.voc import read_split
from tests.factory import add_image, write_split


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
    loader = TrainingLoader(train_set, sampler, num_workers=num_workers, pin_memory=False)
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
    loader = TrainingLoader(train_set, sampler, num_workers=3, pin_memory=False)
    loader._loader.multiprocessing_context = "fork"  # the workers see what is patched
    assert len(list(loader)) == 12
    decoded = Counter(line.split()[1] for line in log.read_text().splitlines())
    assert {line.split()[0] for line in log.read_text().splitlines()} == {"0", "1", "2"}
    assert len(decoded) == decoded.total() == len(samples)
