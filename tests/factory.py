"""Small VOC trees that tests write themselves."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import cv2
import numpy as np

Box = tuple[str, tuple[float, float, float, float]] | tuple[str, tuple, bool]


def annotation_xml(file_name: str, image_hw: tuple[int, int], boxes: Iterable[Box]) -> str:
    """A VOC annotation. boxes: (class name, (xmin, ymin, xmax, ymax)[, difficult])."""
    objects = ""
    for name, (xmin, ymin, xmax, ymax), *difficult in boxes:
        objects += (
            f"<object><name>{escape(name)}</name><difficult>{int(any(difficult))}</difficult>"
            f"<bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin>"
            f"<xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox></object>"
        )
    size = (
        f"<size><width>{image_hw[1]}</width><height>{image_hw[0]}</height><depth>3</depth></size>"
    )
    return f"<annotation><filename>{escape(file_name)}</filename>{size}{objects}</annotation>"


def add_image(
    root: Path, image_id: str, image_rgb: np.ndarray, boxes: Iterable[Box], suffix: str = ".png"
) -> None:
    """Write one image (RGB uint8) and its annotation into a VOC tree."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    ok, data = cv2.imencode(suffix, image_rgb[..., ::-1])
    if not ok:
        raise RuntimeError(f"OpenCV cannot write {suffix}")
    (root / "JPEGImages" / f"{image_id}{suffix}").write_bytes(data.tobytes())
    xml = annotation_xml(f"{image_id}{suffix}", image_rgb.shape[:2], boxes)
    (root / "Annotations" / f"{image_id}.xml").write_text(xml, encoding="utf-8")


def write_split(root: Path, split: str, image_ids: Sequence[str]) -> None:
    """Write ImageSets/Main/SPLIT.txt."""
    path = root / "ImageSets" / "Main" / f"{split}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in image_ids), encoding="utf-8")


def coloured_boxes(
    image_hw: tuple[int, int], boxes_xyxy: Sequence, colours: Sequence, background: int = 128
) -> np.ndarray:
    """An RGB image of filled rectangles on grey, one colour a box."""
    image = np.full((*image_hw, 3), background, np.uint8)
    for (x1, y1, x2, y2), colour in zip(boxes_xyxy, colours, strict=True):
        image[round(y1) : round(y2), round(x1) : round(x2)] = colour
    return image
