"""Training samples a second on one core: ours beside the original fork's method.

    python -m benchmarks.loader [--data VOCdevkit/MINE:train --classes_path FILE]

Mosaic, flip and HSV at 416 x 416, in one process without threads, from disk (warm file cache) and
from the in-memory cache, in alternating rounds. Ours takes the samples in an epoch's order, where
mosaics share their partners (data.sampler.EpochBlocks), so that it decodes an image once. Without
--data the images are drawn: 640 x 480 JPEG files of 68 kB.
"""

import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
import tyro

from benchmarks.fork_loader import mosaic_sample
from data.augment import scale_hsv
from data.dataset import VocDataset
from data.image import read_image, reduce, resize
from data.sampler import EpochBatchSampler
from data.voc import Sample, read_class_names, read_split
from utils.errors import run_script


@dataclasses.dataclass(frozen=True)
class Config:
    # Every line is a flag; its comment is the flag's help.
    data: str = ""  # a split, ROOT:SPLIT, in place of drawn images
    classes_path: str = ""  # its class names
    input_shape: tuple[int, int] = (416, 416)  # height, width in pixels
    images: int = 1000  # drawn ones
    samples: int = 100  # a round
    rounds: int = 7  # of each method
    boxes: int = 6  # an image
    # for benchmarks.original: one alone, as JSON
    variant: Literal["", "fork", "ours", "ours, cached"] = ""


IMAGE_HW = (480, 640)


def main() -> None:
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as folder:
        if config.data:
            samples = read_split(config.data, read_class_names(config.classes_path))
        else:
            samples = draw_images(Path(folder), config)
        rates = measure(methods(samples, config), config)
        if config.variant:
            print(json.dumps({"seconds": 1 / rates[config.variant]}))
            return
        parts = measure_parts(samples, config)
    fork = rates["fork"]
    for name, rate in rates.items():
        print(f"{name:18s} {rate:7.1f} samples/s   {rate / fork:5.2f} x the fork's")
    print(f"one decode, resizes and HSV {1e3 * (parts['decode'] + parts['draw']):.2f} ms")
    print(f"four resizes and HSV {1e3 * parts['draw']:.2f} ms")


def draw_images(folder: Path, config: Config) -> list[Sample]:
    """Textured JPEG images, about 68 kB each, as photographs of the size are."""
    rng = np.random.default_rng(0)
    samples = []
    for index in range(config.images):
        image = np.zeros((*IMAGE_HW, 3), np.float32)
        for cells, strength in ((4, 110), (16, 60), (64, 40), (256, 25)):
            noise = rng.random((cells * 3 // 4, cells, 3), dtype=np.float32) - 0.5
            image += strength * cv2.resize(noise, IMAGE_HW[::-1], interpolation=cv2.INTER_CUBIC)
        path = folder / f"{index}.jpg"
        pixels = (image + 128).clip(0, 255).astype(np.uint8)
        cv2.imwrite(str(path), pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])
        samples.append(label(path, rng, config.boxes))
    return samples


def label(path: Path, rng: np.random.Generator, count: int) -> Sample:
    """An image with random boxes."""
    height, width = IMAGE_HW
    centres = rng.uniform(0.1, 0.9, (count, 2)) * (width, height)
    sides = rng.uniform(0.02, 0.3, (count, 2)) * (width, height)
    boxes = np.concatenate((centres - sides / 2, centres + sides / 2), axis=1)
    return Sample(
        image_path=str(path),
        image_id=path.stem,
        image_hw=IMAGE_HW,
        class_ids=rng.integers(0, 3, count),
        boxes_xyxy=boxes.clip(0, (width, height) * 2).astype(np.float32),
        difficult=np.zeros(count, dtype=bool),
    )


def methods(samples: list[Sample], config: Config) -> dict[str, Callable[[int], object]]:
    """What makes sample number i, by name."""
    makers = {
        "fork": lambda: fork_method(samples, config),
        "ours": lambda: our_method(samples, config, cache=False),
        "ours, cached": lambda: our_method(samples, config, cache=True),
    }
    wanted = (config.variant,) if config.variant else tuple(makers)
    return {name: makers[name]() for name in wanted}


def fork_method(samples: list[Sample], config: Config) -> Callable[[int], object]:
    plain = [
        (Path(s.image_path), np.c_[s.boxes_xyxy, s.class_ids].astype(np.float64)) for s in samples
    ]
    rng = np.random.default_rng(0)

    def make(index: int) -> object:
        others = rng.integers(len(plain), size=3)
        items = [plain[i] for i in (index % len(plain), *others)]
        return mosaic_sample(items, config.input_shape, rng)

    return make


def our_method(samples: list[Sample], config: Config, *, cache: bool) -> Callable[[int], object]:
    """Training's next sample: a mosaic takes its partners from what comes at about its time."""
    train_set = VocDataset(
        samples, config.input_shape, train=True, mosaic_prob=1, mixup_prob=0, cache=cache
    )

    def in_epochs() -> Iterator[object]:
        sampler = EpochBatchSampler(len(train_set), 1)
        for epoch in itertools.count():
            train_set.set_epoch(epoch)
            sampler.set_epoch(epoch)
            for (index,) in sampler:
                yield train_set[index]

    endless = in_epochs()
    return lambda _: next(endless)


def measure_parts(samples: list[Sample], config: Config) -> dict[str, float]:
    """Fastest seconds for the parts of a mosaic that take no choice: one file decoded and halved,
    four quadrants resized from as many pixels each, HSV gains."""
    path = samples[0].image_path
    half = reduce(read_image(path), 2)
    height, width = config.input_shape
    canvas = np.zeros((*config.input_shape, 3), np.uint8)

    def draw() -> None:
        for _ in range(4):
            resize(half, (height // 2, width // 2))
        scale_hsv(canvas, (1.1, 0.8, 1.2))

    calls = {"decode": lambda: reduce(read_image(path), 2), "draw": draw}
    return {name: min(timed(call) for _ in range(50)) for name, call in calls.items()}


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(methods: dict[str, Callable[[int], object]], config: Config) -> dict[str, float]:
    """Median samples a second, from rounds in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(config.rounds + 1):  # the first warms up
        for name, make in methods.items():
            start = time.perf_counter()
            for index in range(config.samples):
                make(index)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: config.samples / statistics.median(times) for name, times in seconds.items()}


if __name__ == "__main__":
    run_script(main)
