import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.ops import box_convert

from data.augment import Augmentation, LabelledImage
from data.dataset import VocDataset, init_worker
from data.loader import collate
from data.sampler import EpochBatchSampler
from data.voc import read_split
from tests.factory import add_image, coloured_boxes, write_split
from tests.test_augment import COLOURS, PLAIN, assert_boxes_lie_on_their_colours
from utils.errors import UserError

CLASSES = [f"class{i}" for i in range(8)]
SIZES = [(60, 80), (90, 50), (64, 64), (41, 120), (200, 130), (30, 30)]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Six images: two boxes each in colours that no neighbour has, the last without any."""
    root = tmp_path_factory.mktemp("voc") / "VOC2007"
    for i, (height, width) in enumerate(SIZES):
        left = (2, 4, width // 2 - 3, height // 2)
        right = (width // 2, height // 3, width - 2, height - 5)
        boxes = [left, right] if i < 5 else []
        ids = [2 * i % 8, (2 * i + 1) % 8][: len(boxes)]
        image = coloured_boxes((height, width), boxes, [COLOURS[c] for c in ids])
        named = [(CLASSES[c], box, i == 3) for c, box in zip(ids, boxes, strict=True)]
        add_image(root, f"image{i}", image, named)
    write_split(root, "train", [f"image{i}" for i in range(len(SIZES))])
    return read_split(f"{root}:train", CLASSES)


def as_image(item):
    """An item as the image that `assert_boxes_lie_on_their_colours` takes."""
    image, targets = item
    height, width = image.shape[1:]
    boxes = box_convert(targets[:, 1:], "cxcywh", "xyxy") * torch.tensor(
        [width, height, width, height]
    )
    return LabelledImage(
        image.permute(1, 2, 0).numpy(), boxes.numpy(), targets[:, 0].long().numpy()
    )


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("train", [False, True])
def test_items_are_uint8_images_and_float_targets(samples, train):
    dataset = VocDataset(samples, (64, 96), train=train)
    assert len(dataset) == 6
    for image, targets in (dataset[i] for i in range(6)):
        assert (image.dtype, image.shape) == (torch.uint8, (3, 64, 96))
        assert targets.dtype == torch.float32
        assert targets.shape == (len(targets), 5)


def test_validation_letterboxes_and_its_boxes_lie_on_their_colours(samples):
    dataset = VocDataset(samples, (96, 64), train=False)
    for index in (0, 1, 2, 4):
        image = as_image(dataset[index])
        assert image.class_ids.tolist() == samples[index].class_ids.tolist()
        assert_boxes_lie_on_their_colours(image)
        dataset.set_epoch(index + 1)
        assert same(dataset[index], VocDataset(samples, (96, 64), train=False)[index])


def test_a_letterboxed_target_is_the_one_worked_out_by_hand(samples):
    _, targets = VocDataset(samples, (96, 64), train=False)[0]
    # 60 x 80 becomes 48 x 64, 24 below the top; the box is (2, 4, 37, 30).
    expected = [0, 19.5 * 0.8 / 64, (24 + 17 * 0.8) / 96, 35 * 0.8 / 64, 26 * 0.8 / 96]
    assert targets[0].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("mosaic_prob", [0, 1])
def test_training_boxes_lie_on_their_colours(samples, mosaic_prob):
    dataset = VocDataset(
        [*samples[:3], *samples[4:]],
        (96, 128),
        train=True,
        mosaic_prob=mosaic_prob,
        mixup_prob=0,
        augmentation=PLAIN,
    )
    for epoch in range(20):
        dataset.set_epoch(epoch)
        for index in range(len(dataset)):
            assert_boxes_lie_on_their_colours(as_image(dataset[index]))


def test_difficult_objects_become_ignore_regions_in_both_modes(samples):
    for train in (False, True):
        dataset = VocDataset(samples, (64, 64), train=train, mosaic_prob=0)
        assert dataset[3][1][:, 0].tolist() == [-1, -1]
        assert (dataset[0][1][:, 0] >= 0).all()


def test_an_image_without_objects_has_targets_of_shape_0_5(samples):
    for train in (False, True):
        image, targets = VocDataset(samples, (64, 64), train=train, mosaic_prob=0)[5]
        assert image.shape == (3, 64, 64)
        assert targets.shape == (0, 5)


def test_boxes_stay_inside_the_input_and_wider_than_a_pixel(samples):
    dataset = VocDataset(samples, (64, 96), train=True)
    for epoch in range(15):
        dataset.set_epoch(epoch)
        targets = torch.cat([dataset[i][1] for i in range(6)])
        corners = box_convert(targets[:, 1:], "cxcywh", "xyxy")
        assert corners.min() > -1e-6
        assert corners.max() < 1 + 1e-6
        assert (targets[:, 3] * 96 > 0.999).all()
        assert (targets[:, 4] * 64 > 0.999).all()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_images_than_a_mosaic_needs_work(samples, count):
    dataset = VocDataset(samples[:count], (64, 64), train=True, mosaic_prob=1, mixup_prob=1)
    for epoch in range(10):
        dataset.set_epoch(epoch)
        assert all(len(dataset[i][1]) > 0 for i in range(count))


@pytest.fixture
def white(tmp_path):
    """One white image, all of it one object: a mosaic has four boxes, a mixup half white."""
    image = np.full((32, 32, 3), 255, np.uint8)
    add_image(tmp_path / "VOC", "white", image, [("class7", (0, 0, 32, 32))])
    write_split(tmp_path / "VOC", "train", ["white"])
    return read_split(f"{tmp_path / 'VOC'}:train", CLASSES)


def shares(samples, *, mosaic=True, **probabilities):
    """The shares of mosaics and of mixed-up images among 200 items."""
    dataset = VocDataset(samples, (32, 32), train=True, augmentation=PLAIN, **probabilities)
    mosaics = mixed = 0
    for epoch in range(200):
        dataset.set_epoch(epoch, mosaic=mosaic)
        image, targets = dataset[0]
        mosaics += len(targets) > 1
        mixed += bool(((image > 190) & (image < 193)).any())  # the mean of white and grey
    return mosaics / 200, mixed / 200


@pytest.mark.parametrize(
    ("mosaic_prob", "mixup_prob", "expected"),
    [(0.5, 0.5, (0.5, 0.25)), (0, 1, (0, 0)), (1, 0, (1, 0)), (0.2, 1, (0.2, 0.2))],
)
def test_mosaic_and_mixup_come_as_often_as_their_probabilities_say(
    white, mosaic_prob, mixup_prob, expected
):
    found = shares(white, mosaic_prob=mosaic_prob, mixup_prob=mixup_prob)
    # A mixup in which both images show grey at the same places only is rare, but not seen.
    assert found == pytest.approx(expected, abs=0.1)


def test_without_mosaic_there_is_no_mosaic_and_no_mixup(white):
    assert shares(white, mosaic=False, mosaic_prob=1, mixup_prob=1) == (0, 0)


def epochs_of_batches(samples, num_workers, epochs=3, **kwargs):
    """Every batch of some epochs, the last one without mosaic."""
    dataset = VocDataset(samples, (32, 64), train=True, seed=5)
    sampler = EpochBatchSampler(len(dataset), 2, seed=5)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=init_worker,
        **kwargs,
    )
    batches = []
    for epoch in range(epochs):
        dataset.set_epoch(epoch, mosaic=epoch < epochs - 1)
        sampler.set_epoch(epoch)
        batches.append(list(loader))
    return batches


@pytest.mark.parametrize("num_workers", [1, 2])
def test_any_number_of_persistent_workers_gives_the_same_batches(samples, num_workers):
    expected = epochs_of_batches(samples, 0)
    found = epochs_of_batches(samples, num_workers, multiprocessing_context="fork")
    assert [len(epoch) for epoch in found] == [3, 3, 3]
    for batches in zip(expected, found, strict=True):
        assert all(same(*pair) for pair in zip(*batches, strict=True))


def test_epoch_seed_and_mosaic_change_an_item_and_nothing_else_does(samples):
    def item(seed=0, epoch=0, mosaic=True):
        dataset = VocDataset(samples, (32, 64), train=True, seed=seed, mosaic_prob=1)
        _ = dataset[2]  # what was read before must not matter
        dataset.set_epoch(epoch, mosaic=mosaic)
        return dataset[1]

    assert same(item(), item())
    for changed in ({"seed": 1}, {"epoch": 1}, {"mosaic": False}):
        assert not torch.equal(item()[0], item(**changed)[0])


def test_two_samples_of_one_image_are_augmented_differently(white):
    dataset = VocDataset(white * 2, (32, 64), train=True)
    assert not torch.equal(dataset[0][0], dataset[1][0])


def test_augmentation_is_what_the_items_are_made_with(white):
    whole = Augmentation(scale=(1, 1), jitter=0, hue=0, saturation=0, value=0)
    dataset = VocDataset(white, (64, 64), train=True, mosaic_prob=0, augmentation=whole)
    assert dataset[0][1].tolist() == [[7, 0.5, 0.5, 1, 1]]
    assert (dataset[0][0] == 255).all()


def test_collate_counts_targets_by_image_and_keeps_channels_last_memory(samples):
    dataset = VocDataset(samples, (32, 64), train=False)
    items = [dataset[i] for i in (5, 0, 5, 1)]
    images, targets = collate(items)
    assert (images.dtype, images.shape) == (torch.uint8, (4, 3, 32, 64))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(image, item[0]) for image, item in zip(images, items, strict=True))
    assert targets.dtype == torch.float32
    assert targets[:, 0].tolist() == [1, 1, 3, 3]
    assert torch.equal(targets[:, 1:], torch.cat([items[1][1], items[3][1]]))


def test_a_batch_without_objects_has_targets_of_shape_0_6(samples):
    images, targets = collate([VocDataset(samples, (32, 32), train=False)[5]] * 2)
    assert images.shape == (2, 3, 32, 32)
    assert targets.shape == (0, 6)


@pytest.mark.parametrize("knobs", [{"mosaic_prob": 1.1}, {"mixup_prob": -0.1}, {"seed": -1}])
def test_a_value_out_of_range_is_named_at_once(samples, knobs):
    with pytest.raises(UserError, match=next(iter(knobs))):
        VocDataset(samples, (32, 32), train=True, **knobs)


@pytest.mark.parametrize("mosaic_prob", [0, 1])
def test_a_repeated_image_is_the_same_image_augmented_anew(samples, mosaic_prob):
    dataset = VocDataset(
        samples, (64, 96), train=True, mosaic_prob=mosaic_prob, repeat_threshold=1, seed=3
    )
    sampler = EpochBatchSampler(len(samples), 2, seed=3, repeats=dataset.repeats)
    places = [place for epoch in range(8) for place in epoch_places(sampler, epoch)]
    again = [(epoch, place) for epoch, place in places if place >= len(samples)]
    assert again  # some image came twice in an epoch
    for epoch, place in again:
        dataset.set_epoch(epoch)
        first, second = dataset[place % len(samples)], dataset[place]
        assert not torch.equal(first[0], second[0])
        if not mosaic_prob:  # its own objects alone, of which some may be out of view
            own = {-1, *samples[place % len(samples)].class_ids.tolist()}
            assert {*second[1][:, 0].tolist()} <= own


def epoch_places(sampler, epoch):
    sampler.set_epoch(epoch)
    return [(epoch, place) for batch in sampler for place in batch]


def test_an_impossible_repeat_threshold_is_refused(samples):
    with pytest.raises(UserError, match=r"repeat_threshold is 1\.5"):
        VocDataset(samples, (64, 64), train=True, repeat_threshold=1.5)
