"""Where things lie in a VOC tree: split specifications, split files, images, annotations."""

import os
import random
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from data.image import IMAGE_SUFFIXES
from data.voc_annotation import read_annotation
from utils.errors import UserError

STANDARD_SPLITS = ("train", "val", "trainval", "test")
SPLIT_SEED = 0
_SYSTEM_FILES = ("thumbs.db", "desktop.ini")  # and every name that begins with a dot


@dataclass(frozen=True)
class SplitIds:
    """Image ids of one split, each once, in the order of its file.

    duplicates: how many lines repeat an id. notes: what is worth knowing about the tree.
    faults: "path: what" of files that belong to no pair, where a split is made from all pairs.
    made: split name -> ids, still to be written; empty when a file was read.
    """

    ids: tuple[str, ...]
    duplicates: int = 0
    notes: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    made: Mapping[str, Sequence[str]] = field(default_factory=dict)


def parse_spec(spec: str) -> list[tuple[Path, str]]:
    """Parse "ROOT:SPLIT+ROOT:SPLIT" into (root, split) pairs.

    ROOT may hold colons (drive letters) and plus signs: the last colon counts, and a plus
    separates only where what stands before it is a ROOT:SPLIT by itself. Raises UserError.
    """
    parts, pending = [], ""
    for piece in spec.split("+"):
        pending += piece
        root, _, split = (text.strip() for text in pending.rpartition(":"))
        if root and split and not set(split) & set("/\\"):
            parts.append((Path(root).expanduser(), split))
            pending = ""
        else:
            pending += "+"
    if pending or not parts:
        raise UserError(
            f"cannot read the data {spec!r}: write ROOT:SPLIT, several joined by +, "
            f"for example VOCdevkit/VOC2007:trainval+VOCdevkit/VOC2012:trainval"
        )
    return parts


class VocTree:
    """The files of one VOC tree, listed once; nothing is opened that the names do not need.

    An image belongs to an annotation by its id, whatever its suffix; where that gives none or
    several, by the annotation's <filename>.
    """

    def __init__(self, root: Path):
        """Raises UserError if root, its Annotations/ or its JPEGImages/ is missing."""
        _check_root(root)
        self.root = root
        xml_files, odd_xml, system_xml = _list_files(root / "Annotations", (".xml",))
        images, odd_images, system_images = _list_files(root / "JPEGImages", IMAGE_SUFFIXES)
        self._xml_files, self._images = xml_files, images
        self._odd_files = [*odd_xml, *odd_images]
        self._system_files = [*system_xml, *system_images]
        self._image_of = {image_id: names[0] for image_id, names in images.items()}
        for image_id in xml_files:
            if len(images.get(image_id, ())) != 1:
                self._pair_by_file_name(image_id)

    def annotation_path(self, image_id: str) -> Path:
        """Where the annotation of an id is, or would be."""
        name = self._xml_files.get(image_id, [f"{image_id}.xml"])[0]
        return self.root / "Annotations" / name

    def image_path(self, image_id: str) -> Path:
        """The image of an id. Raises UserError if there is none."""
        folder = self.root / "JPEGImages"
        if image_id not in self._image_of:
            suffixes = " ".join(IMAGE_SUFFIXES)
            raise UserError(
                f"{folder / image_id}.*: no such image ({suffixes}), "
                f"and none by the <filename> of its annotation"
            )
        return folder / self._image_of[image_id]

    def split_ids(self, split: str, split_dir: str | PathLike | None = None) -> SplitIds:
        """The ids of a split from its file; when there is no standard split at all, plan them.

        split_dir: where made splits lie if the tree is read-only. Raises UserError for an
        unknown or empty split.
        """
        folders = self._split_folders(split_dir)
        for folder in folders:
            if (folder / f"{split}.txt").is_file():
                return self._read_split(folder / f"{split}.txt")
        present = {path.stem for folder in folders for path in folder.glob("*.txt")}
        if split in STANDARD_SPLITS and not present.intersection(STANDARD_SPLITS):
            return self._plan_splits(split)
        shown = sorted(present, key=lambda name: (name not in STANDARD_SPLITS, name))
        more = ", ..." if len(shown) > 20 else ""
        raise UserError(
            f"{self.root} has no split {split!r}: there is no {folders[0] / split}.txt. "
            f"Present: {', '.join(shown[:20]) or 'none'}{more}"
        )

    def write_splits(
        self, made: Mapping[str, Sequence[str]], split_dir: str | PathLike | None = None
    ) -> Path:
        """Write planned splits into the tree, or into split_dir if the tree is read-only.

        Each file is complete or absent. Returns the folder. Raises UserError if neither works.
        """
        errors = []
        for folder in self._split_folders(split_dir):
            try:
                _write_splits(folder, made)
            except OSError as error:
                errors.append(str(error))
            else:
                return folder
        raise UserError(
            f"{self.root} has no splits, and they cannot be made: {'; '.join(errors)}. Make the "
            f"tree writable, or put train.txt, val.txt and test.txt into its ImageSets/Main."
        )

    def _pair_by_file_name(self, image_id: str) -> None:
        try:
            file_name = read_annotation(self.annotation_path(image_id)).file_name
        except UserError:
            return  # reported when the annotation itself is read
        if file_name in self._images.get(Path(file_name).stem, ()):
            self._image_of[image_id] = file_name

    def _split_folders(self, split_dir: str | PathLike | None) -> list[Path]:
        folders = [self.root / "ImageSets" / "Main"]
        if split_dir is not None:
            # The number keeps apart two read-only trees whose folders have one name.
            root = self.root.resolve()
            name = f"{root.name}-{zlib.crc32(str(root).encode()):08x}"
            folders.append(Path(split_dir) / "ImageSets" / name)
        return folders

    def _read_split(self, path: Path) -> SplitIds:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None
        listed = [image_id for line in lines if (image_id := self._parse_line(line.strip()))]
        if not listed:
            raise UserError(f"{path} lists no images. Write one image id a line.")
        ids = tuple(dict.fromkeys(listed))
        notes = (
            *_note("system files ignored", self._system_files),
            *_note("files that are neither image nor .xml ignored", self._odd_files),
            *_note("images without annotation", self._unannotated(besides=ids)),
        )
        return SplitIds(ids, duplicates=len(listed) - len(ids), notes=notes)

    def _parse_line(self, line: str) -> str:
        """The id of a line; "" for a blank one and where a class split says "absent" (-1)."""
        columns = line.rsplit(maxsplit=1)
        known = line in self._xml_files or line in self._image_of  # an id may hold spaces
        if known or len(columns) < 2 or columns[1] not in ("-1", "0", "1"):
            return line
        return "" if columns[1] == "-1" else columns[0]

    def _plan_splits(self, split: str) -> SplitIds:
        pairs = sorted(self._xml_files.keys() & self._image_of.keys())
        made = {name: ids for name, ids in _draw_splits(pairs).items() if ids}
        if split not in made:
            raise UserError(
                f"{self.root}: a split {split!r} cannot be made from {len(pairs)} images with "
                f"an annotation. Add images, or write ImageSets/Main/{split}.txt."
            )
        lonely = sorted(self._xml_files.keys() - self._image_of.keys())
        faults = (
            *(f"{self.annotation_path(image_id)}: no image" for image_id in lonely),
            *(f"{path}: no annotation" for path in self._unannotated()),
            *(f"{path}: neither image nor .xml" for path in self._odd_files),
        )
        notes = _note("system files ignored", self._system_files)
        return SplitIds(tuple(made[split]), notes=notes, faults=faults, made=made)

    def _unannotated(self, besides: Iterable[str] = ()) -> list[Path]:
        named = self._xml_files.keys() | set(besides)
        used = {self._image_of[image_id] for image_id in named & self._image_of.keys()}
        names = (name for names in self._images.values() for name in names)
        return [self.root / "JPEGImages" / name for name in sorted(names) if name not in used]


def _check_root(root: Path) -> None:
    missing = [name for name in ("Annotations", "JPEGImages") if not (root / name).is_dir()]
    if not missing:
        return
    given = f"{root} has no {' and no '.join(missing)}" if root.is_dir() else f"no folder {root}"
    nested = sorted(path.parent for path in root.glob("*/Annotations"))
    if nested:
        raise UserError(f"{given}. Did you mean {' or '.join(map(str, nested[:5]))}?")
    raise UserError(
        f"{given}. A data root holds Annotations/, JPEGImages/ and ImageSets/Main/. Either\n"
        f"  put {root.name} at {root} (see VOCdevkit/README.md), or\n"
        f"  draw the sample: python -m tools.make_sample_voc --out VOCdevkit/Sample\n"
        f"  and name it: VOCdevkit/Sample:train with --classes_path VOCdevkit/Sample/classes.txt"
    )


def _list_files(
    folder: Path, suffixes: Sequence[str]
) -> tuple[dict[str, list[str]], list[Path], list[Path]]:
    """File names by stem where the suffix fits, in any case; other paths; system files."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed: {error}") from None
    fitting, odd, system = defaultdict(list), [], []
    for entry in entries:
        stem, suffix = os.path.splitext(entry.name)
        if entry.name.startswith(".") or entry.name.lower() in _SYSTEM_FILES:
            system.append(folder / entry.name)
        elif suffix.lower() in suffixes and entry.is_file():
            fitting[stem].append(entry.name)
        else:
            odd.append(folder / entry.name)
    return dict(fitting), odd, system


def _draw_splits(image_ids: Sequence[str]) -> dict[str, list[str]]:
    """8:1:1 by a seeded shuffle; two images make train and val, three or more all splits."""
    shuffled = list(image_ids)
    random.Random(SPLIT_SEED).shuffle(shuffled)
    tenth = max(1, round(len(shuffled) / 10))
    n_val = tenth if len(shuffled) >= 2 else 0
    n_test = tenth if len(shuffled) >= 3 else 0
    val, test = shuffled[:n_val], shuffled[n_val : n_val + n_test]
    train = shuffled[n_val + n_test :]
    splits = {"train": train, "val": val, "trainval": train + val, "test": test}
    return {name: sorted(ids) for name, ids in splits.items()}


def _write_splits(folder: Path, made: Mapping[str, Sequence[str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {split: folder / f".{split}.{os.getpid()}" for split in made}
    try:
        for split, path in temporary.items():
            path.write_text("".join(f"{i}\n" for i in made[split]), encoding="utf-8")
        for split, path in temporary.items():
            path.replace(folder / f"{split}.txt")
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _note(what: str, paths: Sequence[Path]) -> tuple[str, ...]:
    shown = ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")
    return (f"{len(paths)} {what}: {shown}",) if paths else ()
