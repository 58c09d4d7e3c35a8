"""VOC trees: split files read, made and refused; roots; specifications."""

from pathlib import Path

import numpy as np
import pytest

from data.voc import read_split, scan_split
from data.voc_tree import parse_spec
from tests.factory import add_image, write_split
from utils.errors import UserError

NAMES = ("cat", "dog")


def image(hw=(4, 4)):
    return np.full((*hw, 3), 90, np.uint8)


@pytest.fixture
def root(tmp_path):
    """Two images in a split "train"."""
    root = tmp_path / "VOC"
    add_image(root, "1", image(), [("cat", (0, 0, 3, 3))])
    add_image(root, "2", image(), [])
    write_split(root, "train", ["1", "2"])
    return root


def refusal(*args, **options):
    with pytest.raises(UserError) as error:
        scan_split(*args, **options)
    return str(error.value)


def test_columns_and_blank_lines_of_split_files_are_understood(root):
    text = "\ufeff1  1\r\n\r\n 2 -1 \r\n"
    (root / "ImageSets" / "Main" / "cat_train.txt").write_text(text, encoding="utf-8", newline="")
    assert [sample.image_id for sample in read_split(f"{root}:cat_train", NAMES)] == ["1"]
    write_split(root, "train", ["1 0", "2"])
    assert [sample.image_id for sample in read_split(f"{root}:train", NAMES)] == ["1", "2"]


@pytest.mark.parametrize("lines", [[], ["", " "], ["1 -1"]])
def test_an_empty_split_is_an_error_that_names_its_file(root, lines):
    write_split(root, "train", lines)
    message = refusal(f"{root}:train", NAMES)
    assert str(root / "ImageSets" / "Main" / "train.txt") in message


def test_an_unknown_split_is_an_error_that_lists_those_present(root):
    write_split(root, "mine", ["1"])
    message = refusal(f"{root}:val", NAMES)
    assert "'val'" in message
    assert "Present: train, mine" in message
    assert not (root / "ImageSets" / "Main" / "val.txt").exists()


def unsplit_tree(root, count):
    for i in range(count):
        add_image(root, f"{i:03}", image(), [])
    return root


def split_files(folder):
    return {path.stem: path.read_text().split() for path in sorted(folder.glob("*.txt"))}


def test_splits_are_made_once_seeded_eight_to_one_to_one_and_said(tmp_path):
    root = unsplit_tree(tmp_path / "a", 20)
    samples, report = scan_split(f"{root}:train", NAMES)
    made = split_files(root / "ImageSets" / "Main")
    assert {name: len(ids) for name, ids in made.items()} == {
        "train": 16,
        "val": 2,
        "trainval": 18,
        "test": 2,
    }
    assert sorted(made["train"] + made["val"]) == made["trainval"]
    assert sorted(made["trainval"] + made["test"]) == [f"{i:03}" for i in range(20)]
    assert made["val"] + made["test"] != [f"{i:03}" for i in range(4)]
    assert [sample.image_id for sample in samples] == made["train"]
    assert "there were no splits: made train 16" in str(report)
    assert sorted(path.suffix for path in (root / "ImageSets" / "Main").iterdir()) == [".txt"] * 4

    again = unsplit_tree(tmp_path / "b", 20)
    read_split(f"{again}:test", NAMES)
    assert split_files(again / "ImageSets" / "Main") == made

    unsplit_tree(root, 25)
    assert "there were no splits" not in str(scan_split(f"{root}:val", NAMES)[1])
    assert split_files(root / "ImageSets" / "Main") == made


@pytest.mark.parametrize(("count", "splits"), [(1, 1), (2, 2), (3, 3), (5, 3)])
def test_a_handful_of_images_is_split_as_far_as_it_goes(tmp_path, count, splits):
    root = unsplit_tree(tmp_path, count)
    assert read_split(f"{root}:train", NAMES)
    made = split_files(root / "ImageSets" / "Main")
    made.pop("trainval")
    assert sum(len(ids) for ids in made.values()) == count
    assert sum(len(ids) > 0 for ids in made.values()) == splits


def test_a_split_of_no_images_cannot_be_made(tmp_path):
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "JPEGImages").mkdir()
    assert "cannot be made from 0 images" in refusal(f"{tmp_path}:train", NAMES)


def test_a_read_only_tree_is_split_in_the_run_folder(tmp_path):
    root, run = unsplit_tree(tmp_path / "VOC", 10), tmp_path / "run"
    make_read_only(root)
    samples, report = scan_split(f"{root}:train", NAMES, split_dir=run)
    assert len(samples) == 8
    assert str(run) in str(report)
    val, report = scan_split(f"{root}:val", NAMES, split_dir=run)
    assert len(val) == 1
    assert not report.notes
    assert "cannot be made" in refusal(f"{root}:train", NAMES)


def test_two_read_only_trees_of_one_name_keep_their_own_splits(tmp_path):
    roots = [
        unsplit_tree(tmp_path / place / "VOC", count) for place, count in (("a", 3), ("b", 20))
    ]
    for root in roots:
        make_read_only(root)
    sizes = [len(read(root, tmp_path / "run")) for root in roots for _ in range(2)]
    assert sizes == [1, 1, 16, 16]


def read(root, split_dir):
    return scan_split(f"{root}:train", NAMES, split_dir=split_dir)[0]


def make_read_only(root):
    # A file where the folder should be stops even root, whom permissions do not.
    (root / "ImageSets" / "Main").rmdir()
    (root / "ImageSets").rmdir()
    (root / "ImageSets").write_text("")


def test_unpaired_and_stray_files_are_reported_before_a_split_is_made(tmp_path):
    root = unsplit_tree(tmp_path / "VOC", 10)
    (root / "Annotations" / "003.xml").unlink()
    (root / "JPEGImages" / "004.png").unlink()
    (root / "JPEGImages" / "notes.txt").write_text("")
    message = refusal(f"{root}:train", NAMES)
    assert f"{root / 'JPEGImages' / '003.png'}: no annotation" in message
    assert f"{root / 'Annotations' / '004.xml'}: no image" in message
    assert str(root / "JPEGImages" / "notes.txt") in message
    assert not split_files(root / "ImageSets" / "Main")

    samples, report = scan_split(f"{root}:train", NAMES, skip_bad=True)
    assert len(report.faults) == 3
    assert len(samples) == 6
    made = split_files(root / "ImageSets" / "Main")
    assert not {"003", "004"} & set(made["trainval"] + made["test"])


def test_images_named_by_their_annotation_are_paired_when_a_split_is_made(tmp_path):
    root = unsplit_tree(tmp_path / "VOC", 5)
    (root / "JPEGImages" / "002.png").rename(root / "JPEGImages" / "photo.png")
    xml = "<annotation><filename>photo.png</filename></annotation>"
    (root / "Annotations" / "002.xml").write_text(xml)
    _, report = scan_split(f"{root}:trainval+{root}:test", NAMES)
    assert report.images == 5


def test_system_files_and_strays_beside_a_split_are_ignored_and_said(root):
    for name in (".DS_Store", "Thumbs.db", "._1.png", "readme.md", "spare.png"):
        (root / "JPEGImages" / name).write_bytes(b"")
    samples, report = scan_split(f"{root}:train", NAMES)
    assert len(samples) == 2
    text = str(report)
    assert "3 system files ignored" in text
    assert str(root / "JPEGImages" / "readme.md") in text
    assert f"1 images without annotation: {root / 'JPEGImages' / 'spare.png'}" in text


def test_a_missing_root_names_both_ways_out(tmp_path):
    message = refusal(f"{tmp_path / 'VOC2007'}:train", NAMES)
    assert f"put VOC2007 at {tmp_path / 'VOC2007'} (see VOCdevkit/README.md)" in message
    assert "python -m tools.make_sample_voc --out VOCdevkit/Sample" in message


def test_a_root_one_folder_too_high_is_noticed(root):
    assert f"Did you mean {root}?" in refusal(f"{root.parent}:train", NAMES)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("a:train", [("a", "train")]),
        ("a:train+b c/ü:val", [("a", "train"), ("b c/ü", "val")]),
        ("a+b/VOC:train", [("a+b/VOC", "train")]),
        ("a+b/VOC:train + c+d:my+e:test", [("a+b/VOC", "train"), ("c+d", "my"), ("e", "test")]),
        (r"C:\data\VOC:train+D:/x+y:val", [(r"C:\data\VOC", "train"), ("D:/x+y", "val")]),
    ],
)
def test_specifications_are_split_at_plus_signs_and_last_colons(spec, parts):
    assert parse_spec(spec) == [(Path(root), split) for root, split in parts]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert parse_spec("a:train+~/VOC:val")[1] == (tmp_path / "VOC", "val")


@pytest.mark.parametrize("spec", ["", "VOC2007", "a:", ":train", "a:train+", "a:b+c", r"C:\VOC"])
def test_what_is_no_specification_is_refused_with_an_example(spec):
    with pytest.raises(UserError, match="write ROOT:SPLIT"):
        parse_spec(spec)
