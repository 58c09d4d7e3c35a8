"""Backgrounds of the drawn sample, and objects put into them with exact boxes."""

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.random import Generator

from tools.sample_backgrounds import clutter, landscape
from tools.sample_objects import CLUTTER, LANDSCAPE
from tools.sample_shapes import Sketch, Sprite

MIN_SHOWN = 0.35  # an object shows at least this share of itself, or it is put elsewhere
DIFFICULT_SHOWN = 0.5  # showing less than this share makes an object difficult
MIN_PIXELS = 14  # fewer visible pixels are no object
DIFFICULT_SIDE = 7  # a box whose longer side is below this is difficult
TRIES = 60  # then the image is full; in 600 images no object was left out


@dataclasses.dataclass(frozen=True)
class Placement:
    """A sprite at a pixel position; `name` is its class, or None for a look-alike."""

    name: str | None
    sprite: Sprite
    left: int
    top: int


@dataclasses.dataclass(frozen=True)
class SampleObject:
    """The annotation of an object; `box_xyxy` has the edges of its visible pixels."""

    name: str
    box_xyxy: tuple[int, int, int, int]
    truncated: bool
    difficult: bool


def clip_to_image(placement: Placement, image_hw: tuple[int, int]) -> tuple[tuple, tuple]:
    """Slices (rows, columns) of the image that a sprite covers, and those of the sprite."""
    inside, own = [], []
    starts = (placement.top, placement.left)
    for start, length, limit in zip(starts, placement.sprite.alpha.shape, image_hw, strict=True):
        low, high = min(max(start, 0), limit), max(min(start + length, limit), 0)
        inside.append(slice(low, high))
        own.append(slice(low - start, high - start))
    return tuple(inside), tuple(own)


class Scene:
    """A background with sprites on it; knows which pixel shows which sprite.

    Args:
        background: (H, W, 3) float32 RGB in 0..255.
    """

    def __init__(self, background: np.ndarray):
        self.background = background
        self.image_hw: tuple[int, int] = (background.shape[0], background.shape[1])
        self.placements: list[Placement] = []
        self.owner = np.full(self.image_hw, -1, np.int32)

    def try_place(self, placement: Placement, min_shown: float) -> bool:
        """Put a sprite on top; False if it or one below would then show less than `min_shown`."""
        inside, own = clip_to_image(placement, self.image_hw)
        mask = placement.sprite.mask[own]
        if mask.sum() < max(MIN_PIXELS, min_shown * placement.sprite.mask.sum()):
            return False
        before = self.owner[inside].copy()
        self.owner[inside][mask] = len(self.placements)
        for index in np.unique(before[mask]):
            if index >= 0 and self.shown(index) < min_shown:
                self.owner[inside] = before
                return False
        self.placements.append(placement)
        return True

    def shown(self, index: int) -> float:
        """Share of a sprite's pixels that are inside the image and not covered."""
        visible = np.count_nonzero(self.owner == index)
        return visible / self.placements[index].sprite.mask.sum() * (visible >= MIN_PIXELS)

    def objects(self) -> list[SampleObject]:
        """Annotations of all objects: boxes tight around what shows of each."""
        found = []
        for index, placement in enumerate(self.placements):
            if placement.name is None:
                continue
            visible = self.owner == index
            rows, columns = (np.flatnonzero(visible.any(axis)) for axis in (1, 0))
            box = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
            _, own = clip_to_image(placement, self.image_hw)
            truncated = bool(placement.sprite.mask[own].sum() < placement.sprite.mask.sum())
            tiny = max(box[2] - box[0], box[3] - box[1]) < DIFFICULT_SIDE
            difficult = bool(tiny or self.shown(index) < DIFFICULT_SHOWN)
            found.append(SampleObject(placement.name, box, truncated, difficult))
        return found


def compose(background: np.ndarray, placements: Sequence[Placement]) -> np.ndarray:
    """Lay the sprites over the background, first one lowest. (H, W, 3) float32 in 0..255."""
    image = background.copy()
    for placement in placements:
        inside, own = clip_to_image(placement, (image.shape[0], image.shape[1]))
        image[inside] *= 1 - placement.sprite.alpha[own][..., None]
        image[inside] += placement.sprite.rgb[own]
    return image


def image_size(rng: Generator) -> tuple[int, int]:
    """(height, width): the longer side 320 to 480 pixels, a quarter of the images portrait."""
    long_side = int(rng.integers(320, 481))
    short_side = round(long_side * rng.uniform(0.66, 0.85))
    return (long_side, short_side) if rng.random() < 0.25 else (short_side, long_side)


def _overlaps(scene: Scene, placement: Placement) -> bool:
    """True if the sprite's rectangle, with a small margin, meets another or leaves the image."""
    height, width = placement.sprite.alpha.shape
    top, left = placement.top - 4, placement.left - 4
    bottom, right = placement.top + height + 4, placement.left + width + 4
    if min(top, left) < 0 or bottom > scene.image_hw[0] or right > scene.image_hw[1]:
        return True
    return bool((scene.owner[top:bottom, left:right] >= 0).any())


def _place_in_landscape(scene: Scene, name: str, *, horizon: int, rng: Generator) -> None:
    """Boats float, balloons and kites fly; nothing touches. Smaller after each failed try."""
    height, width = scene.image_hw
    for attempt in range(TRIES):
        share = 0.09 * (0.42 / 0.09) ** rng.random() * 0.98**attempt
        size = max(0.085, share) * max(height, width)
        tilt = {"balloon": 6, "kite": 30, "sailboat": 5}[name]
        stretch = rng.uniform(0.9, 1.1) * rng.choice([-1, 1])
        sketch = Sketch(size, angle=rng.uniform(-tilt, tilt), stretch=stretch)
        LANDSCAPE[name](sketch, rng)
        sprite = sketch.sprite()
        rows, columns = sprite.alpha.shape
        highest, lowest = (horizon + 6, height) if name == "sailboat" else (rows, horizon)
        if highest > lowest or columns > width:
            continue  # no room at this size
        foot = rng.uniform(highest, lowest)
        left = rng.uniform(0, width - columns)
        placement = Placement(name, sprite, round(left), round(foot) - rows)
        if not _overlaps(scene, placement) and scene.try_place(placement, 1.0):
            return


def _place_in_clutter(scene: Scene, name: str, *, whole: bool, rng: Generator) -> None:
    """Any size, angle and overlap, as long as enough of everything shows."""
    height, width = scene.image_hw
    smallest = 0.02 if whole else 0.08  # a smaller look-alike cannot be told from the real thing
    for _ in range(TRIES):
        size = smallest * (0.6 / smallest) ** rng.beta(1.4, 1.5) * max(height, width)
        stretch = rng.uniform(0.85, 1.15) * rng.choice([-1, 1])
        sketch = Sketch(size, angle=rng.normal() * 35, stretch=stretch)
        CLUTTER[name](sketch, rng, whole)
        sprite = sketch.sprite(light=rng.uniform(0, 0.4))
        rows, columns = sprite.alpha.shape
        left = round(rng.uniform(-columns / 2, width - columns / 2))
        top = round(rng.uniform(-rows / 2, height - rows / 2))
        if scene.try_place(Placement(name if whole else None, sprite, left, top), MIN_SHOWN):
            return


def landscape_scene(names: Sequence[str], rng: Generator) -> Scene:
    """An easy image: a lake under a wide sky, with the named objects apart from each other."""
    image_hw = image_size(rng)
    horizon = round(image_hw[0] * rng.uniform(0.62, 0.76))
    scene = Scene(landscape(rng, image_hw, horizon))
    for name in names:
        _place_in_landscape(scene, name, horizon=horizon, rng=rng)
    return scene


def clutter_scene(names: Sequence[str], rng: Generator) -> Scene:
    """A hard image: the named objects among look-alikes, some covering others."""
    scene = Scene(clutter(rng, image_size(rng)))
    fakes = list(rng.choice(list(CLUTTER), rng.integers(0, 5)))
    things = [(name, True) for name in names] + [(name, False) for name in fakes]
    for index in rng.permutation(len(things)):
        name, whole = things[index]
        _place_in_clutter(scene, name, whole=whole, rng=rng)
    return scene


def expose(image: np.ndarray, rng: Generator) -> np.ndarray:
    """A hard image as a poor camera sees it: blur, brightness, contrast, sensor noise."""
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.6))
    image = (image - 128) * rng.uniform(0.6, 1.15) + 128
    image = image * rng.uniform(0.65, 1.35)
    return image + rng.normal(size=image.shape) * rng.uniform(0, 9)
