"""One evaluation for training and evaluate.py: a pass over images, then average precision."""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.dataset import VocDataset, init_worker
from data.letterbox import letterbox_to_image
from data.loader import collate, to_input
from data.voc import Sample
from losses.conf.cells import CellHistogram
from metrics.nms import non_max_suppression
from metrics.scoring import EVAL_CONF_THRESHOLD, EVAL_NMS_IOU, Evaluation, score_detections
from nets.decode import decode
from utils.distributed import gather_objects, rank, world_size
from utils.errors import UserError

LOSS_TERMS = ("total", "loc", "conf", "cls")


@torch.no_grad()  # not inference_mode: a loss may cache a tensor here that training then uses
def evaluate(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    class_names: Sequence[str],
    anchors: Sequence[Sequence[float]],
    input_shape: tuple[int, int],
    scale_xy: Sequence[float],
    device: torch.device,
    loss: nn.Module | None = None,
    **options: Any,
) -> Evaluation:
    """Detect on all images and score the boxes.

    In float32 whatever the training's or the detection's precision: one mAP for a network, in
    training and afterwards. Under torchrun every rank calls this, takes its share and returns the
    same. The modes of model and loss are as before afterwards.

    Args:
        anchors: Nine (w, h) in pixels of the input.
        input_shape: (height, width) in pixels.
        loss: A YOLOLoss, whose mean terms and cells are added, from the same forward.
        **options: batch_size, num_workers and progress, as `forward_batches` takes them.

    Raises:
        UserError: Without images.
    """
    started = time.perf_counter()
    detections: list[np.ndarray] = []
    highest, means = torch.zeros((), device=device), LossMeans(device)
    options |= {"input_shape": input_shape, "device": device}
    with evaluating(model, loss):
        for batch, outputs, targets in forward_batches(model, _share(samples), **options):
            decoded = decode(outputs, anchors, input_shape, scale_xy)
            highest = torch.maximum(highest, (decoded[..., 4] * decoded[..., 5:].amax(-1)).amax())
            kept = non_max_suppression(decoded, EVAL_CONF_THRESHOLD, EVAL_NMS_IOU)
            detections += in_image_pixels(kept, batch, input_shape)
            if loss is not None:
                means.add(loss(outputs, targets, cells=True), len(batch))
    merged, seconds = _gather_images(detections, len(samples)), time.perf_counter() - started
    return dataclasses.replace(
        score_detections(samples, merged, class_names),
        highest_score=float(np.max(gather_objects(highest.item()))),
        losses=means.result() if loss is not None else {},
        cells=means.histogram() if loss is not None else None,
        seconds=seconds,
    )


def forward_batches(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    input_shape: tuple[int, int],
    device: torch.device,
    batch_size: int = 8,
    num_workers: int = 0,
    progress: bool = True,
) -> Iterator[tuple[Sequence[Sample], Sequence[Tensor], Tensor]]:
    """Per batch, in order: its samples, the network's raw maps and the targets."""
    loader = DataLoader(
        VocDataset(samples, input_shape, train=False),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=init_worker,
        pin_memory=device.type == "cuda",
    )
    bar = tqdm(loader, desc="validating", unit="batch", leave=False, disable=not progress)
    for index, (images, targets) in enumerate(bar):
        outputs = model(to_input(images, device))  # float32: the mAP of training and afterwards
        first = index * batch_size
        yield samples[first : first + batch_size], outputs, targets.to(device, non_blocking=True)


@contextmanager
def evaluating(*modules: nn.Module | None) -> Iterator[None]:
    """Eval mode within the block; afterwards every submodule has its own mode again.

    `module.train()` would be wrong: in the freeze phase the backbone stays in eval mode.
    """
    parts = [part for module in modules if module is not None for part in module.modules()]
    modes = [(part, part.training) for part in parts]
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


class LossMeans:
    """Mean loss terms over images, and the cells, summed on the device and read once."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(len(LOSS_TERMS), device=device)
        self.images = 0
        self.cells = CellHistogram(device)

    def add(self, terms: Mapping[str, Any], images: int) -> None:
        """Add a batch of `images`: what YOLOLoss returned, with or without "cells"."""
        self.sums += torch.stack([terms[name].float() for name in LOSS_TERMS]) * images
        self.images += images
        if "cells" in terms:
            # Weighted by the images, too: the cells of a smaller last batch count no more.
            cells = terms["cells"]
            self.cells.add(cells._replace(losses=cells.losses * images))

    def result(self) -> dict[str, float]:
        """Means over all ranks, each of which has seen equally many images."""
        means = np.mean(gather_objects(self.sums.tolist()), axis=0) / self.images
        return dict(zip(LOSS_TERMS, means.tolist(), strict=True))

    def histogram(self) -> dict[str, Any]:
        """The cells of all ranks, as CellHistogram.to_json returns them."""
        joint = CellHistogram()
        own = torch.stack((self.cells.counts, self.cells.losses)).cpu()
        joint.counts, joint.losses = sum(gather_objects(own))
        return joint.to_json()


def in_image_pixels(
    detections: Sequence[Tensor], samples: Sequence[Sample], input_shape: tuple[int, int]
) -> list[np.ndarray]:
    """A batch's detections, (n, 6) each, on the CPU and in pixels of the original images."""
    counts = [len(rows) for rows in detections]
    on_cpu = torch.cat(list(detections)).cpu().split(counts)  # one transfer per batch
    return [
        torch.cat(
            (letterbox_to_image(rows[:, :4], input_shape, sample.image_hw), rows[:, 4:]), dim=1
        ).numpy()
        for rows, sample in zip(on_cpu, samples, strict=True)
    ]


def _share(samples: Sequence[Sample]) -> Sequence[Sample]:
    """This rank's images: every world_size-th.

    All ranks get equally many, because the loss is a collective call that every rank has to make
    equally often. The last one may be taken from the start again.
    """
    if not samples:
        raise UserError("There is no image to evaluate on: the split is empty. Give another one.")
    count = math.ceil(len(samples) / world_size())
    return [samples[(rank() + step * world_size()) % len(samples)] for step in range(count)]


def _gather_images(detections: list[np.ndarray], images: int) -> list[np.ndarray]:
    """The detections of all ranks in the order of the images: the inverse of `_share`."""
    parts = gather_objects(detections)
    return [parts[index % len(parts)][index // len(parts)] for index in range(images)]
