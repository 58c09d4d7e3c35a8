"""Training fed by the loader against the same steps on one batch: does the loader keep up?

    python -m benchmarks.epoch --device cuda --batch_size 64 --num_workers 16 --amp bf16 \\
        --data VOCdevkit/BCCD:train --classes_path VOCdevkit/BCCD/classes.txt --cache
    python -m benchmarks.epoch --width 0.1 --depth 0.1 --steps 5   # a small run on the CPU

The data set's first epoch is repeated until it fills all steps: without --cache a worker may still
have small data sets decoded. Without --data 400 images are drawn.
"""

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import tyro
from torch import Tensor

from benchmarks.loader import Config as LoaderConfig
from benchmarks.loader import draw_images
from benchmarks.loss import synchronize
from data.dataset import VocDataset
from data.loader import TrainingLoader
from data.sampler import BLOCK, EpochBatchSampler
from data.voc import Sample, read_class_names, read_split
from engine.optimizer import Ema, build_optimizer
from engine.settings import amp_dtype
from engine.trainer import TrainStep
from losses.yolo_loss import YOLOLoss
from nets.memory import move
from nets.yolo import YoloV4
from tests.reference_loss import ANCHORS
from utils.errors import UserError, run_script


@dataclasses.dataclass(frozen=True)
class Config:
    # Every line is a flag; its comment is the flag's help.
    device: str = "cpu"  # cpu or cuda
    data: str = ""  # a split, ROOT:SPLIT, in place of drawn images
    classes_path: str = ""  # its class names
    width: float = 1.0
    depth: float = 1.0
    batch_size: int = 8  # images
    input_shape: tuple[int, int] = (416, 416)  # height, width in pixels
    num_workers: int = 2
    cache: bool = False  # decoded images in memory
    amp: str = "off"  # off, bf16 or fp16
    warm_up: int = 3  # steps before the clock starts
    steps: int = 100  # timed ones


def main() -> None:
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device. Use --device cpu.")
    with tempfile.TemporaryDirectory() as folder:
        samples, classes = find_samples(config, Path(folder))
        step = make_step(config, classes)
        batches = iter(make_loader(config, samples))
        first = next(batches)
        alone = rate(step, itertools.repeat(first), config, warm_up=config.warm_up)
        loaded = rate(step, batches, config, warm_up=config.warm_up + in_store(config))
    print(f"{config}, torch {torch.__version__}")
    print(f"one batch again and again {alone:8.1f} images/s")
    print(f"from the loader           {loaded:8.1f} images/s")
    print(f"ratio {loaded / alone:.3f} (loader / one batch)")


def find_samples(config: Config, folder: Path) -> tuple[list[Sample], int]:
    """The data set and its number of classes."""
    if not config.data:
        return draw_images(folder, LoaderConfig(images=400)), 3
    names = read_class_names(config.classes_path)
    return read_split(config.data, names), len(names)


class RepeatedEpoch(EpochBatchSampler):
    """The first epoch again and again, `steps` batches in all."""

    def __init__(self, length: int, batch_size: int, *, steps: int):
        super().__init__(length, batch_size)
        self.steps = steps

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(itertools.cycle(list(super().__iter__())), self.steps)


def make_loader(config: Config, samples: list[Sample]) -> TrainingLoader:
    """As train.py makes it, with batches for all steps."""
    total = 1 + in_store(config) + config.warm_up + config.steps
    train_set = VocDataset(samples, config.input_shape, train=True, cache=config.cache)
    return TrainingLoader(
        train_set,
        RepeatedEpoch(len(samples), config.batch_size, steps=total),
        num_workers=config.num_workers,
        for_gpu=config.device == "cuda",
    )


def make_step(config: Config, classes: int) -> TrainStep:
    device = torch.device(config.device)
    model = YoloV4(classes, width=config.width, depth=config.depth)
    move(model, device).train()
    return TrainStep(
        model=model,
        loss=YOLOLoss(ANCHORS, classes, config.input_shape).to(device),
        optimizer=build_optimizer("sgd", model),
        ema=Ema(model, 0.9998),
        device=device,
        amp_dtype=amp_dtype(config.amp, device),
        clip_norm=10.0,
    )


def in_store(config: Config) -> int:
    """Batches that the workers may have ready before the clock starts: they do not count."""
    return 2 * config.num_workers * max(1, BLOCK // config.batch_size)


def rate(
    step: TrainStep, batches: Iterable[tuple[Tensor, Tensor]], config: Config, *, warm_up: int
) -> float:
    """Images a second, after the warm-up."""
    for number, batch in enumerate(itertools.islice(batches, warm_up + config.steps)):
        if number == warm_up:
            synchronize(step.device)
            start = time.perf_counter()
        step(*batch)
    synchronize(step.device)
    return config.steps * config.batch_size / (time.perf_counter() - start)


if __name__ == "__main__":
    run_script(main)
