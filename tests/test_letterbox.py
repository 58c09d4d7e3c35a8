import numpy as np
import pytest
import torch
from PIL import Image

from data.letterbox import (
    GREY,
    image_to_letterbox,
    letterbox,
    letterbox_geometry,
    letterbox_to_image,
    resize,
)
from tests.factory import coloured_boxes

SIZES = [
    ((480, 640), (416, 416)),
    ((375, 500), (320, 608)),
    ((30, 20), (96, 64)),
    ((7, 3), (32, 32)),
]


@pytest.mark.parametrize(
    ("image_hw", "input_hw", "expected"),
    [
        ((480, 640), (416, 416), (52, 0, 312, 416)),
        ((640, 480), (416, 416), (0, 52, 416, 312)),
        ((100, 100), (320, 608), (0, 144, 320, 320)),
        ((1, 1000), (32, 32), (15, 0, 1, 32)),
        ((1, 1), (64, 32), (16, 0, 32, 32)),
    ],
)
def test_an_image_lands_centred_with_its_aspect_kept(image_hw, input_hw, expected):
    assert letterbox_geometry(image_hw, input_hw) == expected


@pytest.mark.parametrize("sizes", [((0, 5), (32, 32)), ((5, 5), (32, 0))])
def test_a_size_that_is_not_positive_is_refused(sizes):
    with pytest.raises(ValueError, match="positive"):
        letterbox_geometry(*sizes)


@pytest.mark.parametrize(("image_hw", "input_hw"), SIZES)
def test_padding_is_grey_and_the_image_is_where_the_geometry_says(image_hw, input_hw):
    top, left, height, width = letterbox_geometry(image_hw, input_hw)
    canvas = letterbox(np.full((*image_hw, 3), 200, np.uint8), input_hw)
    inside = np.zeros(input_hw, bool)
    inside[top : top + height, left : left + width] = True
    assert canvas.shape == (*input_hw, 3)
    assert (canvas[inside] == 200).all()
    assert (canvas[~inside] == GREY).all()


@pytest.mark.parametrize(("image_hw", "input_hw"), SIZES)
def test_boxes_come_back_from_the_letterbox(image_hw, input_hw):
    height, width = image_hw
    boxes = torch.tensor([[0, 0, width, height], [width / 4, 0.5, width / 2, height - 0.5]])
    there = image_to_letterbox(boxes, image_hw, input_hw)
    torch.testing.assert_close(letterbox_to_image(there, input_hw, image_hw), boxes)


def test_boxes_beyond_the_image_are_clipped_on_the_way_back():
    boxes = torch.tensor([[-20.0, -20.0, 500.0, 500.0]])
    assert letterbox_to_image(boxes, (416, 416), (480, 640)).tolist() == [[0, 0, 640, 480]]


def test_no_boxes_stay_no_boxes():
    none = torch.zeros(0, 4)
    assert image_to_letterbox(none, (5, 7), (32, 32)).shape == (0, 4)
    assert letterbox_to_image(none, (32, 32), (5, 7)).shape == (0, 4)


@pytest.mark.parametrize("image_hw", [(480, 640), (90, 60)])
def test_a_drawn_box_is_found_where_its_coordinates_went(image_hw):
    box = [image_hw[1] // 4, image_hw[0] // 5, image_hw[1] // 2, image_hw[0] // 2]
    canvas = letterbox(coloured_boxes(image_hw, [box], [(255, 255, 255)]), (224, 320))
    rows, columns = np.nonzero(canvas[..., 0] > 191)
    found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    expected = image_to_letterbox(torch.tensor([box]).float(), image_hw, (224, 320))[0]
    assert np.abs(expected.numpy() - found).max() <= 1


@pytest.mark.parametrize(
    "size_hw", [(20, 31), (90, 120), (160, 40), (1, 1), (7, 300)], ids=lambda hw: f"{hw[0]}x{hw[1]}"
)
def test_resize_is_pil_bicubic_shrinking_and_enlarging(size_hw):
    image = np.random.default_rng(0).integers(0, 256, (80, 60, 3), np.uint8)
    reference = Image.fromarray(image).resize(size_hw[::-1], Image.Resampling.BICUBIC)
    difference = np.abs(resize(image, size_hw).astype(int) - np.asarray(reference))
    assert difference.mean() < 0.3
    assert difference.max() <= 3


def test_resize_takes_any_view_of_an_image():
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    read_only = image.copy()
    read_only.flags.writeable = False
    for view in (read_only, image[::-1, :, ::-1], image[5:30, 7:50], image[:, ::2]):
        assert (resize(view, (20, 20)) == resize(view.copy(), (20, 20))).all()


def test_an_image_of_the_right_size_is_not_touched():
    image = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
    assert (letterbox(image, (32, 64)) == image).all()
