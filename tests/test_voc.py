"""VOC data as users have it: read as written, repaired and counted, or refused all at once."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.image import read_image
from data.voc import read_class_names, read_split, scan_split
from tests.factory import add_image, annotation_xml, coloured_boxes, write_split
from utils.errors import UserError

CAT = (220, 40, 40)
NAMES = ("cat", "dog")
HW = (40, 60)


def image(hw=HW):
    return np.full((*hw, 3), 90, np.uint8)


@pytest.fixture
def root(tmp_path):
    """Two images: "1" with a cat and a difficult dog, "2" without objects."""
    root = tmp_path / "VOC"
    boxes = [("cat", (2, 3, 20, 30)), ("dog", (30, 5, 50, 35), True)]
    add_image(root, "1", image(), boxes)
    add_image(root, "2", image(), [])
    write_split(root, "train", ["1", "2"])
    return root


def scan_boxes(root, *boxes):
    """One image with these cats: its boxes as a list, and the report."""
    add_image(root, "one", image(), [("cat", box) for box in boxes])
    write_split(root, "one", ["one"])
    samples, report = scan_split(f"{root}:one", NAMES)
    return samples[0].boxes_xyxy.tolist(), report


def write_xml(root, image_id, objects):
    path = root / "Annotations" / f"{image_id}.xml"
    path.write_text(f"<annotation>{objects}</annotation>", encoding="utf-8")
    return path


def refusal(*args, **options):
    with pytest.raises(UserError) as error:
        scan_split(*args, **options)
    return str(error.value)


def test_a_sample_has_the_shapes_types_and_order_of_its_contract(root):
    first, second = read_split(f"{root}:train", NAMES)
    assert first.image_path == str(root / "JPEGImages" / "1.png")
    assert first.image_id == "1"
    assert first.image_hw == HW
    assert first.class_ids.tolist() == [0, 1]
    assert first.boxes_xyxy.tolist() == [[2, 3, 20, 30], [30, 5, 50, 35]]
    assert first.difficult.tolist() == [False, True]
    for sample, n in ((first, 2), (second, 0)):
        assert sample.class_ids.shape == (n,)
        assert sample.class_ids.dtype == np.int64
        assert sample.boxes_xyxy.shape == (n, 4)
        assert sample.boxes_xyxy.dtype == np.float32
        assert sample.difficult.shape == (n,)
        assert sample.difficult.dtype == bool


def test_the_report_counts_images_backgrounds_boxes_and_difficult_ones(root):
    _, report = scan_split(f"{root}:train", NAMES)
    assert (report.images, report.backgrounds, report.difficult) == (2, 1, 1)
    assert report.boxes == {"cat": 1, "dog": 1}
    assert not report.faults
    text = str(report)
    assert text.startswith(f"{root}:train: 2 images (1 without objects), 2 boxes (1 difficult)")
    assert "cat 1, dog 1" in text


def test_a_class_without_boxes_is_shown_as_such(root):
    assert "bird 0" in str(scan_split(f"{root}:train", (*NAMES, "bird"))[1])


def test_difficult_objects_can_be_made_ordinary_ones(root):
    samples, report = scan_split(f"{root}:train", NAMES, include_difficult=True)
    assert not samples[0].difficult.any()
    assert report.difficult == 1


def test_splits_of_several_roots_are_joined_in_order(root, tmp_path):
    other = tmp_path / "other"
    add_image(other, "3", image(), [("dog", (1, 1, 9, 9))])
    write_split(other, "val", ["3"])
    samples, report = scan_split(f"{other}:val+{root}:train", NAMES)
    assert [sample.image_id for sample in samples] == ["3", "1", "2"]
    assert report.boxes == {"cat": 1, "dog": 2}


def test_an_id_that_two_roots_share_stays_unique(root, tmp_path):
    other = tmp_path / "other"
    add_image(other, "1", image(), [])
    write_split(other, "train", ["1"])
    samples = read_split(f"{root}:train+{other}:train", NAMES)
    assert [sample.image_id for sample in samples] == [f"{root}/1", "2", f"{other}/1"]


def test_an_id_listed_again_is_used_once_and_counted(root):
    write_split(root, "train", ["1", "2", "1"])
    write_split(root, "val", ["2"])
    samples, report = scan_split(f"{root}:train+{root}:val", NAMES)
    assert [sample.image_id for sample in samples] == ["1", "2"]
    assert report.duplicates == 2
    assert "used once: 2" in str(report)


def test_fractional_coordinates_are_kept_as_written(root):
    boxes, report = scan_boxes(root, (1.25, 2.5, 20.75, 30.125))
    assert boxes == [[1.25, 2.5, 20.75, 30.125]]
    assert (report.swapped, report.clipped, report.dropped_tiny) == (0, 0, 0)


def test_a_box_that_fills_the_image_is_left_alone(root):
    boxes, report = scan_boxes(root, (0, 0, 60, 40))
    assert boxes == [[0, 0, 60, 40]]
    assert report.clipped == 0


@pytest.mark.parametrize("box", [(20, 3, 2, 30), (2, 30, 20, 3), (20, 30, 2, 3)])
def test_corners_in_the_wrong_order_are_swapped_and_counted(root, box):
    boxes, report = scan_boxes(root, box, (1, 1, 9, 9))
    assert boxes == [[2, 3, 20, 30], [1, 1, 9, 9]]
    assert report.swapped == 1
    assert "1 swapped" in str(report)


def test_boxes_outside_the_image_are_clipped_and_counted(root):
    boxes, report = scan_boxes(root, (-5, -1, 10, 10), (50, 30, 61, 41), (1, 1, 9, 9))
    assert boxes == [[0, 0, 10, 10], [50, 30, 60, 40], [1, 1, 9, 9]]
    assert report.clipped == 2
    assert "2 clipped" in str(report)


def test_boxes_below_one_pixel_are_dropped_and_counted(root):
    tiny = [(5, 5, 5, 20), (5, 5, 20, 5.9), (0, 0, 0, 0), (70, 5, 90, 20), (59.5, 0, 99, 9)]
    boxes, report = scan_boxes(root, *tiny, (5, 5, 6, 6))
    assert boxes == [[5, 5, 6, 6]]
    assert report.dropped_tiny == 5
    assert "5 dropped" in str(report)
    assert report.boxes["cat"] == 1


def test_an_image_whose_boxes_are_all_dropped_is_a_background(root):
    boxes, report = scan_boxes(root, (5, 5, 5, 5))
    assert boxes == []
    assert report.backgrounds == 1


@pytest.mark.parametrize("suffix", [".jpg", ".JPG", ".jpeg", ".PNG", ".bmp", ".webp", ".tiff"])
def test_an_image_is_found_by_its_id_whatever_its_suffix(root, suffix):
    image_id = "Bild ü 猫.v2 1"
    Image.fromarray(image()).save(root / "JPEGImages" / f"{image_id}{suffix}")
    write_xml(root, image_id, "<filename>elsewhere.gif</filename>")
    write_split(root, "train", [image_id])
    sample = read_split(f"{root}:train", NAMES)[0]
    assert Path(sample.image_path).name == f"{image_id}{suffix}"
    assert sample.image_id == image_id


def test_an_image_is_found_by_the_file_name_in_its_annotation(root):
    (root / "JPEGImages" / "1.png").rename(root / "JPEGImages" / "photo.png")
    write_xml(root, "1", "<filename>C:\\images\\photo.png</filename>")
    assert Path(read_split(f"{root}:train", NAMES)[0].image_path).name == "photo.png"


def test_of_two_images_with_one_id_the_annotation_chooses(root):
    Image.fromarray(image((20, 30))).save(root / "JPEGImages" / "1.bmp")
    assert read_split(f"{root}:train", NAMES)[0].image_hw == HW
    write_xml(root, "1", "<filename>1.bmp</filename>")
    assert read_split(f"{root}:train", NAMES)[0].image_hw == (20, 30)


@pytest.mark.parametrize("size", ["", "<size><width>a</width></size>"])
def test_the_size_of_the_real_image_counts(root, size):
    wrong = "<size><width>7</width><height>7</height></size>"
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>55</xmax><ymax>39</ymax></bndbox>"
    write_xml(root, "1", f"{size or wrong}<object><name>cat</name>{box}</object>")
    samples, report = scan_split(f"{root}:train", NAMES)
    assert samples[0].image_hw == HW
    assert samples[0].boxes_xyxy.tolist() == [[1, 1, 55, 39]]
    assert report.clipped == 0


def add_turned_image(root, stored, orientation, boxes, size_hw):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(root / "JPEGImages" / "1.png", exif=exif)
    xml = annotation_xml("1.png", size_hw, boxes)
    (root / "Annotations" / "1.xml").write_text(xml, encoding="utf-8")


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_on_the_stored_pixels_are_turned_with_the_image(root, orientation):
    stored = coloured_boxes(HW, [(4, 6, 30, 11)], [CAT])
    add_turned_image(root, stored, orientation, [("cat", (4, 6, 30, 11))], HW)
    samples, report = scan_split(f"{root}:train", NAMES)
    assert samples[0].image_hw == (60, 40)
    ys, xs = np.nonzero(read_image(samples[0].image_path)[..., 0] == CAT[0])
    expected = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    assert samples[0].boxes_xyxy.tolist() == [expected]
    assert report.rotated == 1
    assert "by EXIF orientation: 1" in str(report)


@pytest.mark.parametrize(("orientation", "size_hw"), [(6, (60, 40)), (6, (1, 1)), (3, HW)])
def test_boxes_on_the_upright_image_stay(root, orientation, size_hw):
    add_turned_image(root, image(), orientation, [("cat", (3, 4, 20, 30))], size_hw)
    samples, report = scan_split(f"{root}:train", NAMES)
    assert samples[0].boxes_xyxy.tolist() == [[3, 4, 20, 30]]
    assert report.rotated == 0


def spoil(root):
    """Six images with six faults; the paths that a message has to name."""
    ids = ["no_xml", "no_image", "broken_xml", "half", "text", "no_box"]
    for image_id in ids:
        add_image(root, image_id, image(), [], suffix=".jpg")
    images, annotations = root / "JPEGImages", root / "Annotations"
    (annotations / "no_xml.xml").unlink()
    (images / "no_image.jpg").unlink()
    (annotations / "broken_xml.xml").write_text("<annotation><object>")
    half = images / "half.jpg"
    half.write_bytes(half.read_bytes()[:-300])
    (images / "text.jpg").write_text("not an image")
    write_xml(root, "no_box", "<object><name>cat</name></object>")
    write_split(root, "train", ["1", *ids, "2"])
    bad_xml = [annotations / f"{name}.xml" for name in ("no_xml", "broken_xml", "no_box")]
    return [str(path) for path in (*bad_xml, images / "no_image", half, images / "text.jpg")]


def test_all_broken_files_are_reported_at_once_by_path(root):
    paths = spoil(root)
    message = refusal(f"{root}:train", NAMES)
    assert [path for path in paths if path not in message] == []
    assert "6 files cannot be used" in message
    assert "--skip_bad" in message


def test_skip_bad_goes_on_without_them_counts_and_names_them(root):
    paths = spoil(root)
    samples, report = scan_split(f"{root}:train", NAMES, skip_bad=True)
    assert [sample.image_id for sample in samples] == ["1", "2"]
    assert report.images == 2
    assert len(report.faults) == 6
    assert [path for path in paths if path not in str(report)] == []
    assert "skipped: 6 files" in str(report)


def test_broken_annotation_and_broken_image_of_one_id_are_both_named(root):
    (root / "JPEGImages" / "1.png").write_bytes(b"")
    (root / "Annotations" / "1.xml").write_text("")
    message = refusal(f"{root}:train", NAMES)
    assert "1.png: an empty file" in message
    assert "1.xml" in message


def test_of_many_faults_twenty_are_shown_and_the_rest_counted(root):
    write_split(root, "train", [f"absent_{i:03}" for i in range(50)])
    message = refusal(f"{root}:train", NAMES)
    assert message.count("absent_") == 20
    assert "and 80 more" in message


def test_nothing_left_is_an_error_even_with_skip_bad(root):
    write_split(root, "train", ["absent"])
    assert "nothing is left" in refusal(f"{root}:train", NAMES, skip_bad=True)


@pytest.mark.parametrize("skip_bad", [False, True])
def test_unknown_class_names_are_refused_with_both_files_and_both_counts(root, skip_bad):
    (root / "classes.txt").write_text("cat\ndog\n")
    names = ("bird", "cow", "dog")
    message = refusal(f"{root}:train", names, classes_path="my/list.txt", skip_bad=skip_bad)
    assert f"{root}:train: the annotations use 2 class names, my/list.txt has 3" in message
    assert "'cat' in 1 annotations" in message
    assert "'dog'" not in message
    assert f"--classes_path that belongs to this data (perhaps {root / 'classes.txt'})" in message


def test_unknown_class_names_and_broken_files_come_in_one_message(root):
    write_split(root, "train", ["1", "absent"])
    message = refusal(f"{root}:train", ("dog",))
    assert "'cat'" in message
    assert "absent" in message


def test_class_names_survive_blank_lines_bom_crlf_and_spaces(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeffcat\r\n\r\n  traffic light \r\nKüche".encode())
    assert read_class_names(path) == ("cat", "traffic light", "Küche")


@pytest.mark.parametrize(
    ("content", "what"), [(b" \n", "no class names"), (b"a\nb\na\n", "'a'"), (b"\xff\xfe", "UTF-8")]
)
def test_a_useless_classes_file_is_refused_by_path(tmp_path, content, what):
    path = tmp_path / "classes.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=what) as error:
        read_class_names(path)
    assert str(path) in str(error.value)


def test_a_missing_classes_file_is_refused_by_path(tmp_path):
    with pytest.raises(UserError, match=r"absent\.txt"):
        read_class_names(tmp_path / "absent.txt")
