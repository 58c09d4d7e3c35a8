import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.parity_opencv import (
    FROZEN_SHAPE,
    OPENCV_EPSILON,
    TOLERANCE,
    Config,
    describe,
    frozen_network,
    random_images,
    run_ours,
    set_epsilon,
)

FROZEN = Path(__file__).parent / "data" / "opencv_boxes.json"


@pytest.fixture(scope="module")
def theirs():
    return np.array(json.loads(FROZEN.read_text())["boxes_cxcywh_objectness"])


def decoded(network):
    cfg = describe(Config(num_classes=network.num_classes), FROZEN_SHAPE)
    return run_ours(network, random_images(0, FROZEN_SHAPE), cfg)


def test_boxes_and_objectness_are_those_of_opencvs_darknet_reader(theirs):
    network = frozen_network()
    set_epsilon(network, OPENCV_EPSILON)
    ours = decoded(network)
    assert ours.shape == theirs.shape == (3 * (8 * 12 + 4 * 6 + 2 * 3), 5)
    scale = np.ones_like(theirs)
    scale[:, 2:4] = np.maximum(theirs[:, 2:4], 1)  # boxes larger than the image: of their size
    assert (np.abs(ours - theirs) / scale).max() < TOLERANCE


@pytest.mark.parametrize("index", range(5))
def test_the_frozen_boxes_would_show_a_fault_deep_in_the_backbone(theirs, index):
    """Swapped halves of a stage have the same shapes, so that no length would tell."""
    network = frozen_network()
    stage = network.backbone.stages[index]
    stage.short, stage.main = stage.main, stage.short
    assert np.abs(decoded(network) - theirs).max() > 100 * TOLERANCE
