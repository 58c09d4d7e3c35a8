from pathlib import Path

import numpy as np
import torch

from data.voc import read_split
from engine.runlog import MOST_BOXES, SHOWN_HW, batch_image, detections_image
from utils.draw import class_colour


def has_colour(image, class_id):
    return bool((image == np.array(class_colour(class_id))).all(-1).any())


def test_a_training_batch_shows_each_image_with_its_own_boxes():
    images = torch.zeros(2, 3, 96, 128, dtype=torch.uint8)
    targets = torch.tensor([[1, 1, 0.5, 0.5, 0.5, 0.5], [0, -1, 0.5, 0.5, 0.2, 0.2]])
    grid = batch_image(images, targets, ["a", "b"])
    left, right = grid[:, : grid.shape[1] // 2], grid[:, grid.shape[1] // 2 :]
    assert has_colour(right, 1)
    assert not has_colour(left, 1)
    assert not has_colour(grid, 0)


def test_detections_below_the_threshold_are_not_drawn(tiny_voc: Path):
    samples = read_split(f"{tiny_voc}:val", ("red", "green"))
    box = [10, 10, 40, 40]
    rows = np.array([[*box, 0.9, 0], [*box, 0.2, 1]], np.float32)
    empty = np.zeros((0, 6), np.float32)
    grid = detections_image(samples, [rows, *[empty] * 3], ["red", "green"], 0.5)
    assert grid.shape[1] > 4 * SHOWN_HW[1]
    assert has_colour(grid, 0)
    assert not has_colour(grid, 1)


def test_of_hundreds_of_boxes_the_best_50_are_drawn(tiny_voc: Path):
    samples = read_split(f"{tiny_voc}:val", ("red", "green"))[:1]
    best = np.array([[10, 10, 40, 40, 0.9, 0]] * MOST_BOXES, np.float32)
    others = np.array([[50, 10, 70, 40, 0.8, 1]] * 300, np.float32)
    names = ["red", "green"]
    for rows in (np.concatenate((others, best)), np.concatenate((best, others))):
        grid = detections_image(samples, [rows], names, 0.5)
        assert has_colour(grid, 0)
        assert not has_colour(grid, 1)
    rows = np.concatenate((others[:1], best[1:]))
    assert has_colour(detections_image(samples, [rows], names, 0.5), 1)
