"""Read images of any common kind as upright RGB, and check them without a full decode."""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn import functional as F

from utils.errors import UserError

# No thread pool in OpenCV: a loader's worker that is forked from a process with one hangs in its
# first call, and the workers fill the cores by themselves.
cv2.setNumThreads(0)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")  # in lower case

# EXIF orientations as steps from the stored pixels to the upright ones: first swap the axes
# (5 to 8), then mirror left and right, then turn upside down.
_MIRRORED = (2, 3, 6, 7)
_FLIPPED = (3, 4, 7, 8)

# How OpenCV decodes a JPEG at a part of its size.
_REDUCED_COLOR = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}

# What Pillow raises for broken files, apart from its own classes, is not one family.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    struct.error,
    EOFError,
    IndexError,
    MemoryError,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class ImageHeader:
    """Size of the pixels as stored, (height, width), and EXIF orientation 1 to 8 (1: upright)."""

    stored_hw: tuple[int, int]
    orientation: int = 1

    @property
    def upright_hw(self) -> tuple[int, int]:
        return self.stored_hw[::-1] if self.orientation >= 5 else self.stored_hw


def read_image(path: str | PathLike, *, reduction: int = 1) -> np.ndarray:
    """Decode an image, turned upright by its EXIF orientation.

    Grey, palette and CMYK become RGB, 16 bits keep their upper 8, transparency is laid on white.

    Args:
        reduction: 1, or 2, 4 or 8 for an image with a pixel for each square of so many, of which
            the last ones are filled up: a JPEG is decoded at that size, at about half the cost.

    Returns:
        (H, W, 3) uint8 RGB, contiguous.

    Raises:
        UserError: With path and cause, for a file that is missing, truncated or not an image.
    """
    with _as_user_error(path):
        data = Path(path).read_bytes()
        with Image.open(io.BytesIO(data)) as opened:
            image = None
            if opened.format in ("JPEG", "MPO") and opened.mode in ("L", "RGB"):
                image = _decode_jpeg(data, reduction)
            if image is None:
                image = reduce(_decode_with_pillow(opened), reduction)
            orientation = _orientation(opened)
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    if orientation in _MIRRORED:
        image = image[:, ::-1]
    if orientation in _FLIPPED:
        image = image[::-1]
    return np.ascontiguousarray(image)


def reduce(image: np.ndarray, reduction: int) -> np.ndarray:
    """The means of squares of `reduction` pixels, (H, W, 3) uint8; edges are repeated to fill."""
    height, width = image.shape[:2]
    if reduction == 1:
        return image
    bottom, right = -height % reduction, -width % reduction
    if bottom or right:
        image = cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_REPLICATE)
    size = (image.shape[1] // reduction, image.shape[0] // reduction)
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def resize(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Resize an (H, W, 3) uint8 image, bicubic, antialiased where it shrinks.

    PIL's bicubic up to rounding: 3 levels of 255 at most, on noise. 640 x 480 to 416 x 312 takes
    0.94 ms on one x86 core; OpenCV's area averaging takes 2.8, PIL 4.9.
    """
    if tuple(size_hw) == image.shape[:2]:
        return image
    # A copy where torch could not take the array: reversed channels, a read-only image.
    pixels = torch.from_numpy(np.require(image, np.uint8, ["C", "W"]))
    # In this order (batch first) torch knows the memory as channels_last, and needs no copy.
    batch = pixels[None].permute(0, 3, 1, 2)
    resized = F.interpolate(batch, size=tuple(size_hw), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def image_size(path: str | PathLike) -> tuple[int, int]:
    """Upright (height, width); JPEG, BMP and WebP are asked for their header alone.

    Raises UserError if the file is missing or not an image.
    """
    with _as_user_error(path), Image.open(path) as image:
        return _header(image).upright_hw


def check_image(path: str | PathLike) -> ImageHeader:
    """Make sure that an image can be decoded to its end; returns its header.

    A JPEG is decoded to grey at an eighth of its size, which leaves only the entropy decoding.
    Raises UserError, with path and cause, for a file that is missing, truncated or not an image.
    """
    with _as_user_error(path), Image.open(path) as image:
        header = _header(image)
        image.draft("L", (1, 1))
        image.load()
        if image.mode[0] in "FI":
            _to_8_bit(np.asarray(image))  # raises now for what cannot be shown
    return header


def upright_boxes(boxes_xyxy: np.ndarray, header: ImageHeader) -> np.ndarray:
    """Map boxes drawn on the pixels as stored onto the upright image. (n, 4) pixels."""
    height, width = header.upright_hw
    x1, y1, x2, y2 = boxes_xyxy.T
    if header.orientation >= 5:
        x1, y1, x2, y2 = y1, x1, y2, x2
    if header.orientation in _MIRRORED:
        x1, x2 = width - x2, width - x1
    if header.orientation in _FLIPPED:
        y1, y2 = height - y2, height - y1
    return np.stack((x1, y1, x2, y2), axis=-1)


@contextmanager
def _as_user_error(path: str | PathLike) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        empty = Path(path).stat().st_size == 0
        what = "an empty file" if empty else "not an image, or of a kind that cannot be read"
        raise UserError(f"{path}: {what}") from None
    except _DECODE_ERRORS as error:
        raise UserError(f"{path}: cannot be decoded: {error}") from error


def _header(image: Image.Image) -> ImageHeader:
    # Pillow turns a TIFF upright itself on loading; a PNG may keep its EXIF behind the pixels.
    if image.format in ("TIFF", "PNG"):
        image.load()
    return ImageHeader((image.height, image.width), _orientation(image))


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(0x0112, 1)
    except (SyntaxError, ValueError, KeyError, IndexError, struct.error):
        return 1  # a damaged EXIF block does not spoil the image: viewers show it as stored
    return orientation if orientation in range(1, 9) else 1


def _decode_jpeg(data: bytes, reduction: int) -> np.ndarray | None:
    """By OpenCV (640 x 480: 1.0 ms, Pillow 1.6), as stored; None leaves it to Pillow.

    Without an end marker Pillow decides: older OpenCV pads a truncated JPEG without a word.
    """
    if b"\xff\xd9" not in data[-64:]:
        return None
    try:
        flags = _REDUCED_COLOR[reduction] | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None
    return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _decode_with_pillow(image: Image.Image) -> np.ndarray:
    image.load()
    if image.mode == "F" or image.mode.startswith("I"):
        grey = _to_8_bit(np.asarray(image))
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _to_8_bit(grey: np.ndarray) -> np.ndarray:
    """The upper 8 of 16 bits, as for 16-bit colours; Pillow's own conversion clips at 255."""
    if grey.dtype.kind == "f" or grey.min() < 0 or grey.max() > 65535:
        raise ValueError(f"{grey.dtype} grey values beyond 16 bits; save it with 8 or 16 bits")
    return (grey.astype(np.uint16) >> 8).astype(np.uint8)
