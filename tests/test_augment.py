import colorsys
import dataclasses

import cv2
import numpy as np
import pytest

from data import augment
from data.augment import (
    Augmentation,
    LabelledImage,
    Source,
    mixup,
    place_image,
    scale_hsv,
    seen_boxes,
)
from data.letterbox import GREY
from tests.factory import coloured_boxes
from utils.errors import UserError

PLAIN = Augmentation(hue=0, saturation=0, value=0)  # geometry only: colours stay what they are

# The corners of the RGB cube: their blends with the grey around them never look like another one.
COLOURS = [tuple(255 * (i >> bit & 1) for bit in range(3)) for i in range(8)]


def source_of(image):
    """A Source that is at hand at its own size, whatever size it will be drawn at."""
    whole = (image.image, (1.0, 1.0))
    return Source(image.image.shape[:2], image.boxes_xyxy, image.class_ids, lambda _: whole)


def random_single(image, input_hw, **options):
    return augment.random_single(source_of(image), input_hw, **options)


def random_mosaic(images, input_hw, **options):
    return augment.random_mosaic([source_of(image) for image in images], input_hw, **options)


def drawn(image_hw, boxes_xyxy, class_ids=None):
    """An image with boxes drawn on grey, the class id telling the colour."""
    class_ids = range(len(boxes_xyxy)) if class_ids is None else class_ids
    image = coloured_boxes(image_hw, boxes_xyxy, [COLOURS[i] for i in class_ids])
    boxes_xyxy = np.array(boxes_xyxy, np.float32).reshape(-1, 4)
    return LabelledImage(image, boxes_xyxy, np.array(list(class_ids), np.int64))


def colour_mask(image, colour, contrast=64):
    """(H, W) bool: the pixels that have more of `colour` than of grey."""
    signs = np.sign(np.array(colour) - GREY)
    return ((image.astype(int) - GREY) * signs > contrast).all(axis=-1)


def box_mask(boxes_xyxy, size_hw, margin):
    """(H, W) bool: the pixels whose centre is in some box, each grown by `margin` pixels."""
    rows, columns = (np.arange(side) + 0.5 for side in size_hw)
    mask = np.zeros(size_hw, bool)
    for x1, y1, x2, y2 in boxes_xyxy:
        inside_rows = (rows > y1 - margin) & (rows < y2 + margin)
        mask |= inside_rows[:, None] & (columns > x1 - margin) & (columns < x2 + margin)
    return mask


def assert_boxes_lie_on_their_colours(image):
    """Each class's colour fills its boxes, and is nowhere else, to 1.5 pixels at each edge.

    Lines of up to two pixels are no contradiction: their boxes may have been dropped as too thin.
    """
    size_hw = image.image.shape[:2]
    for class_id, colour in enumerate(COLOURS):
        boxes_xyxy = image.boxes_xyxy[image.class_ids == class_id]
        mask = colour_mask(image.image, colour)
        thick = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
        assert not (box_mask(boxes_xyxy, size_hw, -1.5) & ~mask).any()
        assert not (thick.astype(bool) & ~box_mask(boxes_xyxy, size_hw, 1.5)).any()


def two_boxes(image_hw, first_class):
    height, width = image_hw
    left = [width // 8, height // 6, width // 3, height // 2]
    right = [width // 2, height // 3, width - width // 10, height - 3]
    return drawn(image_hw, [left, right], [first_class, first_class + 1])


@pytest.mark.parametrize("input_hw", [(96, 96), (64, 160)])
@pytest.mark.parametrize("image_hw", [(120, 160), (300, 90), (33, 40)])
def test_boxes_follow_the_pixels_of_a_single_image(image_hw, input_hw):
    for seed in range(60):
        rng = np.random.default_rng(seed)
        result = random_single(two_boxes(image_hw, 0), input_hw, augmentation=PLAIN, rng=rng)
        assert result.image.shape == (*input_hw, 3)
        assert_boxes_lie_on_their_colours(result)


@pytest.mark.parametrize("input_hw", [(96, 96), (64, 160)])
def test_boxes_follow_the_pixels_of_a_mosaic(input_hw):
    images = [
        two_boxes(hw, 2 * i) for i, hw in enumerate([(120, 160), (200, 90), (50, 50), (97, 301)])
    ]
    for seed in range(60):
        rng = np.random.default_rng(seed)
        assert_boxes_lie_on_their_colours(
            random_mosaic(images, input_hw, augmentation=PLAIN, rng=rng)
        )


@pytest.mark.parametrize("flip", [False, True])
def test_a_placement_is_exact_beyond_every_edge_of_the_canvas(flip):
    image = drawn((60, 80), [[5, 10, 25, 50], [40, 2, 78, 30]], [0, 1])
    for top, left in [(0, 0), (-37, -51), (20, 33), (-100, 63), (63, -100)]:
        canvas = np.full((64, 64, 3), GREY, np.uint8)
        placement = place_image(
            (60, 80), (0, 0, 64, 64), size_hw=(101, 137), top_left=(top, left), flip=flip
        )
        placement.draw(image.image, canvas)
        seen = seen_boxes([image], [placement], min_visible=0)
        assert_boxes_lie_on_their_colours(LabelledImage(canvas, *seen))
        scale = np.array([137 / 80, 101 / 60] * 2)
        boxes = image.boxes_xyxy[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [80, 0, 80, 0]
        ideal = (boxes if flip else image.boxes_xyxy) * scale + [left, top, left, top]
        # The part seen is rounded to whole pixels of the source: half of one is 0.86 here.
        for box, index in zip(*seen, strict=True):
            assert np.abs(box - ideal[index].clip(0, 64)).max() < 0.9


def test_a_whole_image_at_its_own_size_is_copied_and_flipped_without_a_change():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    source = LabelledImage(image, np.array([[3, 4, 10, 20]], np.float32), np.array([7]))
    for flip, expected, box in [(False, image, [5, 5, 12, 21]), (True, image[:, ::-1], 0)]:
        canvas = np.zeros((40, 40, 3), np.uint8)
        placement = place_image(
            (20, 30), (0, 0, 40, 40), size_hw=(20, 30), top_left=(1, 2), flip=flip
        )
        placement.draw(source.image, canvas)
        boxes_xyxy, class_ids = seen_boxes([source], [placement], min_visible=0)
        assert (canvas[1:21, 2:32] == expected).all()
        assert boxes_xyxy.tolist() == [[22, 5, 29, 21] if flip else box]
        assert class_ids.tolist() == [7]


def test_mosaic_shows_each_image_in_its_quadrant_with_a_corner_at_the_crossing():
    fixed = dataclasses.replace(
        PLAIN, mosaic_centre=(0.5, 0.5), mosaic_scale=(0.4, 0.4), jitter=0, flip_prob=0
    )
    images = [drawn((50, 50), [[0, 0, 50, 50]], [i]) for i in range(4)]
    rng = np.random.default_rng(0)
    result = random_mosaic(images, (100, 100), augmentation=fixed, rng=rng)
    assert result.class_ids.tolist() == [0, 1, 2, 3]
    assert result.boxes_xyxy.tolist() == [
        [10, 10, 50, 50],
        [50, 10, 90, 50],
        [10, 50, 50, 90],
        [50, 50, 90, 90],
    ]
    assert (result.image[:10] == GREY).all()
    assert_boxes_lie_on_their_colours(result)


def test_boxes_end_at_the_seams_of_a_mosaic():
    images = [drawn((50, 50), [[0, 0, 50, 50]], [i]) for i in range(4)]
    full = dataclasses.replace(PLAIN, mosaic_scale=(1, 1), mosaic_centre=(0.25, 0.25), jitter=0)
    result = random_mosaic(images, (64, 128), augmentation=full, rng=np.random.default_rng(1))
    left, right = 32, 32 + 64
    assert result.boxes_xyxy.tolist() == [
        [0, 0, left, 16],
        [left, 0, right, 16],
        [0, 16, left, 64],
        [left, 16, right, 64],
    ]


@pytest.mark.parametrize("min_visible", [0.0, 0.4])
def test_cut_boxes_are_kept_ignored_or_dropped_by_what_is_left_of_them(min_visible):
    boxes = np.array([[0, 0, 10, 10], [0, 0, 30, 10], [0, 0, 21, 10], [30, 5, 50, 6]], np.float32)
    image = LabelledImage(np.zeros((50, 50, 3), np.uint8), boxes, np.arange(4))
    placement = place_image(
        (50, 50), (0, 0, 30, 50), size_hw=(50, 50), top_left=(0, -20), flip=False
    )
    boxes_xyxy, class_ids = seen_boxes([image], [placement], min_visible=min_visible)
    # Out of view, a third in view, one pixel wide, one pixel high.
    assert boxes_xyxy.tolist() == [[0, 0, 10, 10]]
    assert class_ids.tolist() == [1 if min_visible == 0 else -1]


def test_mixup_is_the_mean_of_both_images_with_the_objects_of_both():
    first = drawn((40, 40), [[2, 3, 15, 30]], [1])
    second = drawn((40, 40), [[20, 5, 38, 17]], [4])
    mixed = mixup(first, second)
    mean = (first.image.astype(int) + second.image) / 2
    assert np.abs(mixed.image - mean).max() <= 0.5
    assert mixed.class_ids.tolist() == [1, 4]
    for box, class_id in zip(mixed.boxes_xyxy, mixed.class_ids, strict=True):
        half = colour_mask(mixed.image, COLOURS[class_id], contrast=32)
        assert (half == box_mask([box], (40, 40), 0)).all()


@pytest.mark.parametrize("transform", ["single", "mosaic", "mixup"])
def test_images_without_objects_stay_without_objects(transform):
    empty, rng = drawn((30, 40), []), np.random.default_rng(0)
    result = {
        "single": lambda: random_single(empty, (64, 64), augmentation=PLAIN, rng=rng),
        "mosaic": lambda: random_mosaic([empty] * 4, (64, 64), augmentation=PLAIN, rng=rng),
        "mixup": lambda: mixup(empty, empty),
    }[transform]()
    assert result.boxes_xyxy.shape == (0, 4)
    assert result.boxes_xyxy.dtype == np.float32
    assert result.class_ids.shape == (0,)
    assert result.class_ids.dtype == np.int64


@pytest.mark.parametrize("image_hw", [(1, 1), (1, 500), (500, 1), (2, 3)])
def test_images_of_any_shape_work(image_hw):
    image = LabelledImage(
        np.full((*image_hw, 3), 255, np.uint8),
        np.array([[0, 0, image_hw[1], image_hw[0]]], np.float32),
        np.array([7]),
    )
    for seed in range(30):
        rng = np.random.default_rng(seed)
        assert_boxes_lie_on_their_colours(
            random_single(image, (64, 64), augmentation=PLAIN, rng=rng)
        )
        random_mosaic([image] * 4, (64, 32), augmentation=PLAIN, rng=rng)


def test_the_source_is_never_written_to():
    augmentation, rng = Augmentation(), np.random.default_rng(0)
    source = two_boxes((40, 50), 1)
    image, boxes_xyxy = source.image.copy(), source.boxes_xyxy.copy()
    source.image.flags.writeable = source.boxes_xyxy.flags.writeable = False
    for _ in range(20):
        single = random_single(source, (64, 64), augmentation=augmentation, rng=rng)
        mosaic = random_mosaic([source] * 4, (64, 64), augmentation=augmentation, rng=rng)
        mixup(single, mosaic)
    assert np.array_equal(source.image, image)
    assert np.array_equal(source.boxes_xyxy, boxes_xyxy)


@pytest.mark.parametrize(
    "gains", [(1.1, 1, 1), (0.9, 1, 1), (1.8, 1, 1), (1, 0.3, 1), (1, 1.7, 0.6), (1, 1, 1.4)]
)
def test_hsv_gains_agree_with_colorsys(gains):
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    expected = np.empty(image.shape)
    for place in np.ndindex(20, 20):
        hue, saturation, value = colorsys.rgb_to_hsv(*(image[place] / 255))
        scaled = hue * gains[0] % 1, min(1, saturation * gains[1]), min(1, value * gains[2])
        expected[place] = np.array(colorsys.hsv_to_rgb(*scaled)) * 255
    difference = np.abs(scale_hsv(image, gains) - expected)
    # OpenCV rounds hue to two degrees, before and after: up to (1 + gain) / 60 of a channel.
    assert difference.mean() < 2.5
    assert difference.max() <= 3 + (1 + gains[0]) / 60 * 255


def test_without_gains_no_pixel_changes():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    fixed = dataclasses.replace(PLAIN, scale=(1, 1), jitter=0, flip_prob=0)
    source = LabelledImage(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    result = random_single(source, (16, 16), augmentation=fixed, rng=np.random.default_rng(0))
    assert (result.image == image).all()


def sizes_of_singles(augmentation, count=200):
    """(count, 2) width and height at 100 x 100 of a white square, flips and places ignored."""
    image = drawn((50, 50), [[0, 0, 50, 50]], [7])
    results = (
        random_single(image, (100, 100), augmentation=augmentation, rng=rng)
        for rng in map(np.random.default_rng, range(count))
    )
    return np.array([result.boxes_xyxy[0, 2:] - result.boxes_xyxy[0, :2] for result in results])


def test_scale_and_jitter_reach_their_limits_and_no_further():
    no_jitter = dataclasses.replace(PLAIN, scale=(0.25, 0.5), jitter=0)
    sizes = sizes_of_singles(no_jitter)
    assert (sizes[:, 0] == sizes[:, 1]).all()
    assert 25 <= sizes.min() <= 27
    assert 48 <= sizes.max() <= 50
    ratios = np.divide(*sizes_of_singles(dataclasses.replace(PLAIN, scale=(0.8, 0.8))).T)
    assert 0.7 / 1.3 - 0.02 < ratios.min() < 0.65
    assert 1.55 < ratios.max() < 1.3 / 0.7 + 0.03


@pytest.mark.parametrize(("flip_prob", "expected"), [(0, 0), (0.5, 0.5), (1, 1)])
def test_flip_prob_is_the_share_of_mirrored_images(flip_prob, expected):
    image = drawn((50, 50), [[0, 0, 10, 50], [40, 0, 50, 50]])
    fixed = dataclasses.replace(PLAIN, scale=(1, 1), jitter=0, flip_prob=flip_prob)
    mirrored = []
    for rng in map(np.random.default_rng, range(200)):
        boxes = random_single(image, (50, 50), augmentation=fixed, rng=rng).boxes_xyxy
        mirrored.append(boxes[0, 0] > boxes[1, 0])
    assert abs(np.mean(mirrored) - expected) < 0.1


@pytest.mark.parametrize(("knob", "channel"), [("hue", 0), ("saturation", 1), ("value", 2)])
def test_each_colour_gain_changes_its_own_channel(knob, channel):
    image = np.full((8, 8, 3), (150, 100, 60), np.uint8)
    source = LabelledImage(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    fixed = dataclasses.replace(PLAIN, scale=(1, 1), jitter=0, **{knob: 0.5})
    result = random_single(source, (8, 8), augmentation=fixed, rng=np.random.default_rng(0))
    before, after = (
        cv2.cvtColor(x, cv2.COLOR_RGB2HSV)[0, 0].astype(int) for x in (image, result.image)
    )
    changed = np.abs(after - before)
    assert changed[channel] > 3
    assert np.delete(changed, channel).max() <= 2


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("scale", (2.0, 0.25)),
        ("scale", (0.0, 1.0)),
        ("mosaic_scale", (-1.0, 1.0)),
        ("mosaic_centre", (0.3, 1.0)),
        ("jitter", 1.0),
        ("flip_prob", 1.5),
        ("hue", -0.1),
        ("value", float("nan")),
    ],
)
def test_a_knob_out_of_range_is_named(knob, value):
    with pytest.raises(UserError, match=knob):
        Augmentation(**{knob: value})
