import numpy as np
import pytest
from PIL import ImageFont

from engine.predictor import Detections
from utils.draw import (
    GREY,
    candidate_places,
    class_colour,
    draw_boxes,
    draw_detections,
    fitting_font,
    font_for,
    image_grid,
    label,
    label_size,
    line_and_font_size,
    missing_letters,
    overlap,
    place_labels,
    text_colour,
)

NAMES = ("person", "traffic light", "Möhre", "猫")


def plain(height, width, colour=128):
    return np.full((height, width, 3), colour, np.uint8)


def has_colour(image, colour):
    return (image == np.array(colour)).all(axis=-1).any()


@pytest.mark.parametrize("size_hw", [(1, 1), (5, 300), (64, 64), (1080, 1920)])
def test_without_boxes_the_image_is_unchanged_and_a_copy(size_hw):
    image = plain(*size_hw)
    drawn = draw_boxes(image, np.zeros((0, 4)), np.zeros(0, int), NAMES, np.zeros(0))
    assert np.array_equal(drawn, image)
    assert not np.shares_memory(drawn, image)


@pytest.mark.parametrize("size_hw", [(1, 1), (3, 200), (200, 3), (40, 40)])
@pytest.mark.parametrize("box", [(0, 0, 0, 0), (-50, -50, 500, 500), (900, 900, 950, 950)])
def test_tiny_images_and_boxes_at_or_beyond_the_border_are_drawn(size_hw, box):
    for class_id in (-1, 0, 1, 2, 3):
        drawn = draw_boxes(plain(*size_hw), [box], [class_id], NAMES, [0.5])
        assert drawn.shape == (*size_hw, 3)
        assert drawn.dtype == np.uint8
        assert not np.array_equal(drawn, plain(*size_hw))


def test_the_input_is_left_alone_even_when_it_cannot_be_written():
    image = plain(60, 60)[:, ::-1]
    image.flags.writeable = False
    draw_boxes(image, [(5, 5, 50, 50)], [0], NAMES)
    assert np.array_equal(image, plain(60, 60))


def test_the_line_lies_on_the_box_edge_in_the_class_colour():
    drawn = draw_boxes(plain(200, 200), [(50, 60, 150, 160)], [0], NAMES)
    middle = drawn[110, :, :]
    is_line = (middle == np.array(class_colour(0))).all(axis=-1)
    assert np.flatnonzero(is_line).tolist() == [50, 51, 148, 149]


@pytest.mark.parametrize("class_id", range(20))
def test_a_box_shows_on_a_ground_of_its_own_colour(class_id):
    ground = np.empty((120, 120, 3), np.uint8)
    ground[:] = class_colour(class_id)
    names = [f"c{index}" for index in range(20)]
    drawn = draw_boxes(ground, [(30, 30, 90, 90)], [class_id], names)
    assert abs(drawn[60].astype(int) - ground[60]).max() > 100


def test_colours_are_stable_and_the_first_eighty_are_distinct():
    assert class_colour(0) == (255, 53, 25)
    colours = np.array([class_colour(index) for index in range(80)], int)
    distance = abs(colours[:, None] - colours[None]).sum(-1) + 999 * np.eye(80, dtype=int)
    assert distance.min() > 10
    neighbours = abs(colours[1:] - colours[:-1]).sum(-1)
    assert neighbours.min() > 100


@pytest.mark.parametrize(
    ("background", "expected"),
    [((255, 255, 0), 0), ((0, 0, 0), 255), ((120, 120, 120), 0), ((110, 110, 110), 255)],
)
def test_label_text_is_black_or_white_by_contrast(background, expected):
    assert text_colour(background) == (expected,) * 3


def test_lines_and_letters_grow_with_the_image():
    assert line_and_font_size(416, 416) == (2, 12)
    assert line_and_font_size(1080, 1920) == (4, 28)
    assert line_and_font_size(2160, 3840) == (9, 55)


def test_labels_give_name_and_score():
    font = font_for("person", 12)
    assert label(0, NAMES, 0.876, font) == "person 0.88"
    assert label(0, NAMES, None, font) == "person"
    assert label(-1, NAMES, None, font) == "difficult"


def test_an_ignore_region_is_grey_and_dashed():
    drawn = draw_boxes(plain(200, 200, 255), [(20, 40, 180, 180)], [-1], NAMES)
    edge = drawn[100:170, 20]
    assert set(map(tuple, edge.tolist())) == {(0, 0, 0), GREY}


def test_the_highest_score_lies_on_top():
    box = (20, 40, 100, 100)
    for scores in ((0.9, 0.3), (0.3, 0.9)):
        drawn = draw_boxes(plain(120, 120), [box, box], [0, 1], NAMES, scores)
        assert tuple(drawn[70, 20]) == class_colour(int(np.argmax(scores)))


def test_labels_stay_inside_the_image():
    boxes = [(-30, -30, 20, 20), (180, 90, 260, 130), (-5, 80, 10, 200), (190, -10, 300, 5)]
    for box in boxes:
        places = candidate_places(box, (70, 15), (200, 100))
        assert (places[:, :2] >= 0).all()
        assert (places[:, 2:] <= (200, 100)).all()
        assert (places[:, 2:] - places[:, :2] == (70, 15)).all()


def test_a_label_lies_above_its_box_where_there_is_room():
    font = font_for("", 12)
    (place,) = place_labels([(50, 60, 150, 160)], ["person"], font, (300, 300))
    assert place[[0, 3]].tolist() == [50, 60]


def test_labels_of_one_spot_do_not_cover_each_other():
    boxes = [(100 + step, 100, 160 + step, 160) for step in (0, 2, 4, 6)]
    places = place_labels(boxes, ["person 0.90"] * 4, font_for("", 12), (300, 300))
    area = (places[:, 2:] - places[:, :2]).prod(axis=1)
    assert np.array_equal(overlap(places, places), area)  # each covers itself alone


@pytest.mark.parametrize(("width", "size"), [(400, 12), (80, None), (5, 8)])
def test_a_label_wider_than_the_image_is_set_smaller_but_legible(width, size):
    font = fitting_font(font_for("", 12), ["x 0.50", "traffic light 0.50"], width)
    assert font.size == size or label_size("traffic light 0.50", font)[0] <= width < 85


def test_drawing_uses_the_size_that_fits():
    drawn = draw_boxes(plain(60, 85), [(0, 40, 2, 42)], [1], NAMES[:2], [0.5])
    is_ground = (drawn == np.array(class_colour(1))).all(axis=-1)
    assert is_ground.any(axis=0)[0]
    assert not is_ground.any(axis=0)[-1]  # 90 px at size 12, 82 at size 11


def test_a_font_is_found_for_any_name_and_what_it_lacks_becomes_the_class_number():
    embedded = ImageFont.load_default(12)
    assert not missing_letters(embedded, "person_2-b 0.59")
    assert missing_letters(embedded, "猫\uffff") == {"猫", "\uffff"}
    assert label(3, NAMES, 0.5, embedded) == "class 3 0.50"
    assert isinstance(font_for("猫", 12), ImageFont.FreeTypeFont)


def test_detections_are_drawn_like_their_boxes():
    boxes, scores, ids = [(10, 20, 60, 70.0)], [0.7], [1]
    detections = Detections(np.float32(boxes), np.float32(scores), np.int64(ids), NAMES)
    expected = draw_boxes(plain(90, 90), boxes, ids, NAMES, scores)
    assert np.array_equal(draw_detections(plain(90, 90), detections), expected)


def test_a_grid_holds_every_image_in_reading_order():
    images = [plain(20 + index, 30, 10 * index) for index in range(5)]
    grid = image_grid(images, columns=2)
    assert grid.shape == (4 + 3 * 28, 4 + 2 * 34, 3)
    for index, image in enumerate(images):
        top, left = 4 + index // 2 * 28, 4 + index % 2 * 34
        assert np.array_equal(grid[top : top + image.shape[0], left : left + 30], image)
    assert has_colour(grid[60:, 40:], GREY)


def test_a_grid_of_fewer_images_than_columns_is_as_wide_as_they_are():
    assert image_grid([plain(10, 10)], columns=4).shape == (18, 18, 3)


@pytest.mark.parametrize(("images", "columns"), [([], 4), ([plain(5, 5)], 0)])
def test_a_grid_of_nothing_is_refused(images, columns):
    with pytest.raises(ValueError, match="need images"):
        image_grid(images, columns)
