import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data.augment import Augmentation
from data.cache import ImageCache, RecentImages, choose_reduction
from data.dataset import VocDataset
from data.image import read_image
from data.loader import collate
from data.sampler import BLOCK, EpochBatchSampler
from data.voc import read_split
from tests.factory import add_image, write_split
from utils.errors import UserError

SIZES = [(40, 60), (150, 100), (20, 20), (90, 201)]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Four images of noise, a box each; the second and fourth exceed twice an input of 32."""
    root, rng = tmp_path_factory.mktemp("cache") / "VOC", np.random.default_rng(0)
    for i, (height, width) in enumerate(SIZES):
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        add_image(root, str(i), image, [("a", (2, 2, width - 4, height - 3))])
    write_split(root, "train", [str(i) for i in range(len(SIZES))])
    return read_split(f"{root}:train", ["a"])


def test_images_are_kept_whole_or_shrunk_to_fit_the_limit(samples):
    cache = ImageCache(samples, (64, 64), 10**6)
    assert cache.kept == 4
    shapes = [cache.read(i).shape for i in range(4)]
    assert shapes == [(40, 60, 3), (64, 43, 3), (20, 20, 3), (29, 64, 3)]
    for i in (0, 2):
        assert (cache.read(i) == read_image(samples[i].image_path)).all()
    for i in (1, 3):
        mean = read_image(samples[i].image_path).mean()
        assert cache.read(i).mean() == pytest.approx(mean, abs=1)


@pytest.mark.parametrize(("budget", "kept"), [(-1, 0), (0, 0), (7199, 0), (7200, 1), (15456, 2)])
def test_what_exceeds_the_budget_comes_from_disk(samples, budget, kept):
    cache = ImageCache(samples, (64, 64), budget)
    assert cache.kept == kept
    for i in range(kept, 4):
        assert (cache.read(i) == read_image(samples[i].image_path)).all()


def test_images_in_memory_are_read_from_disk_once(samples, tmp_path):
    copy = tmp_path / "copy.png"
    shutil.copy(samples[0].image_path, copy)
    cache = ImageCache([replace(samples[0], image_path=str(copy))], (64, 64), 10**6)
    copy.unlink()
    assert (cache.read(0) == read_image(samples[0].image_path)).all()


@pytest.mark.parametrize(
    ("size_hw", "reduction"),
    [((90, 201), 1), ((46, 100), 1), ((45, 101), 1), ((45, 100), 2), ((23, 50), 2), ((22, 50), 4)],
)
def test_an_image_is_reduced_as_far_as_it_need_not_be_enlarged(size_hw, reduction):
    assert choose_reduction((90, 201), size_hw) == reduction
    assert choose_reduction((9, 9), (100, 100)) == 1
    assert choose_reduction((9000, 9000), (1, 1)) == 8


@pytest.mark.parametrize("budget", [0, 10**6])
def test_a_reduced_image_says_its_scale(samples, budget):
    cache = ImageCache(samples, (64, 64), budget, reduced=True)
    image, scale = cache.read_for(0, (20, 30))
    assert (image.shape, scale) == ((20, 30, 3), (0.5, 0.5))
    image, scale = cache.read_for(3, (8, 20))
    shrunk = (29 / 90, 64 / 201) if budget else (1, 1)  # in the cache it fits into the limit
    reduction = 2 if budget else 8
    assert image.shape[:2] == ((15, 32) if budget else (12, 26))
    assert scale == pytest.approx((shrunk[0] / reduction, shrunk[1] / reduction))


def test_reduced_images_come_from_memory_as_they_come_from_disk(samples):
    kept = ImageCache(samples, (400, 400), 10**6, reduced=True)
    disk = ImageCache(samples, (400, 400), 0, reduced=True)
    for i, (height, width) in enumerate(SIZES):
        for part in (1, 2, 3, 5, 9):
            size_hw = (height // part, width // part)
            (image, scale), (other, other_scale) = (c.read_for(i, size_hw) for c in (kept, disk))
            assert scale == other_scale
            assert (image == other).all()


def test_no_images_are_no_error():
    assert ImageCache([], (64, 64), 10**6).kept == 0


@pytest.mark.parametrize("budget", [0, 10**6])
def test_an_image_that_changed_its_size_is_named(samples, budget):
    wrong = replace(samples[0], image_hw=(60, 40))
    with pytest.raises(UserError, match=r"0\.png.*\(40, 60\).*\(60, 40\)"):
        ImageCache([wrong], (64, 64), budget).read(0)


def test_the_cache_changes_no_validation_item(samples):
    plain = VocDataset(samples, (32, 64), train=False)
    cached = VocDataset(samples, (32, 64), train=False, cache=True)
    for i in range(4):
        assert all(torch.equal(a, b) for a, b in zip(plain[i], cached[i], strict=True))


def test_the_cache_changes_no_training_item_of_an_image_within_the_limit(samples):
    small = [samples[0], samples[2]]
    plain = VocDataset(small, (32, 32), train=True)
    cached = VocDataset(small, (32, 32), train=True, cache=True)
    for epoch in range(5):
        plain.set_epoch(epoch)
        cached.set_epoch(epoch)
        for i in range(2):
            assert all(torch.equal(a, b) for a, b in zip(plain[i], cached[i], strict=True))


def test_boxes_of_shrunk_images_shrink_with_them(samples):
    plain = VocDataset(samples, (32, 32), train=True, mosaic_prob=0)
    cached = VocDataset(samples, (32, 32), train=True, mosaic_prob=0, cache=True)
    for epoch in range(5):
        plain.set_epoch(epoch)
        cached.set_epoch(epoch)
        for i in (1, 3):  # rounded to pixels of different sizes: 1.5 of 32 is .047
            torch.testing.assert_close(plain[i][1], cached[i][1], rtol=0, atol=0.047)


def test_boxes_follow_the_rounded_size_of_a_shrunk_image(tmp_path):
    add_image(tmp_path, "thin", np.zeros((9, 700, 3), np.uint8), [("a", (0, 0, 700, 9))])
    write_split(tmp_path, "train", ["thin"])
    fourfold = Augmentation(scale=(4, 4), jitter=0)  # 1.65 x 128 becomes 2 x 128 in the cache
    dataset = VocDataset(
        read_split(f"{tmp_path}:train", ["a"]),
        (32, 32),
        train=True,
        mosaic_prob=0,
        augmentation=fourfold,
        cache=True,
    )
    assert dataset[0][1][:, 3:].tolist() == [[1, 2 / 32]]


def test_cache_gb_bounds_what_is_kept_with_its_reductions(samples):
    one_image = (40 * 60 + 20 * 30 + 10 * 15 + 5 * 8) * 3 / 2**30
    less = VocDataset(samples, (32, 32), train=True, cache=True, cache_gb=one_image * 0.999)
    assert less._images.kept == 0
    dataset = VocDataset(samples, (32, 32), train=True, cache=True, cache_gb=one_image)
    assert dataset._images.kept == 1


def test_spawned_workers_read_the_cache_and_follow_the_epoch(samples):
    dataset = VocDataset(samples, (32, 32), train=True, cache=True)
    loader = DataLoader(
        dataset,
        batch_size=4,
        collate_fn=collate,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )
    for epoch in range(2):
        dataset.set_epoch(epoch)
        (found,) = loader
        expected = collate([dataset[i] for i in range(4)])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("limits", [(3, 10**6), (100, 30)])
def test_recent_images_are_made_once_and_bounded(limits):
    recent, made = RecentImages(*limits), []

    def get(index):
        def make():
            made.append(index)
            return np.full(10, index, np.uint8)

        return recent.get(index, 1, make)[0]

    for index in (1, 2, 1, 3, 1):
        assert get(index) == index
    assert made == [1, 2, 3]
    get(4)  # the fourth, or 40 bytes: the one that was used longest ago goes
    get(1)
    get(2)
    assert made == [1, 2, 3, 4, 2]


def test_the_reductions_of_an_image_come_and_go_together():
    recent = RecentImages(2, 10**6)
    for index, reduction in ((1, 1), (1, 2), (2, 1), (3, 1)):
        recent.get(index, reduction, lambda: np.zeros(10, np.uint8))
    with pytest.raises(RuntimeError, match="gone"):
        recent.get(1, 2, raise_gone)
    recent.get(2, 1, raise_gone)


def raise_gone():
    raise RuntimeError("gone")


def test_another_process_starts_without_recent_images():
    recent = RecentImages(3, 10**6)
    recent.get(0, 1, lambda: np.zeros(10**5, np.uint8))
    assert len(pickle.dumps(recent)) < 1000
    copy = pickle.loads(pickle.dumps(recent))
    assert (copy.limit, copy.limit_bytes) == (3, 10**6)


def test_an_image_larger_than_the_bound_still_comes():
    assert RecentImages(9, 3).get(0, 1, lambda: np.zeros(10, np.uint8)).size == 10


def test_an_epoch_of_mosaics_decodes_each_image_about_once(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    for i in range(3 * BLOCK):
        add_image(tmp_path, str(i), rng.integers(0, 256, (40, 60, 3), np.uint8), [])
    write_split(tmp_path, "train", [str(i) for i in range(3 * BLOCK)])
    samples = read_split(f"{tmp_path}:train", ["a"])
    decoded = []
    monkeypatch.setattr(
        "data.cache.read_image", lambda path, **kw: decoded.append(path) or read_image(path, **kw)
    )
    dataset = VocDataset(samples, (32, 32), train=True, mosaic_prob=1, mixup_prob=0)
    for (index,) in EpochBatchSampler(len(dataset), 1):
        _ = dataset[index]
    assert len(decoded) == len(set(decoded)) == 3 * BLOCK


def test_what_was_decoded_before_changes_no_item(samples):
    fresh = VocDataset(samples, (32, 32), train=True, mosaic_prob=1)
    used = VocDataset(samples, (32, 32), train=True, mosaic_prob=1)
    for i in (3, 2, 1, 0):
        _ = used[i]
    for i in range(4):
        assert all(torch.equal(a, b) for a, b in zip(fresh[i], used[i], strict=True))
