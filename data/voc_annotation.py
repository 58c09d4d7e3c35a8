"""One VOC annotation: read its XML and repair boxes that do not fit the image."""

import math
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from os import PathLike

import numpy as np

from data.image import ImageHeader, upright_boxes
from utils.errors import UserError

_COORDINATES = ("xmin", "ymin", "xmax", "ymax")
_DIFFICULT = {"1": True, "true": True, "": False, "0": False, "false": False, "unspecified": False}


@dataclass(frozen=True, eq=False)
class Annotation:
    """The content of an annotation file.

    file_name: <filename> without folders, "" when missing. size_hw: <size>, None when missing.
    names: n class names. boxes_xyxy: (n, 4) float64. difficult: (n,) bool.
    """

    file_name: str
    size_hw: tuple[int, int] | None
    names: tuple[str, ...]
    boxes_xyxy: np.ndarray
    difficult: np.ndarray


@dataclass(frozen=True, eq=False)
class RepairedBoxes:
    """boxes_xyxy: (n, 4) float32 within the upright image; kept: mask over the boxes as written.

    swapped, clipped, dropped_tiny: numbers of boxes; rotated: the boxes were turned upright.
    """

    boxes_xyxy: np.ndarray
    kept: np.ndarray
    swapped: int
    clipped: int
    dropped_tiny: int
    rotated: bool


def read_annotation(path: str | PathLike) -> Annotation:
    """Read one XML file; only the objects themselves count, not the <part>s inside them.

    Raises UserError, with the path, for a file that is missing, not XML, not a VOC annotation,
    declares a DTD, or has an object without name, box or finite coordinates.
    """
    try:
        root = ET.parse(path, ET.XMLParser(target=_PlainTree())).getroot()
        if root.tag != "annotation":
            raise ValueError(f"the root element is <{root.tag}>, not <annotation>")
        objects = [_parse_object(node, i) for i, node in enumerate(root.findall("object"), 1)]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except ET.ParseError as error:
        raise UserError(f"{path}: broken XML: {error}") from None
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"{path}: {error}") from None
    return Annotation(
        file_name=_text(root, "filename").replace("\\", "/").rpartition("/")[2],
        size_hw=_size(root),
        names=tuple(name for name, _, _ in objects),
        boxes_xyxy=np.array([box for _, box, _ in objects], np.float64).reshape(-1, 4),
        difficult=np.array([difficult for _, _, difficult in objects], bool),
    )


def repair_boxes(annotation: Annotation, header: ImageHeader) -> RepairedBoxes:
    """Fit the boxes to the upright image: swap mixed-up corners, clip, drop what is below 1 px.

    Boxes drawn on the stored pixels of an image that EXIF turns by 90 degrees are turned with
    it: <size> gives them away. Otherwise <size> is not consulted, it is too often wrong.
    """
    boxes = annotation.boxes_xyxy
    height, width = header.upright_hw
    rotated = header.stored_hw != header.upright_hw and annotation.size_hw == header.stored_hw
    if rotated:
        boxes = upright_boxes(boxes, header)
    ordered = np.concatenate(
        (np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])), axis=1
    )
    clipped = ordered.clip(0, (width, height, width, height))
    kept = (clipped[:, 2:] - clipped[:, :2] >= 1).all(axis=1)
    return RepairedBoxes(
        boxes_xyxy=clipped[kept].astype(np.float32),
        kept=kept,
        swapped=int((ordered != boxes).any(axis=1).sum()),
        clipped=int((clipped != ordered).any(axis=1).sum()),
        dropped_tiny=int((~kept).sum()),
        rotated=rotated,
    )


class _PlainTree(ET.TreeBuilder):
    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        # Annotations need no DTD; refusing it keeps entity bombs and outside entities away.
        raise ValueError("declares a document type (<!DOCTYPE>), which VOC annotations do not have")


def _parse_object(node: ET.Element, number: int) -> tuple[str, list[float], bool]:
    name = _text(node, "name")
    if not name:
        raise ValueError(f"object {number} has no <name>")
    where = f"object {number} ({name!r})"
    box = node.find("bndbox")
    if box is None:
        raise ValueError(f"{where} has no <bndbox>")
    difficult = _text(node, "difficult").lower()
    if difficult not in _DIFFICULT:
        raise ValueError(f"{where}: <difficult> is {difficult!r}, not 0 or 1")
    return name, [_coordinate(box, tag, where) for tag in _COORDINATES], _DIFFICULT[difficult]


def _coordinate(box: ET.Element, tag: str, where: str) -> float:
    text = _text(box, tag)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where}: <{tag}> is {text!r}, not a number")
    return value


def _size(root: ET.Element) -> tuple[int, int] | None:
    try:
        return int(_text(root, "size/height")), int(_text(root, "size/width"))
    except ValueError:
        return None


def _text(node: ET.Element, path: str) -> str:
    return (node.findtext(path) or "").strip()
