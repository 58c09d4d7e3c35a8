"""Objects of the drawn sample: three for landscapes, seven with look-alikes for clutter."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.random import Generator

from tools.sample_shapes import Colour, Sketch, arc, hsv, rounded_box, shade

CREAM = (250, 246, 232)
DARK = (48, 42, 46)
WOOD = (134, 88, 52)


def balloon(sketch: Sketch, rng: Generator) -> None:
    """A hot-air balloon: striped gores, skirt, ropes, basket."""
    crown = arc((0, -0.3), (0.7, 0.7), (-90, 30))
    neck = np.linspace(crown[-1], (0.16, 0.5), 12)
    side = np.concatenate((crown, neck))  # the right outline, from the top down
    hue = rng.uniform(-0.05, 0.12)
    colours = (hsv(hue, 0.85, 0.95), CREAM if rng.random() < 0.5 else hsv(hue + 0.09, 0.75, 1.0))
    for x in (-0.14, 0.14):
        sketch.stroke([(x, 0.5), (x * 0.8, 0.75)], 0.03, DARK)
    edges = np.sin(np.radians(np.linspace(-90, 90, 8)))
    for index, (left, right) in enumerate(pairwise(edges)):
        gore = np.concatenate((side * (left, 1), (side * (right, 1))[::-1]))
        sketch.fill(gore, shade(colours[index % 2], 1 - 0.05 * index))
    sketch.fill([(-0.16, 0.48), (0.16, 0.48), (0.13, 0.58), (-0.13, 0.58)], shade(colours[0], 0.6))
    sketch.fill(rounded_box((-0.17, 0.73, 0.17, 1.0), 0.05), WOOD)
    sketch.stroke([(-0.16, 0.76), (0.16, 0.76)], 0.06, shade(WOOD, 1.4))


def kite(sketch: Sketch, rng: Generator) -> None:
    """A diamond of four panels with spars and a tail of bows."""
    hue = rng.uniform(0.45, 0.9)
    colours = (hsv(hue, 0.75, 0.95), hsv(hue + rng.choice([-0.12, 0.15]), 0.65, 1.0))
    corners = top, right, bottom, left = (0, -1), (0.62, -0.35), (0, 0.45), (-0.62, -0.35)
    steps = np.linspace(0, 1, 24)
    tail = np.stack((0.12 * np.sin(steps * 8), 0.45 + 0.53 * steps), axis=1)
    sketch.stroke(tail, 0.035, DARK)
    for x, y in tail[[9, 20]]:
        sketch.fill([(x, y), (x - 0.14, y - 0.08), (x - 0.14, y + 0.08)], colours[0])
        sketch.fill([(x, y), (x + 0.14, y - 0.08), (x + 0.14, y + 0.08)], colours[1])
    for index, (start, stop) in enumerate(pairwise((*corners, top))):
        sketch.fill([start, stop, (0, -0.35)], shade(colours[index % 2], 1 if index < 2 else 0.85))
    sketch.stroke([top, bottom], 0.03, DARK)
    sketch.stroke([left, right], 0.03, DARK)


def sailboat(sketch: Sketch, rng: Generator) -> None:
    """A hull with a stripe, a mast with a pennant, main sail and jib, a bow wave."""
    sail = CREAM if rng.random() < 0.6 else hsv(rng.uniform(0.1, 0.16), 0.45, 1.0)
    hull = (hsv(0.62, 0.6, 0.4), hsv(0.0, 0.7, 0.6), WOOD)[rng.integers(3)]
    leech = arc((0.05, 0.4), (0.68, 1.25), (0, -90))
    sketch.fill([*leech, (0.05, 0.4)], sail)
    sketch.fill([(-0.08, -0.72), (-0.08, 0.4), (-0.66, 0.4), (-0.36, -0.05)], shade(sail, 0.88))
    sketch.stroke([(0, 0.5), (0, -0.97)], 0.05, WOOD)
    sketch.fill([(0, -1), (0.24, -0.92), (0, -0.84)], hsv(rng.random(), 0.8, 0.9))
    sketch.fill([(-0.95, 0.46), (0.85, 0.46), (0.66, 0.9), (-0.6, 0.9)], hull)
    sketch.stroke([(-0.86, 0.55), (0.8, 0.55)], 0.07, CREAM)
    steps = np.linspace(0, 1, 20)
    wave = np.stack((-0.75 + 1.55 * steps, 0.9 + 0.03 * np.sin(steps * 25)), axis=1)
    sketch.stroke(wave, 0.09, (238, 246, 250))


def _paint(rng: Generator) -> Colour:
    return hsv(rng.random(), rng.uniform(0.15, 0.85), rng.uniform(0.35, 0.95))


def mug(sketch: Sketch, rng: Generator, whole: bool = True) -> None:
    """A mug; its look-alike has no handle."""
    paint = _paint(rng)
    if whole:
        sketch.stroke(arc((0.4, 0.05), (0.42, 0.42), (-90, 90)), 0.18, shade(paint, 0.85))
    sketch.fill([(-0.8, -0.7), (0.5, -0.7), (0.38, 0.9), (-0.68, 0.9)], paint)
    sketch.ellipse((-0.15, 0.88), (0.53, 0.12), paint)
    sketch.ellipse((-0.15, -0.7), (0.65, 0.2), shade(paint, 1.25))
    sketch.ellipse((-0.15, -0.68), (0.54, 0.14), shade(paint, 0.45))


def fish(sketch: Sketch, rng: Generator, whole: bool = True) -> None:
    """A fish; its look-alike has no tail."""
    paint = _paint(rng)
    if whole:
        sketch.fill([(0.35, 0), (1, -0.5), (0.82, 0), (1, 0.5)], shade(paint, 0.75))
    sketch.fill([(-0.35, -0.3), (0.05, -0.72), (0.3, -0.2)], shade(paint, 0.75))
    sketch.ellipse((-0.2, 0), (0.75, 0.45), paint)
    sketch.fill([(-0.15, 0.08), (0.2, -0.1), (0.2, 0.28)], shade(paint, 0.6))
    sketch.ellipse((-0.62, -0.1), (0.1, 0.1), CREAM)
    sketch.ellipse((-0.63, -0.1), (0.05, 0.05), DARK)


PIPS = {
    1: [(0, 0)],
    2: [(-1, -1), (1, 1)],
    3: [(-1, -1), (0, 0), (1, 1)],
    4: [(-1, -1), (1, 1), (-1, 1), (1, -1)],
    5: [(-1, -1), (1, 1), (-1, 1), (1, -1), (0, 0)],
    6: [(-1, -1), (1, 1), (-1, 1), (1, -1), (-1, 0), (1, 0)],
}


def die(sketch: Sketch, rng: Generator, whole: bool = True) -> None:
    """One face of a die; its look-alike has no pips."""
    paint = _paint(rng)
    pip = DARK if sum(paint) > 380 else CREAM
    sketch.fill(rounded_box((-0.8, -0.8, 0.8, 0.8), 0.25), shade(paint, 0.7))
    sketch.fill(rounded_box((-0.72, -0.72, 0.72, 0.72), 0.25), paint)
    for x, y in PIPS[int(rng.integers(1, 7))] if whole else ():
        sketch.ellipse((0.42 * x, 0.42 * y), (0.15, 0.15), pip)


def key(sketch: Sketch, rng: Generator, whole: bool = True) -> None:
    """A key; its look-alike has no teeth."""
    paint = _paint(rng)
    sketch.stroke(arc((-0.6, 0), (0.28, 0.28)), 0.17, paint)
    sketch.stroke([(-0.3, 0), (0.92, 0)], 0.15, paint)
    for x, length in ((0.5, 0.3), (0.7, 0.22), (0.9, 0.34)) if whole else ():
        sketch.stroke([(x, 0), (x, length)], 0.11, paint)


def button(sketch: Sketch, rng: Generator, whole: bool = True) -> None:
    """A button; its look-alike has no holes."""
    paint = _paint(rng)
    sketch.ellipse((0, 0), (0.9, 0.9), shade(paint, 0.7))
    sketch.ellipse((0, 0), (0.8, 0.8), paint)
    sketch.stroke(arc((0, 0), (0.58, 0.58)), 0.05, shade(paint, 0.75))
    for x, y in PIPS[4] if whole else ():
        sketch.ellipse((0.2 * x, 0.2 * y), (0.11, 0.11), shade(paint, 0.25))


def clock(sketch: Sketch, rng: Generator, whole: bool = True) -> None:
    """A clock; its look-alike has no hands."""
    paint = _paint(rng)
    sketch.ellipse((0, 0), (0.92, 0.92), shade(paint, 0.7))
    sketch.ellipse((0, 0), (0.76, 0.76), CREAM)
    for angle in np.radians(np.arange(0, 360, 30)):
        tick = np.array([np.cos(angle), np.sin(angle)])
        sketch.stroke([tuple(tick * 0.6), tuple(tick * 0.7)], 0.05, DARK)
    for length, width in ((0.38, 0.1), (0.55, 0.07)) if whole else ():
        angle = rng.uniform(0, 2 * np.pi)
        sketch.stroke([(0, 0), (length * np.cos(angle), length * np.sin(angle))], width, DARK)


def umbrella(sketch: Sketch, rng: Generator, whole: bool = True) -> None:
    """An umbrella; its look-alike has no stick."""
    paint = _paint(rng)
    if whole:
        hook = arc((-0.16, 0.75), (0.16, 0.18), (0, 180))
        sketch.stroke([(0, -0.5), (0, 0.75), *map(tuple, hook)], 0.09, DARK)
    sketch.stroke([(0, -0.98), (0, -0.8)], 0.07, DARK)
    dome = arc((0, 0), (0.95, 0.9), (-180, 0))
    for panel, factor in ((1.0, 1.0), (0.4, 0.7)):
        sketch.fill(dome * (panel, 1), shade(paint, factor))
    for x, factor in ((-0.66, 1.0), (0, 0.7), (0.66, 1.0)):
        sketch.ellipse((x, 0), (0.29 if x else 0.38, 0.1), shade(paint, factor))


LANDSCAPE: dict[str, Callable] = {"balloon": balloon, "kite": kite, "sailboat": sailboat}
CLUTTER: dict[str, Callable] = {  # from the most frequent to the rarest
    "mug": mug,
    "fish": fish,
    "die": die,
    "key": key,
    "button": button,
    "clock": clock,
    "umbrella": umbrella,
}
