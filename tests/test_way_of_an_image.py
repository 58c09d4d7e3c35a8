"""How much code an image passes on its way from the disk to a gradient: who reads it must, too.

From an item of the data set over its batch and the network to the end of the backward pass. Not in
it: the order of the epoch, the step's snapshot for bad batches, and nets/cpu/mish.py, which is used
in training on a CPU alone.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch

from data.dataset import VocDataset
from data.loader import collate
from data.voc import read_split
from engine.optimizer import build_optimizer
from engine.trainer import TrainStep
from losses.yolo_loss import YOLOLoss
from nets.decode import YOLOV4_ANCHORS
from nets.yolo import YoloV4
from tests.factory import add_image, write_split
from tests.training import ROOT
from train import Config, build_loss, training_set

MOST_FUNCTIONS, MOST_FILES = 69, 18


class Trace:
    """Collects the functions of this project that are called in the block, with their files.

    Not those without a name: lambdas and comprehensions.
    """

    def __enter__(self):
        self.functions = set()
        sys.setprofile(self.note)
        return self

    def note(self, frame, event, _argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT) and not {".venv", "tests"} & {*path.parts}:
            name = f"{frame.f_code.co_name}:{frame.f_code.co_firstlineno}"
            if not name.startswith("<"):
                self.functions.add((os.path.relpath(path, ROOT), name))

    def __exit__(self, *_error):
        sys.setprofile(None)


def test_an_image_passes_few_functions_in_few_files(tmp_path):
    rng = np.random.default_rng(0)
    for name in "abcdefgh":
        boxes = [("thing", (3, 4, 30, 25)), ("thing", (20, 30, 70, 60))]
        add_image(tmp_path, name, rng.integers(0, 256, (80, 90, 3), np.uint8), boxes)
    write_split(tmp_path, "train", "abcdefgh")
    config = Config(input_shape=(64, 64), mosaic_prob=0.5)
    train_set: VocDataset = training_set(config, read_split(f"{tmp_path}:train", ["thing"]))
    model = YoloV4(1, width=0.05, depth=0.01)
    loss: YOLOLoss = build_loss(config, YOLOV4_ANCHORS, 1, (2.0, 2.0, 2.0))
    step = TrainStep(
        model=model,
        loss=loss,
        optimizer=build_optimizer(config.optimizer, model),
        ema=None,
        device=torch.device("cpu"),
        amp_dtype=None,
        clip_norm=config.clip_norm,
    )
    with Trace() as trace:
        batch = collate([train_set[index] for index in range(8)])
        step.forward(*batch)["total"].backward()
    files = {path for path, _ in trace.functions}
    listed = "\n".join(f"{path} {name}" for path, name in sorted(trace.functions))
    assert {"data/image.py", "losses/yolo_loss.py", "nets/yolo.py"} <= files
    assert len(trace.functions) <= MOST_FUNCTIONS, listed
    assert len(files) <= MOST_FILES, listed
