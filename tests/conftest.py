import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.factory import add_image, coloured_boxes, write_split

ROOT = Path(__file__).resolve().parent.parent
# One thread, here and in every script: two processes of two threads each on two cores wait for
# each other most of the time (57 s instead of 7 for one test file).
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TQDM_DISABLE"] = "1"  # bars of an hour of training would fill the log


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.fixture
def run_script():
    """Run a script of the project as a user does. Returns the finished process."""

    def run(*arguments, **options):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=300, **options
        )

    return run


@pytest.fixture(scope="session")
def tiny_voc(tmp_path_factory):
    """A VOC tree of twelve 64 x 80 images with red and green boxes, and its classes.txt."""
    root = tmp_path_factory.mktemp("voc") / "Tiny"
    rng = np.random.default_rng(0)
    names = [f"image {i}" for i in range(12)]
    for name in names:
        x, y = rng.integers(2, 40, 2)
        boxes = [(x, y, x + 20, y + 18), (70 - x, y, 78 - x, y + 12)]
        image = coloured_boxes((64, 80), boxes, [(255, 0, 0), (0, 255, 0)])
        add_image(root, name, image, [("red", boxes[0]), ("green", boxes[1])], ".jpg")
    write_split(root, "train", names[:8])
    write_split(root, "val", names[8:])
    (root / "classes.txt").write_text("red\ngreen\n")
    return root
