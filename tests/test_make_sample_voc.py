"""The drawn sample: deterministic, whole or absent, and with boxes where the pixels are."""

import dataclasses
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from itertools import chain
from pathlib import Path

import cv2
import numpy as np
import pytest

from tools.make_sample_voc import (
    CLASSES,
    MARKER,
    SCENES,
    SPLITS,
    class_pool,
    make_sample,
    plan_objects,
    split_indices,
)
from tools.sample_objects import CLUTTER
from tools.sample_scenes import (
    Scene,
    _place_in_landscape,
    clutter_scene,
    compose,
    landscape_scene,
)
from tools.sample_shapes import Sketch, Sprite
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
COMMAND = (sys.executable, "-m", "tools.make_sample_voc")


def draw(out: Path, images: int = 5, seed: int = 0, difficulty: str = "easy"):
    return make_sample(out, images=images, seed=seed, difficulty=difficulty, progress=False)


def tree_bytes(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def read_ids(root: Path, split: str) -> list[str]:
    return (root / "ImageSets" / "Main" / f"{split}.txt").read_text().split()


def box_of(mask: np.ndarray) -> np.ndarray:
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def planned_scenes(difficulty: str, images: int) -> list[Scene]:
    rng = np.random.default_rng(7)
    plan = plan_objects({"train": list(range(images))}, difficulty, rng)
    return [SCENES[difficulty](plan[index], np.random.default_rng((7, index))) for index in plan]


@pytest.fixture(scope="module")
def hard_scenes() -> list[Scene]:
    return planned_scenes("hard", 50)


@pytest.fixture(scope="module")
def easy_scenes() -> list[Scene]:
    return planned_scenes("easy", 15)


@pytest.mark.parametrize("difficulty", ["easy", "hard"])
def test_a_seed_gives_the_same_bytes_in_any_folder_and_another_seed_others(tmp_path, difficulty):
    for name, seed in (("first", 3), ("second", 3), ("other", 4)):
        draw(tmp_path / name, seed=seed, difficulty=difficulty)
    first, second, other = (tree_bytes(tmp_path / name) for name in ("first", "second", "other"))
    assert first == second
    assert first["JPEGImages/000000.jpg"] != other["JPEGImages/000000.jpg"]


@pytest.mark.parametrize(
    ("images", "sizes"), [(5, (3, 1, 1)), (23, (14, 4, 5)), (300, (180, 60, 60))]
)
def test_splits_are_60_20_20_and_share_no_image(images, sizes):
    splits = split_indices(images, np.random.default_rng(0))
    assert tuple(len(splits[name]) for name in SPLITS) == sizes
    assert sorted(chain(*splits.values())) == list(range(images))


def test_the_tree_is_complete_voc(tmp_path):
    drawn = draw(tmp_path / "a b" / "Sample", images=6)
    root = tmp_path / "a b" / "Sample"
    ids = sorted(path.stem for path in (root / "JPEGImages").glob("*.jpg"))
    assert len(ids) == 6
    assert ids == sorted(path.stem for path in (root / "Annotations").glob("*.xml"))
    assert ids == sorted(chain(*(read_ids(root, name) for name in SPLITS)))
    assert read_ids(root, "trainval") == sorted(read_ids(root, "train") + read_ids(root, "val"))
    names = (root / "classes.txt").read_text().split()
    assert tuple(names) == CLASSES["easy"]
    found = []
    for image_id in ids:
        found += check_annotation(root, image_id)
    assert {name: found.count(name) for name in names} == drawn


def check_annotation(root: Path, image_id: str) -> list[str]:
    """Checks one annotation against its image; returns the names of its objects."""
    annotation = ElementTree.parse(root / "Annotations" / f"{image_id}.xml").getroot()
    image = cv2.imread(str(root / "JPEGImages" / annotation.findtext("filename")))
    height, width, depth = (
        int(annotation.findtext(f"size/{k}")) for k in ("height", "width", "depth")
    )
    assert image.shape == (height, width, depth)
    for item in annotation.iter("object"):
        x1, y1, x2, y2 = (
            int(item.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax")
        )
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
        assert {item.findtext("truncated"), item.findtext("difficult")} <= {"0", "1"}
        assert item.findtext("pose")
    return [item.findtext("name") for item in annotation.iter("object")]


def test_easy_boxes_are_where_the_image_changes_when_the_object_is_left_out(easy_scenes):
    for scene in easy_scenes:
        whole = compose(scene.background, scene.placements)
        for index, item in enumerate(scene.objects()):
            others = [*scene.placements[:index], *scene.placements[index + 1 :]]
            change = np.abs(whole - compose(scene.background, others)).max(axis=2)
            assert np.abs(box_of(change > 25) - item.box_xyxy).max() <= 2


def test_hard_boxes_hold_all_that_shows_of_an_object_and_no_more(hard_scenes):
    """Black against white paint on one object: each pixel changes by what it shows of it."""
    for scene in hard_scenes[:20]:
        real = [index for index, placement in enumerate(scene.placements) if placement.name]
        for index, item in zip(real, scene.objects(), strict=True):
            black, white = (repainted(scene, index, level) for level in (0, 255))
            shown = (white - black)[..., 0] / 255
            inner, outer, box = box_of(shown > 0.75), box_of(shown > 0.1), np.array(item.box_xyxy)
            assert (box[:2] <= inner[:2]).all()
            assert (box[2:] >= inner[2:]).all()
            assert (box[:2] >= outer[:2]).all()
            assert (box[2:] <= outer[2:]).all()


def repainted(scene: Scene, index: int, level: int) -> np.ndarray:
    placements = list(scene.placements)
    alpha = placements[index].sprite.alpha
    paint = Sprite(np.repeat(alpha[..., None], 3, axis=2) * level, alpha)
    placements[index] = dataclasses.replace(placements[index], sprite=paint)
    return compose(scene.background, placements)


def test_easy_objects_are_whole_apart_and_not_tiny(easy_scenes):
    for scene in easy_scenes:
        sides = max(scene.owner.shape)
        assert 1 <= len(scene.objects()) <= 6
        for index, item in enumerate(scene.objects()):
            x1, y1, x2, y2 = item.box_xyxy
            assert 0.07 * sides < max(x2 - x1, y2 - y1) < 0.5 * sides
            assert not item.truncated
            assert not item.difficult
            assert scene.shown(index) == 1


def test_hard_classes_are_50_to_1_and_each_is_in_every_split():
    rng = np.random.default_rng(0)
    splits = split_indices(300, rng)
    plan = plan_objects(splits, "hard", rng)
    planned = list(chain(*plan.values()))
    counts = [planned.count(name) for name in CLASSES["hard"]]
    assert counts == sorted(counts, reverse=True)
    assert 35 < counts[0] / counts[-1] < 70
    for indices in splits.values():
        assert {name for index in indices for name in plan[index]} == set(CLASSES["hard"])
        assert sum(not plan[index] for index in indices) == round(0.1 * len(indices))


@pytest.mark.parametrize("total", [0, 1, 6, 7, 50, 1000])
def test_a_pool_has_as_many_objects_as_asked_and_rare_classes_while_there_is_room(total):
    for difficulty, names in CLASSES.items():
        pool = class_pool(total, difficulty)
        assert len(pool) == total
        assert len(set(pool)) == min(total, len(names))


def test_hard_images_hold_what_makes_them_hard(hard_scenes):
    objects = [(scene, item) for scene in hard_scenes for item in scene.objects()]
    boxes = np.array([item.box_xyxy for _, item in objects])
    sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1) / [max(s.owner.shape) for s, _ in objects]
    assert sides.min() < 0.03
    assert sides.max() > 0.35
    assert 0.02 < np.mean([item.difficult for _, item in objects]) < 0.09
    assert 0.1 < np.mean([item.truncated for _, item in objects]) < 0.4
    assert any(scene.shown(i) < 0.9 for scene in hard_scenes for i in range(len(scene.placements)))
    assert sum(not scene.objects() for scene in hard_scenes) == 5


def test_an_object_is_truncated_where_its_sprite_leaves_the_image(hard_scenes):
    for scene in hard_scenes:
        real = [placement for placement in scene.placements if placement.name]
        for placement, item in zip(real, scene.objects(), strict=True):
            rows, columns = np.nonzero(placement.sprite.mask)
            rows, columns = rows + placement.top, columns + placement.left
            height, width = scene.owner.shape
            inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
            assert item.truncated == (not inside.all())


@pytest.mark.parametrize("names", [["sailboat"] * 6, ["kite"] * 6, [*CLUTTER, *CLUTTER]])
def test_every_planned_object_finds_a_place(names):
    scene_of = clutter_scene if names[0] in CLUTTER else landscape_scene
    for seed in range(4):
        found = [item.name for item in scene_of(names, np.random.default_rng(seed)).objects()]
        assert sorted(found) == sorted(names)


def test_look_alikes_are_drawn_and_not_annotated():
    scenes = [clutter_scene([], np.random.default_rng(seed)) for seed in range(6)]
    assert sum(len(scene.placements) for scene in scenes) > 0
    assert not any(scene.objects() for scene in scenes)


@pytest.mark.parametrize("name", CLUTTER)
def test_a_look_alike_differs_from_the_object_by_one_feature(name):
    sheets = []
    for whole in (True, False):
        sketch = Sketch(80)
        CLUTTER[name](sketch, np.random.default_rng(1), whole)
        sheets.append(sketch.canvas.astype(int))
    changed = np.abs(sheets[0] - sheets[1]).any(axis=2).sum()
    assert 0.005 < changed / sheets[0].any(axis=2).sum() < 0.4


def test_a_folder_of_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_bytes(b"precious")
    (tmp_path / "file").write_bytes(b"precious too")
    before = tree_bytes(tmp_path)
    for name in ("mine", "file"):
        with pytest.raises(UserError, match=MARKER):
            draw(tmp_path / name)
    assert tree_bytes(tmp_path) == before


def test_an_empty_folder_is_used_and_an_earlier_sample_replaced_whole(tmp_path):
    out = tmp_path / "Sample"
    out.mkdir()
    draw(out, images=7)
    draw(out, images=5, difficulty="hard")
    assert len(list((out / "JPEGImages").iterdir())) == 5
    assert tuple((out / "classes.txt").read_text().split()) == CLASSES["hard"]
    assert [path.name for path in tmp_path.iterdir()] == ["Sample"]


def test_a_killed_run_leaves_no_half_sample_and_the_next_is_whole(tmp_path):
    out = tmp_path / "Sample"
    process = subprocess.Popen(
        [*COMMAND, "--out", str(out), "--images", "5000"], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*.xml")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert list(tmp_path.rglob("*.xml"))
    assert not out.exists()
    draw(out)
    draw(tmp_path / "clean")
    assert tree_bytes(out) == tree_bytes(tmp_path / "clean")
    assert {path.name for path in tmp_path.iterdir()} == {"Sample", "clean"}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"images": 4}, "--images 4"),
        ({"seed": -1}, "--seed"),
        ({"difficulty": "mild"}, "easy, hard"),
    ],
)
def test_bad_values_are_user_errors_that_say_what_is_allowed(tmp_path, change, word):
    with pytest.raises(UserError, match=word):
        draw(tmp_path / "Sample", **change)
    assert not any(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        draw(tmp_path / "file" / "Sample")


def test_the_command_prints_a_message_alone_and_exits_with_2(tmp_path):
    command = [*COMMAND, "--out", str(tmp_path / "Sample"), "--images", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --images 3")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("seed", [82, 83])
def test_an_object_too_tall_for_the_sky_is_drawn_smaller(seed):
    scene = Scene(np.zeros((212, 320, 3), np.float32))
    _place_in_landscape(scene, "kite", horizon=131, rng=np.random.default_rng(seed))
    assert len(scene.placements) == 1
