"""Draw a data set in VOC's format, so that everything can be tried without a download.

python -m tools.make_sample_voc --out VOCdevkit/Sample --images 300 --seed 0 --difficulty easy
"""

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import tyro
from numpy.random import Generator
from tqdm import tqdm

from tools.sample_objects import CLUTTER, LANDSCAPE
from tools.sample_scenes import SampleObject, clutter_scene, compose, expose, landscape_scene
from utils.errors import UserError, run_script

SPLITS = ("train", "val", "test")
MARKER = "sample.json"  # a folder with this file was made here and may be replaced
MIN_IMAGES = 5  # fewer leave a split without images
IMBALANCE = 50  # most frequent : rarest class of the hard sample
EMPTY_SHARE = 0.1  # images without objects in the hard sample
CLASSES = {"easy": tuple(LANDSCAPE), "hard": tuple(CLUTTER)}
SCENES = {"easy": landscape_scene, "hard": clutter_scene}


@dataclasses.dataclass(frozen=True)
class Config:
    # Every line is a flag; its comment is the flag's help.
    out: Path = Path("VOCdevkit/Sample")  # folder of the new data set
    images: int = 300  # images in all, 60:20:20 into train, val and test
    seed: int = 0  # the same seed draws the same images, byte for byte
    difficulty: Literal["easy", "hard"] = "easy"  # easy to try things out, hard to compare losses


def split_indices(images: int, rng: Generator) -> dict[str, list[int]]:
    """Image indices of train, val and test, 60:20:20, each sorted."""
    order = rng.permutation(images)
    ends = round(0.6 * images), round(0.8 * images)
    parts = np.split(order, ends)
    return {name: sorted(part.tolist()) for name, part in zip(SPLITS, parts, strict=True)}


def object_counts(images: int, difficulty: str, rng: Generator) -> np.ndarray:
    """How many objects each image of a split gets."""
    if difficulty == "easy":
        return rng.integers(1, 7, images)
    counts = np.minimum(1 + rng.geometric(0.2, images), 14)
    counts[rng.permutation(images)[: round(EMPTY_SHARE * images)]] = 0
    return counts


def class_pool(total: int, difficulty: str) -> list[str]:
    """Class names of a split's objects: equal shares when easy, from 50 down to 1 when hard.

    At least one per class while `total` allows it, so that rare classes are in every split.
    """
    names = CLASSES[difficulty]
    ratio = IMBALANCE if difficulty == "hard" else 1
    shares = ratio ** -np.linspace(0, 1, len(names))
    counts = np.maximum(1, np.round(shares / shares.sum() * total)).astype(int)
    pool = [*names, *np.repeat(names, counts - 1).tolist()][:total]
    return pool + [names[0]] * (total - len(pool))


def plan_objects(
    splits: dict[str, list[int]], difficulty: str, rng: Generator
) -> dict[int, list[str]]:
    """The objects of each image, by class name; every split has its share of every class."""
    plan = {}
    for indices in splits.values():
        counts = object_counts(len(indices), difficulty, rng)
        pool = rng.permutation(class_pool(int(counts.sum()), difficulty)).tolist()
        for index, count in zip(indices, counts.tolist(), strict=True):
            plan[index], pool = pool[:count], pool[count:]
    return plan


def annotation_xml(file_name: str, image_hw: tuple[int, int], objects: list[SampleObject]) -> str:
    """A VOC annotation."""
    lines = [
        "<annotation>",
        "\t<folder>Sample</folder>",
        f"\t<filename>{file_name}</filename>",
        f"\t<size><width>{image_hw[1]}</width><height>{image_hw[0]}</height><depth>3</depth></size>",
        "\t<segmented>0</segmented>",
    ]
    for item in objects:
        xmin, ymin, xmax, ymax = item.box_xyxy
        lines += [
            "\t<object>",
            f"\t\t<name>{item.name}</name>",
            "\t\t<pose>Unspecified</pose>",
            f"\t\t<truncated>{int(item.truncated)}</truncated>",
            f"\t\t<difficult>{int(item.difficult)}</difficult>",
            f"\t\t<bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin>"
            f"<xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox>",
            "\t</object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])


def draw_image(
    names: list[str], difficulty: str, rng: Generator
) -> tuple[np.ndarray, list[SampleObject], int]:
    """Draw an image with objects of the named classes.

    Returns:
        The image, (H, W, 3) uint8 RGB, its objects, and the JPEG quality to store it with.
    """
    scene = SCENES[difficulty](names, rng)
    image, quality = compose(scene.background, scene.placements), 90
    if difficulty == "hard":
        image, quality = expose(image, rng), int(rng.integers(40, 96))
    return np.clip(np.round(image), 0, 255).astype(np.uint8), scene.objects(), quality


def write_image(
    root: Path, image_id: str, drawn: tuple[np.ndarray, list[SampleObject], int]
) -> None:
    """Write the JPEG and its annotation."""
    image, objects, quality = drawn
    _, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    (root / "JPEGImages" / f"{image_id}.jpg").write_bytes(data.tobytes())
    xml = annotation_xml(f"{image_id}.jpg", image.shape[:2], objects)
    (root / "Annotations" / f"{image_id}.xml").write_text(xml, encoding="utf-8")


def write_lists(root: Path, splits: dict[str, list[int]], difficulty: str) -> None:
    """Write ImageSets/Main/*.txt and classes.txt."""
    for name, indices in (splits | {"trainval": sorted(splits["train"] + splits["val"])}).items():
        text = "".join(f"{index:06d}\n" for index in indices)
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text(text, encoding="utf-8")
    classes = "".join(f"{name}\n" for name in CLASSES[difficulty])
    (root / "classes.txt").write_text(classes, encoding="utf-8")


def draw_tree(root: Path, *, images: int, seed: int, difficulty: str, progress: bool) -> Counter:
    """Draw all images into a new folder; returns the number of objects of each class."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    planner = np.random.default_rng(seed)
    splits = split_indices(images, planner)
    plan = plan_objects(splits, difficulty, planner)
    drawn: Counter[str] = Counter()
    for index in tqdm(range(images), desc="drawing", unit="image", disable=not progress):
        # its own generator: an image does not depend on those drawn before it
        image = draw_image(plan[index], difficulty, np.random.default_rng((seed, index)))
        write_image(root, f"{index:06d}", image)
        drawn.update(item.name for item in image[1])
    write_lists(root, splits, difficulty)
    made = {"images": images, "seed": seed, "difficulty": difficulty}
    (root / MARKER).write_text(json.dumps(made) + "\n", encoding="utf-8")
    return drawn


def check_replaceable(folder: Path) -> None:
    """Raise UserError unless the folder is missing, empty or a sample drawn by this tool."""
    if folder.is_dir() and (not any(folder.iterdir()) or (folder / MARKER).is_file()):
        return
    if folder.exists():
        raise UserError(
            f"{folder} exists and is not a sample drawn by this tool (it has no {MARKER}). "
            f"Nothing was changed; give another --out or move it away."
        )


def check_arguments(images: int, seed: int, difficulty: str) -> None:
    """Raise UserError for a value out of range."""
    if images < MIN_IMAGES:
        raise UserError(f"--images {images}: give at least {MIN_IMAGES}, an image for each split.")
    if seed < 0:
        raise UserError(f"--seed {seed}: give 0 or more.")
    if difficulty not in CLASSES:
        raise UserError(f"--difficulty {difficulty!r}: give one of {', '.join(CLASSES)}.")


def make_sample(
    out: Path | str, *, images: int, seed: int, difficulty: str, progress: bool = True
) -> Counter:
    """Draw the sample into `out`, all or nothing.

    It grows in a hidden sibling folder and moves to `out` when complete, in place of an earlier
    sample.

    Returns:
        The number of objects of each class.

    Raises:
        UserError: For bad values, and if `out` holds anything else or cannot be written.
    """
    check_arguments(images, seed, difficulty)
    out = Path(out).resolve()
    check_replaceable(out)
    scratch = out.with_name(f".{out.name}.make_sample_voc")
    try:
        if scratch.exists():  # an interrupted run's
            shutil.rmtree(scratch)
        drawn = draw_tree(
            scratch / "new", images=images, seed=seed, difficulty=difficulty, progress=progress
        )
        if out.exists():
            out.rename(scratch / "old")
        (scratch / "new").rename(out)
        shutil.rmtree(scratch)
    except OSError as error:
        raise UserError(
            f"{out}: cannot write the sample ({error}). Make room there or give another --out."
        ) from None
    return drawn


def main() -> None:
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    drawn = make_sample(**dataclasses.asdict(config))
    counts = ", ".join(f"{name} {drawn[name]}" for name in CLASSES[config.difficulty])
    print(f"{config.out}: {config.images} images, {drawn.total()} objects ({counts})")
    print(f"train with: --train {config.out}:train --val {config.out}:val", end=" ")
    print(f"--classes_path {config.out / 'classes.txt'}")


if __name__ == "__main__":
    run_script(main)
