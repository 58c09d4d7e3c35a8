"""Backgrounds of the drawn sample: landscapes for the easy one, clutter for the hard one."""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike

from tools.sample_shapes import Colour, arc, hsv

# sky above, sky at the horizon, near hills, water
MOODS = (
    ((88, 160, 226), (206, 232, 246), (86, 142, 84), (72, 140, 182)),  # noon
    ((128, 150, 210), (252, 206, 168), (92, 104, 92), (126, 132, 172)),  # evening
    ((146, 190, 226), (244, 232, 204), (124, 146, 86), (108, 164, 186)),  # morning
    ((132, 154, 176), (212, 220, 226), (92, 120, 100), (104, 136, 150)),  # overcast
)


def blend(image: np.ndarray, colour: Sequence[float], weight: np.ndarray) -> None:
    """Mix a colour into an image, in place.

    Args:
        image: (H, W, 3) float32.
        weight: (H, W) in 0..1.
    """
    image += weight[..., None] * (np.array(colour, np.float32) - image)


def value_noise(rng: Generator, image_hw: tuple[int, int], cells_hw: tuple[int, int]) -> np.ndarray:
    """(H, W) float32 smooth noise, about -1..1: random values on a coarse grid, interpolated."""
    grid = rng.uniform(-1, 1, cells_hw).astype(np.float32)
    return cv2.resize(grid, image_hw[::-1], interpolation=cv2.INTER_CUBIC)


def vertical_gradient(top: ArrayLike, bottom: ArrayLike, image_hw: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) float32 from one colour to another."""
    share = np.linspace(0, 1, image_hw[0], dtype=np.float32)[:, None, None]
    row = (1 - share) * np.array(top, np.float32) + share * np.array(bottom, np.float32)
    return np.repeat(row, image_hw[1], axis=1)


def _sun(image: np.ndarray, rng: Generator, horizon: int) -> None:
    height, width = image.shape[:2]
    x, y = rng.uniform(0.1, 0.9) * width, rng.uniform(0.1, 0.8) * horizon
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    distance = np.hypot(columns - x, rows - y) / height
    blend(image, (255, 244, 214), 0.6 * np.exp(-((distance / 0.16) ** 2)))
    blend(image, (255, 250, 230), np.clip((0.045 - distance) * height, 0, 1))


def _clouds(image: np.ndarray, rng: Generator, horizon: int) -> None:
    height, width = image.shape[:2]
    cover = np.zeros((height, width), np.uint8)
    for _ in range(rng.integers(2, 6)):
        x, y = rng.uniform(0, width), rng.uniform(0.05, 0.8) * horizon
        reach = rng.uniform(0.06, 0.16) * width
        for _ in range(6):
            centre = (round(x + rng.normal() * reach / 2), round(y - rng.random() * reach / 5))
            radii = (round(reach * rng.uniform(0.3, 0.6)), round(reach * rng.uniform(0.1, 0.2)))
            cv2.ellipse(cover, centre, radii, 0, 0, 360, 255, -1)
    soft = cv2.GaussianBlur(cover, (0, 0), width / 90).astype(np.float32) / 255
    blend(image, (255, 253, 250), 0.75 * soft)


def _hills(
    image: np.ndarray, rng: Generator, *, horizon: int, colours: tuple[Colour, Colour]
) -> None:
    """Three ridges, from a hazy far one to a near one with firs."""
    height, width = image.shape[:2]
    columns = np.arange(width)
    for layer in range(3):
        ridge = sum(
            np.sin(columns / width * 2 * np.pi * rng.uniform(0.4, 1) * k + rng.uniform(0, 6.3)) / k
            for k in (1, 2, 4)
        )
        top = horizon - height * ((0.1, 0.055, 0.02)[layer] + (0.04, 0.025, 0.012)[layer] * ridge)
        near = (0.35, 0.65, 1.0)[layer]
        mixed = near * np.array(colours[0]) + (1 - near) * np.array(colours[1])
        weight = np.clip(np.arange(height)[:, None] - top, 0, 1).astype(np.float32)
        blend(image, tuple(mixed), weight)
    _firs(image, rng, ground=top, colour=colours[0])


def _firs(image: np.ndarray, rng: Generator, *, ground: np.ndarray, colour: Colour) -> None:
    height, width = image.shape[:2]
    cover = np.zeros((height, width), np.uint8)
    for x in rng.normal(rng.uniform(0, width), width / 5, rng.integers(5, 30)):
        size = height * rng.uniform(0.015, 0.045)
        foot = ground[int(np.clip(x, 0, width - 1))] + 3
        corners = [(x, foot - size), (x - size * 0.3, foot), (x + size * 0.3, foot)]
        fixed = np.round(np.array(corners) * 16).astype(np.int32)  # 4 fractional bits
        cv2.fillPoly(cover, [fixed], 255, cv2.LINE_AA, 4)
    blend(image, [0.62 * part for part in colour], cover.astype(np.float32) / 255)


def landscape(rng: Generator, image_hw: tuple[int, int], horizon: int) -> np.ndarray:
    """(H, W, 3) float32: sky, sun, clouds, hills, and water below row `horizon`."""
    sky, haze, hill, water = MOODS[rng.integers(len(MOODS))]
    image = vertical_gradient(sky, haze, image_hw)
    if rng.random() < 0.6:
        _sun(image, rng, horizon)
    _clouds(image, rng, horizon)
    _hills(image, rng, horizon=horizon, colours=(hill, haze))
    rows = image_hw[0] - horizon
    lake = vertical_gradient(np.add(water, haze) / 2, water, (rows, image_hw[1]))
    ripple = value_noise(rng, lake.shape[:2], (max(2, rows // 4), max(2, image_hw[1] // 40)))
    image[horizon:] = lake + 14 * ripple[..., None]
    return image * rng.uniform(0.92, 1.05) + value_noise(rng, image_hw, image_hw)[..., None] * 2


def _random_colour(rng: Generator) -> Colour:
    return hsv(rng.random(), rng.uniform(0.05, 0.7), rng.uniform(0.2, 0.95))


def _stripes(image: np.ndarray, rng: Generator) -> None:
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(8, 60)
    phase = (rows * np.sin(angle) + columns * np.cos(angle)) * (2 * np.pi / period)
    wave = np.sin(phase + 2 * value_noise(rng, image.shape[:2], (3, 4)))
    weight = np.clip(wave * rng.uniform(0.5, 4), 0, 1) * rng.uniform(0.3, 0.9)
    blend(image, _random_colour(rng), weight)


def _blobs(image: np.ndarray, rng: Generator) -> None:
    for _ in range(rng.integers(1, 4)):
        cells = int(rng.integers(4, 24))
        field = value_noise(rng, image.shape[:2], (cells, cells)) - rng.uniform(0, 0.4)
        blend(image, _random_colour(rng), np.clip(field * 12, 0, 1) * rng.uniform(0.4, 0.9))


def _scraps(image: np.ndarray, rng: Generator) -> None:
    """Random triangles, discs and lines: corners and curves like those of objects."""
    height, width = image.shape[:2]
    for _ in range(rng.integers(5, 30)):
        cover = np.zeros((height, width), np.uint8)
        centre = rng.uniform(0, (width, height))
        reach = rng.uniform(0.02, 0.15) * width
        kind = rng.integers(3)
        corners = centre + rng.uniform(-reach, reach, (3, 2))
        outline = corners if kind else arc(tuple(centre), (reach / 2, reach / 2))
        fixed = np.round(outline * 16).astype(np.int32)
        if kind == 1:
            thickness = int(rng.integers(1, 6))
            cv2.polylines(cover, [fixed], False, 255, thickness, cv2.LINE_AA, 4)
        else:
            cv2.fillPoly(cover, [fixed], 255, cv2.LINE_AA, 4)
        x, y, w, h = cv2.boundingRect(cover)
        patch = image[y : y + h, x : x + w]
        blend(patch, _random_colour(rng), cover[y : y + h, x : x + w].astype(np.float32) / 255)


def clutter(rng: Generator, image_hw: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) float32: a gradient under stripes, blobs, scraps and grain, each present or not."""
    image = vertical_gradient(_random_colour(rng), _random_colour(rng), image_hw)
    for paint, probability in ((_blobs, 0.7), (_stripes, 0.5), (_scraps, 0.7)):
        if rng.random() < probability:
            paint(image, rng)
    grain = value_noise(rng, image_hw, (image_hw[0] // 2, image_hw[1] // 2))
    return image + rng.uniform(0, 22) * grain[..., None]
