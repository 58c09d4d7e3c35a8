"""Antialiased drawing in unit coordinates, for the objects of the drawn sample."""

import colorsys
import dataclasses
import math
from collections.abc import Sequence

import cv2
import numpy as np

Colour = tuple[int, int, int]
Points = Sequence[tuple[float, float]]
VISIBLE_ALPHA = 0.3  # a pixel belongs to an object from this coverage on: its box is tight to it


@dataclasses.dataclass(frozen=True)
class Sprite:
    """A drawn thing: colour premultiplied by coverage.

    Attributes:
        rgb: (h, w, 3) float32 in 0..255.
        alpha: (h, w) float32 in 0..1.
    """

    rgb: np.ndarray
    alpha: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """(h, w) bool: the pixels that count as the object's own."""
        return self.alpha >= VISIBLE_ALPHA


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """RGB 0..255 of a hue (any float, the colour circle is 1 long), saturation and value 0..1."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def shade(colour: Colour, factor: float) -> Colour:
    """Darker below factor 1, lighter above."""
    red, green, blue = colour
    return (
        min(255, round(red * factor)),
        min(255, round(green * factor)),
        min(255, round(blue * factor)),
    )


def arc(
    centre: tuple[float, float],
    radii: tuple[float, float],
    sweep: tuple[float, float] = (0, 360),
) -> np.ndarray:
    """(49, 2) points of an elliptic arc.

    Args:
        sweep: Degrees, clockwise on screen from the right.
    """
    angles = np.radians(np.linspace(*sweep, 49))
    return np.stack((np.cos(angles), np.sin(angles)), axis=1) * radii + centre


def rounded_box(box_xyxy: tuple[float, float, float, float], radius: float) -> np.ndarray:
    """(196, 2) points of a rectangle with round corners."""
    x1, y1, x2, y2 = box_xyxy
    left, top, right, bottom = x1 + radius, y1 + radius, x2 - radius, y2 - radius
    centres = ((right, bottom), (left, bottom), (left, top), (right, top))
    corners = [
        arc(centre, (radius, radius), (90 * index, 90 * index + 90))
        for index, centre in enumerate(centres)
    ]
    return np.concatenate(corners)


class Sketch:
    """A transparent sheet on which x and y run from -1 to 1, y downwards.

    It is drawn several times larger and averaged down, so that edges are smooth.

    Args:
        size: Pixels of the length 2.
        angle: Degrees, clockwise.
        stretch: Factor on x; negative mirrors.
    """

    def __init__(self, size: float, *, angle: float = 0.0, stretch: float = 1.0):
        self.factor = int(np.clip(400 // size, 2, 8))
        # 1.7 leaves room for a turned, stretched square: sqrt(2) * 1.15 and a stroke's half width
        self.half = math.ceil(1.7 * size / 2)
        self.scale = size / 2 * self.factor
        turn = math.radians(angle)
        rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        self.matrix = rotation @ np.diag([stretch, 1.0]) * self.scale
        side = 2 * self.half * self.factor
        self.canvas = np.zeros((side, side, 4), np.uint8)

    def _pixels(self, points: Points | np.ndarray) -> np.ndarray:
        pixels = np.asarray(points, np.float64) @ self.matrix.T + self.half * self.factor
        return np.round(pixels).astype(np.int32)[:, None]

    def fill(self, points: Points | np.ndarray, colour: Colour) -> None:
        """Fill a polygon."""
        cv2.fillPoly(self.canvas, [self._pixels(points)], (*colour, 255))

    def ellipse(
        self, centre: tuple[float, float], radii: tuple[float, float], colour: Colour
    ) -> None:
        """Fill an ellipse along the axes."""
        self.fill(arc(centre, radii), colour)

    def stroke(self, points: Points | np.ndarray, width: float, colour: Colour) -> None:
        """Draw an open line of some width, with round ends."""
        thickness = max(1, round(width * self.scale))
        cv2.polylines(self.canvas, [self._pixels(points)], False, (*colour, 255), thickness)

    def sprite(self, light: float = 0.12) -> Sprite:
        """Average down, crop to what was drawn, light it from the upper left.

        Args:
            light: Relative brightening at the lit corner and darkening at the other.
        """
        side = 2 * self.half
        sheet = cv2.resize(self.canvas, (side, side), interpolation=cv2.INTER_AREA)
        rows, columns = (np.flatnonzero(sheet[..., 3].any(axis)) for axis in (1, 0))
        sheet = sheet[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)
        down = np.linspace(light, -light, sheet.shape[0], dtype=np.float32)[:, None]
        across = np.linspace(light, -light, sheet.shape[1], dtype=np.float32)
        lit = sheet[..., :3] * (1 + (down + across) / 2)[..., None]
        return Sprite(lit, sheet[..., 3] / 255)
