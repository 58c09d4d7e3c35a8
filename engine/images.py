"""Images that show what a training sees and what it finds."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert

from data.image import read_image, resize
from data.letterbox import image_to_letterbox, letterbox
from data.voc import Sample
from utils.draw import draw_boxes, image_grid

MOST_IMAGES = 8
MIN_SIDE = 320  # of the longer side of one image of a training batch
SHOWN_HW = (416, 416)  # size of one image of detections
MOST_BOXES = 50  # in one image of detections: an early threshold passes hundreds


def batch_image(images: Tensor, targets: Tensor, class_names: Sequence[str]) -> np.ndarray:
    """The first images of a training batch with the boxes that the loss is given.

    images: uint8 (B, 3, H, W); targets: (N, 6). Returns RGB uint8.
    """
    height, width = images.shape[2:]
    zoom = math.ceil(MIN_SIDE / max(height, width))  # labels would cover a smaller image
    size = targets.new_tensor([width, height]).repeat(2) * zoom
    drawn = []
    for index, image in enumerate(images[:MOST_IMAGES]):
        rows = targets[targets[:, 0] == index]
        boxes_xyxy = (box_convert(rows[:, 2:], "cxcywh", "xyxy") * size).numpy()
        pixels = resize(image.permute(1, 2, 0).numpy(), (height * zoom, width * zoom))
        drawn.append(draw_boxes(pixels, boxes_xyxy, rows[:, 1].int().numpy(), class_names))
    return image_grid(drawn)


def detections_image(
    samples: Sequence[Sample],
    detections: Sequence[np.ndarray],
    class_names: Sequence[str],
    conf_threshold: float,
) -> np.ndarray:
    """Images of a split, evenly chosen, with what is found at a threshold. Returns RGB uint8.

    detections: a (n, 6) array of xyxy, score, class an image, in its own pixels. Of each image
    the MOST_BOXES best are drawn.
    """
    chosen = np.linspace(0, len(samples) - 1, min(MOST_IMAGES, len(samples))).astype(int)
    drawn = []
    for index in chosen:
        rows = torch.from_numpy(detections[index])
        rows = rows[rows[:, 4] >= conf_threshold]
        rows = rows[rows[:, 4].argsort(descending=True, stable=True)[:MOST_BOXES]]
        boxes_xyxy = image_to_letterbox(rows[:, :4], samples[index].image_hw, SHOWN_HW).numpy()
        image = letterbox(read_image(samples[index].image_path), SHOWN_HW)
        class_ids, scores = rows[:, 5].int().numpy(), rows[:, 4].numpy()
        drawn.append(draw_boxes(image, boxes_xyxy, class_ids, class_names, scores))
    return image_grid(drawn)
