"""Networks and files of weights that tests make, and what is known of darknet's from elsewhere."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from nets.yolo import YoloV4
from utils.errors import UserError
from weights.loading import load_weights

SMALL = {"width": 0.05, "depth": 0.1}
ANCHORS = (
    *((12, 16), (19, 36), (40, 28), (36, 75), (76, 55), (72, 146)),
    *((142, 110), (192, 243), (459, 401)),
)
# darknet's own 162 layers, with 80 classes; `from` as in its cfg, by blanks.
LAYERS = Path(__file__).parent / "data" / "yolov4_layers.csv"


def small_model(num_classes=2, seed=0, **scaling):
    torch.manual_seed(seed)
    return YoloV4(num_classes, **{**SMALL, **scaling})


def structure(num_classes=80, **scaling):
    with torch.device("meta"):
        return YoloV4(num_classes, **scaling)


def full_model(num_classes=80):
    """A network of full size with whatever the memory held: random weights would take a second."""
    return structure(num_classes).to_empty(device="cpu")


def copy_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, state, names=None):
    found = model.state_dict()
    return all(torch.equal(found[name], state[name]) for name in names or state)


def assert_refused(path, match, model=None, **classes):
    model = model or small_model(seed=1)
    before = copy_of(model)
    with pytest.raises(UserError, match=match):
        load_weights(model, path, **classes)
    assert same(model, before)


def darknet_layers():
    with open(LAYERS, newline="") as file:
        return list(csv.DictReader(file))


def sources(index, layer):
    """Indices of the layers that a layer continues from."""
    given = [int(number) for number in layer["from"].split()]
    return [number if number >= 0 else index + number for number in given] or [index - 1]


def darknet_shapes(num_classes=80):
    """(out, in, kh, kw) of each convolution and whether it has BN, worked out from the list."""
    channels, shapes = {-1: 3}, []
    for index, layer in enumerate(darknet_layers()):
        channels[index] = inputs = sum(channels[source] for source in sources(index, layer))
        if layer["type"] == "shortcut":
            channels[index] = channels[index - 1]
        if layer["type"] == "convolutional":
            bn, size = layer["batch_normalize"] == "1", int(layer["size"])
            channels[index] = int(layer["filters"]) if bn else 3 * (5 + num_classes)
            shapes.append(((channels[index], inputs, size, size), bn))
    return shapes


def darknet_parts(num_classes=80):
    """What a .weights file holds, in its order: how the names end, and the shapes."""
    parts = []
    for shape, bn in darknet_shapes(num_classes):
        if bn:
            vectors = ("bn.bias", "bn.weight", "bn.running_mean", "bn.running_var")
            parts += [(vector, shape[:1]) for vector in vectors] + [("conv.weight", shape)]
        else:
            parts += [("output.bias", shape[:1]), ("output.weight", shape)]
    return parts


def count_numbers(network):
    """Numbers in the network's .weights file, which has no counters of batches."""
    state = network.state_dict().items()
    return sum(tensor.numel() for name, tensor in state if "num_batches" not in name)


def write_darknet(path, count, *, header=(0, 2, 5, 0, 0)):
    """Write a .weights file of `count` numbers, and return its 32-bit words.

    The bits are those of finite floats below 2, negative zeros and denormal ones among them.
    """
    block = np.random.default_rng(0).integers(0, 2**32, 1_000_003, dtype=np.uint32)
    words = np.resize(block & np.uint32(0xBFFFFFFF), len(header) + count)
    words[: len(header)] = header
    words.tofile(path)
    return words
