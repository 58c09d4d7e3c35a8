import dataclasses
from itertools import chain

import numpy as np
import pytest

from data.sampler import (
    BLOCK,
    EpochBatchSampler,
    EpochBlocks,
    epoch_order,
    random_generator,
    repeat_factors,
)
from data.voc import Sample
from utils.errors import UserError


def epoch_batches(length, batch_size, epoch=0, start_step=0, **kwargs):
    sampler = EpochBatchSampler(length, batch_size, **kwargs)
    sampler.set_epoch(epoch, start_step)
    return list(sampler)


@pytest.mark.parametrize("length", [8, 9, 15, 16, 17, 100])
def test_every_image_comes_and_every_batch_is_full(length):
    batches = epoch_batches(length, 8)
    assert len(batches) == len(EpochBatchSampler(length, 8)) == -(-length // 8)
    assert all(len(batch) == 8 for batch in batches)
    order = list(chain(*batches))
    assert sorted(order[:length]) == list(range(length))
    assert order[length:] == order[: len(order) - length]


@pytest.mark.parametrize("length", [1, 3, 7])
def test_a_data_set_below_one_batch_gives_one_step_of_what_there_is(length):
    (batch,) = epoch_batches(length, 8)
    assert sorted(batch) == list(range(length))


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("length", [24, 25, 50, 97])
def test_ranks_together_see_what_one_rank_at_the_whole_batch_sees(length, world_size):
    ranks = [
        epoch_batches(length, 4, epoch=3, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    together = [list(chain(*shares)) for shares in zip(*ranks, strict=True)]
    assert together == epoch_batches(length, 4 * world_size, epoch=3)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 7])
def test_ranks_share_a_tiny_data_set_in_equal_numbers(length):
    ranks = [epoch_batches(length, 4, rank=rank, world_size=3) for rank in range(3)]
    assert all(len(batches) == 1 for batches in ranks)
    assert {len(batches[0]) for batches in ranks} == {min(4, -(-length // 3))}
    seen = list(chain(*(batches[0] for batches in ranks)))
    assert set(seen) == set(range(length))


@pytest.mark.parametrize("start_step", [0, 1, 4, 7])
def test_a_resumed_epoch_goes_on_as_the_uninterrupted_one(start_step):
    assert epoch_batches(50, 8, 2, start_step) == epoch_batches(50, 8, 2)[start_step:]


def test_start_step_counts_for_its_epoch_only():
    sampler = EpochBatchSampler(50, 8)
    sampler.set_epoch(1, start_step=5)
    assert len(sampler) == 7
    assert len(list(sampler)) == 2
    sampler.set_epoch(2)
    assert len(list(sampler)) == 7


def test_order_follows_seed_and_epoch_alone():
    assert epoch_batches(50, 8, 1, seed=4) == epoch_batches(50, 8, 1, seed=4)
    orders = {
        str(epoch_batches(50, 8, epoch, seed=seed)) for epoch in range(5) for seed in range(5)
    }
    assert len(orders) == 25


@pytest.mark.parametrize(("length", "batch_size"), [(0, 4), (5, 0), (5, -1)])
def test_nothing_to_train_on_is_an_error_not_an_empty_epoch(length, batch_size):
    with pytest.raises(UserError, match=r"empty|batch_size"):
        EpochBatchSampler(length, batch_size)


def test_an_impossible_rank_is_refused():
    with pytest.raises(ValueError, match="rank 2"):
        EpochBatchSampler(5, 2, rank=2, world_size=2)


def test_a_negative_seed_is_a_user_error():
    with pytest.raises(UserError, match="seed of 0 or more"):
        random_generator(-1, 0)


@pytest.mark.parametrize("length", [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_a_block_is_whole_and_holds_its_image(length):
    blocks = EpochBlocks(length, seed=3)
    for index in range(length):
        around = blocks.around(index, epoch=2).tolist()
        assert index in around
        assert len(set(around)) == len(around) == min(BLOCK, length)


def test_blocks_follow_the_batches_of_the_epoch():
    order = list(chain(*epoch_batches(4 * BLOCK, 8, epoch=5, seed=1)))
    blocks = EpochBlocks(4 * BLOCK, seed=1)
    for place, index in enumerate(order):
        start = place // BLOCK * BLOCK
        assert blocks.around(index, epoch=5).tolist() == order[start : start + BLOCK]


def test_blocks_change_with_the_epoch_and_come_back_with_it():
    blocks = EpochBlocks(200, seed=0)
    first, second = (set(blocks.around(7, epoch=epoch).tolist()) for epoch in (0, 1))
    assert first != second
    assert set(blocks.around(7, epoch=0).tolist()) == first


def test_the_order_shares_no_random_numbers_with_an_image():
    """SeedSequence pads with zeros: (seed, epoch) alone would be image 0's key."""
    drawn = random_generator(4, 2, 0).permutation(100)
    assert epoch_order(100, seed=4, epoch=2).tolist() != drawn.tolist()


def samples_of(*class_ids):
    """Samples whose objects have these classes, one tuple per image."""
    return [
        Sample(
            image_path="x",
            image_id="x",
            image_hw=(8, 8),
            boxes_xyxy=np.zeros((len(ids), 4), np.float32),
            class_ids=np.array(ids, np.int64),
            difficult=np.zeros(len(ids), bool),
        )
        for ids in class_ids
    ]


def test_an_image_is_repeated_by_its_rarest_class():
    samples = samples_of(*[(0,)] * 7, (0, 1), (), (1, 2))
    factors = repeat_factors(samples, 0.5)  # classes 0, 1, 2 are in 8, 2 and 1 of 10 images
    np.testing.assert_allclose(factors[:7], 1)
    np.testing.assert_allclose(factors[7:], [(0.5 / 0.2) ** 0.5, 1, (0.5 / 0.1) ** 0.5])
    assert repeat_factors(samples, 0) is None


def test_difficult_objects_repeat_no_image():
    (sample,) = samples_of((0,))
    sample = dataclasses.replace(sample, difficult=np.array([True]))
    np.testing.assert_allclose(repeat_factors([sample, sample], 1.0), [1, 1])


def test_repeated_images_come_as_often_as_expected_and_each_time_as_another_place():
    repeats = np.array([1.0] * 90 + [4.0] * 10)
    counts = np.zeros(100)
    for epoch in range(50):
        order = epoch_order(100, seed=1, epoch=epoch, repeats=repeats)
        assert len(set(order.tolist())) == 100
        images = order % 100
        times = np.bincount(images, minlength=100)
        expected = repeats * 100 / repeats.sum()
        assert (np.abs(times - expected) < 1).all()
        for image in np.flatnonzero(times > 1):
            assert sorted(order[images == image] // 100) == list(range(times[image]))
        counts += times
    np.testing.assert_allclose(counts / 50, repeats * 100 / repeats.sum(), atol=0.25)


def test_equal_repeats_give_every_image_once():
    order = epoch_order(37, seed=0, epoch=3, repeats=np.ones(37))
    assert sorted(order.tolist()) == list(range(37))


def test_mosaic_partners_of_repeated_images_are_images_of_their_block():
    repeats = np.array([1.0] * 60 + [5.0] * 10)
    blocks = EpochBlocks(70, seed=2, repeats=repeats)
    order = epoch_order(70, seed=2, epoch=4, repeats=repeats)
    for place, index in enumerate(order.tolist()):
        near = blocks.around(index, epoch=4)
        start = min(place // BLOCK * BLOCK, 70 - BLOCK)
        assert near.tolist() == (order[start : start + BLOCK] % 70).tolist()
