"""Read VOC data as samples, with every fault of the data repaired and counted or reported."""

import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.image import check_image
from data.voc_annotation import Annotation, RepairedBoxes, read_annotation, repair_boxes
from data.voc_report import SplitReport, list_faults
from data.voc_tree import SplitIds, VocTree, parse_spec
from utils.errors import UserError


@dataclass(frozen=True, eq=False)
class Sample:
    """One image and its n objects; n may be 0.

    image_id: unique in its split specification: the id of the split file, with the root in
    front where two roots share one. image_hw: (height, width) of the upright image.
    class_ids: (n,) int64. boxes_xyxy: (n, 4) float32, pixels of the upright image, within it
    and at least one pixel wide and high. difficult: (n,) bool.
    """

    image_path: str
    image_id: str
    image_hw: tuple[int, int]
    class_ids: np.ndarray
    boxes_xyxy: np.ndarray
    difficult: np.ndarray


def read_class_names(path: str | PathLike) -> tuple[str, ...]:
    """Class names, one a line; a name's id is its place among them. Blank lines do not count.

    Raises UserError if the file is missing, no UTF-8 text, without names, or has a name twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the class names of {path} (UTF-8 text): {error}") from None
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise UserError(f"{path} holds no class names. Write one a line.")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{path} has names more than once: {', '.join(map(repr, twice))}")
    return names


def read_split(spec: str, class_names: Sequence[str]) -> list[Sample]:
    """The samples of "ROOT:SPLIT+ROOT:SPLIT", in the order of the split files.

    Raises:
        UserError: As `scan_split`.
    """
    return scan_split(spec, class_names)[0]


def scan_split(
    spec: str,
    class_names: Sequence[str],
    *,
    skip_bad: bool = False,
    include_difficult: bool = False,
    split_dir: str | PathLike | None = None,
    classes_path: str | PathLike | None = None,
    progress: bool = False,
) -> tuple[list[Sample], SplitReport]:
    """Read and check all images and annotations of "ROOT:SPLIT+ROOT:SPLIT".

    Boxes are repaired and counted (see `repair_boxes`).

    Args:
        skip_bad: Skip images that cannot be used.
        include_difficult: No object counts as difficult.
        split_dir: Where splits are made for a read-only tree.
        classes_path: Where class_names come from, for messages.
        progress: Whether to show a progress bar.

    Raises:
        UserError: For an unusable root or split, for class names that are not among class_names,
            and, all in one message, for missing, broken and (when a split has to be made) unpaired
            files, unless skip_bad; also if no image is left.
    """
    parts = _open_parts(spec, split_dir)
    jobs = [(tree, image_id) for tree, split in parts for image_id in split.ids]
    unique_jobs = list(dict.fromkeys(jobs))
    images, bad = _read_images(unique_jobs, f"checking {spec}" if progress else "")
    faults = list(dict.fromkeys([fault for _, split in parts for fault in split.faults] + bad))
    notes = list(dict.fromkeys(note for _, split in parts for note in split.notes))
    problems = _unknown_names(spec, images, class_names, classes_path)
    if not images or (faults and not skip_bad):
        problems.append(_unusable_files(spec, faults, notes, left=len(images)))
    if problems:
        raise UserError("\n".join(problems))
    for tree, split in parts:
        if split.made:
            folder = tree.write_splits(split.made, split_dir)
            counts = ", ".join(f"{name} {len(ids):,}" for name, ids in split.made.items())
            notes.append(f"there were no splits: made {counts} in {folder}")
    samples = _to_samples(images, class_names, include_difficult)
    repeated = len(jobs) - len(unique_jobs) + sum(split.duplicates for _, split in parts)
    report = _report(spec, images, class_names)
    return samples, replace(report, duplicates=repeated, faults=faults, notes=notes)


@dataclass(frozen=True, eq=False)
class _Image:
    """An image that can be used, with its annotation."""

    tree: VocTree
    image_id: str
    path: Path
    image_hw: tuple[int, int]
    annotation: Annotation
    repaired: RepairedBoxes

    @property
    def names(self) -> list[str]:
        return list(itertools.compress(self.annotation.names, self.repaired.kept))

    @property
    def difficult(self) -> np.ndarray:
        return self.annotation.difficult[self.repaired.kept]


def _open_parts(spec: str, split_dir: str | PathLike | None) -> list[tuple[VocTree, SplitIds]]:
    trees: dict[Path, VocTree] = {}
    parts = []
    for root, split in parse_spec(spec):
        trees[root] = trees.get(root) or VocTree(root)
        parts.append((trees[root], trees[root].split_ids(split, split_dir)))
    return parts


def _read_images(
    jobs: Sequence[tuple[VocTree, str]], progress: str
) -> tuple[list[_Image], list[str]]:
    """Usable images in the order of the jobs, and "path: what" of all the others' faults."""
    # Threads: decoding leaves the interpreter free, and a network disk has others to wait for.
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        results = pool.map(lambda job: _read_image(*job), jobs)
        shown = tqdm(results, progress, len(jobs), disable=not progress, leave=False)
        read = list(shown)
    images = [image for image, _ in read if image is not None]
    return images, [fault for _, faults in read for fault in faults]


def _read_image(tree: VocTree, image_id: str) -> tuple[_Image | None, list[str]]:
    faults = []
    try:
        annotation = read_annotation(tree.annotation_path(image_id))
    except UserError as error:
        faults.append(str(error))
    try:
        path = tree.image_path(image_id)
        header = check_image(path)
    except UserError as error:
        faults.append(str(error))
    if faults:
        return None, faults
    repaired = repair_boxes(annotation, header)
    return _Image(tree, image_id, path, header.upright_hw, annotation, repaired), []


def _unknown_names(
    spec: str,
    images: Sequence[_Image],
    class_names: Sequence[str],
    classes_path: str | PathLike | None,
) -> list[str]:
    """One message if annotations use names that are not among class_names, else none."""
    used = {name for image in images for name in image.annotation.names}
    unknown: dict[str, list[_Image]] = defaultdict(list)
    for image in images:
        for name in set(image.annotation.names).difference(class_names):
            unknown[name].append(image)
    if not unknown:
        return []
    roots = list(dict.fromkeys(uses[0].tree.root for uses in unknown.values()))
    lines = [
        f"{name!r} in {len(uses):,} annotations, "
        f"first {uses[0].tree.annotation_path(uses[0].image_id)}"
        for name, uses in sorted(unknown.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    own_files = [str(root / "classes.txt") for root in roots if (root / "classes.txt").is_file()]
    own_files = [path for path in own_files if path != str(classes_path)]
    hint = f" (perhaps {' or '.join(own_files)})" if own_files else ""
    return [
        f"{spec}: the annotations use {len(used)} class names, "
        f"{classes_path or 'the given list'} has {len(class_names)}. Used but not in it:\n"
        f"{list_faults(lines)}\n"
        f"Train with the --classes_path that belongs to this data{hint}, or add the names; a "
        "checkpoint keeps the classes that it was trained on."
    ]


def _unusable_files(spec: str, faults: Sequence[str], notes: Sequence[str], left: int) -> str:
    cure = "repair or remove them, or skip them with --skip_bad" if left else "nothing is left"
    files = "1 file" if len(faults) == 1 else f"{len(faults):,} files"
    lines = [f"{spec}: {files} cannot be used; {cure}", list_faults(faults)]
    return "\n".join(lines + [f"  note: {note}" for note in notes])


def _to_samples(
    images: Sequence[_Image], class_names: Sequence[str], include_difficult: bool
) -> list[Sample]:
    class_ids = {name: i for i, name in enumerate(class_names)}
    uses = Counter(image.image_id for image in images)
    return [
        Sample(
            image_path=str(image.path),
            image_id=(image.tree.root / image.image_id).as_posix()
            if uses[image.image_id] > 1
            else image.image_id,
            image_hw=image.image_hw,
            class_ids=np.array([class_ids[name] for name in image.names], np.int64),
            boxes_xyxy=image.repaired.boxes_xyxy,
            difficult=image.difficult & (not include_difficult),
        )
        for image in images
    ]


def _report(spec: str, images: Sequence[_Image], class_names: Sequence[str]) -> SplitReport:
    boxes = Counter(name for image in images for name in image.names)
    repaired = [image.repaired for image in images]
    return SplitReport(
        spec,
        images=len(images),
        backgrounds=sum(not image.names for image in images),
        boxes={name: boxes[name] for name in class_names},
        difficult=sum(int(image.difficult.sum()) for image in images),
        swapped=sum(repair.swapped for repair in repaired),
        clipped=sum(repair.clipped for repair in repaired),
        dropped_tiny=sum(repair.dropped_tiny for repair in repaired),
        rotated=sum(repair.rotated for repair in repaired),
    )
