"""The weights of one detector as files of this project, of darknet and of the original fork."""

from collections import OrderedDict

import torch

from nets.yolo import YoloV4
from tests.test_predictor import ANCHORS, CLASS_NAMES, INPUT_SHAPE, write_checkpoint
from weights.checkpoint import read_checkpoint
from weights.darknet import save_darknet_weights
from weights.darknet_cfg import Cfg, write_cfg
from weights.fork import fork_names

SCALE_XY = (1.6, 1.4, 1.3)  # nobody's own: it must have been given
SINGLE = ("--classes_path", "--anchors_path", "--input_shape", "--scale_xy")


def write_shelf(folder):
    """best.pt, a.weights, a.pth, and what the latter two do not say: a.cfg and text files."""
    checkpoint = read_checkpoint(write_checkpoint(folder / "best.pt", scale_xy=SCALE_XY))
    model = YoloV4(len(CLASS_NAMES), width=0.1, depth=0.1)
    model.load_state_dict(checkpoint["model"])
    save_darknet_weights(model, folder / "a.weights")
    names = fork_names(model.state_dict())
    fork = OrderedDict((names[name], tensor) for name, tensor in model.state_dict().items())
    torch.save(fork, folder / "a.pth")
    cfg = Cfg(len(CLASS_NAMES), tuple(ANCHORS), INPUT_SHAPE, SCALE_XY)
    (folder / "a.cfg").write_text(write_cfg(model, cfg))
    (folder / "names.txt").write_text("\n".join(CLASS_NAMES), encoding="utf-8")
    (folder / "anchors.txt").write_text("\n".join(f"{w},{h}" for w, h in ANCHORS))
    return folder


def flags_of(folder, name, how):
    """The flags that a file needs: with its cfg, or one for each fact, the reach at the end."""
    flags = ["--weights", folder / name, "--width", 0.1, "--depth", 0.1]
    flags += ["--classes_path", folder / "names.txt"]
    if how == "cfg":
        return [*flags, "--cfg", folder / "a.cfg"]
    anchors = ["--anchors_path", folder / "anchors.txt"]
    return [*flags, *anchors, "--input_shape", *INPUT_SHAPE, "--scale_xy", *SCALE_XY]
