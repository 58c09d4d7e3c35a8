"""Are the boxes those of a program that is not ours? OpenCV's darknet reader beside this network.

    python -m benchmarks.parity_opencv

A network with random weights is written as .weights and .cfg. OpenCV 4.13, the last version that
reads these (OpenCV 5 does not), runs it in an environment of its own, .venv-opencv, which is made
when it is missing. Both get the same input, and the decoded boxes and objectness are compared:
once as they are, and once with OpenCV's epsilon in BN, 1e-6 where darknet and this network have
1e-5. What then still differs would be a fault of structure, order or decode.
`--freeze FILE` instead keeps OpenCV's result for a small network, which the tests compare with.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np
import torch
import tyro

from nets.decode import decode, read_anchors
from nets.yolo import YoloV4
from utils.errors import UserError, run_script
from weights.darknet import DARKNET_SCALE_XY, layout_of, save_darknet_weights
from weights.darknet_cfg import Cfg, write_cfg

ENVIRONMENT = Path(".venv-opencv")
REQUIREMENTS = ("opencv-python-headless==4.13.*", "numpy")
TOLERANCE = 1e-3
OPENCV_EPSILON = 1e-6  # of BN, whatever the network was trained with
READER = """
import sys
import cv2
import numpy as np

cfg, weights, images, result = sys.argv[1:]
net = cv2.dnn.readNetFromDarknet(cfg, weights)
net.enableWinograd(False)  # which rounds coarser than plain convolution
net.setInput(np.load(images))
np.save(result, np.concatenate(net.forward(net.getUnconnectedOutLayersNames())))
print(cv2.__version__)
"""


@dataclasses.dataclass(frozen=True)
class Config:
    num_classes: int = 20
    width: float = 1.0  # channels against YOLOv4's
    depth: float = 1.0  # residual blocks against YOLOv4's
    anchors_path: str = "model_data/yolo_anchors.txt"
    seed: int = 0
    freeze: Path | None = None  # write a small network's result to this file instead


SIZES = ((416, 416), (224, 320))  # height, width
FROZEN_SHAPE = (64, 96)


def main() -> None:
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    python = opencv_python()
    if config.freeze:
        freeze(config, python, config.freeze)
        return
    worst = max(compare(config, python, input_shape) for input_shape in SIZES)
    if worst > TOLERANCE:
        raise UserError(f"the largest difference, {worst:.1e}, is above {TOLERANCE:.0e}.")
    print(f"with the same epsilon all within {TOLERANCE:.0e}")


def compare(config: Config, python: Path, input_shape: tuple[int, int]) -> float:
    """Print the differences at one size; returns the largest with the same epsilon."""
    network, cfg = random_network(config, input_shape), describe(config, input_shape)
    images = random_images(config.seed, input_shape)
    theirs, version = run_opencv(python, network, images, cfg)
    print(f"{input_shape[0]} x {input_shape[1]}, {len(theirs):,} boxes, OpenCV {version}")
    for title, epsilon in (("as it is", None), ("epsilon 1e-6", OPENCV_EPSILON)):
        set_epsilon(network, epsilon)
        differences = np.abs(run_ours(network, images, cfg) - theirs)
        differences[:, 2:4] /= np.maximum(theirs[:, 2:4], 1)  # of the input, or of larger boxes
        centre, size, objectness = differences[:, :2], differences[:, 2:4], differences[:, 4]
        print(
            f"  {title:12s} largest difference: centre {centre.max():.1e}, size {size.max():.1e} "
            f"(of the input), objectness {objectness.max():.1e}"
        )
    return float(differences.max())


def set_epsilon(network: YoloV4, epsilon: float | None) -> None:
    """Change BN's epsilon everywhere; None leaves it."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and epsilon is not None:
            module.eps = epsilon


def opencv_python() -> Path:
    """The interpreter of the environment with OpenCV 4.13, made when it is missing."""
    python = ENVIRONMENT / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        print(f"making {ENVIRONMENT} with {' '.join(REQUIREMENTS)}", flush=True)
        venv.create(ENVIRONMENT, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "-q", *REQUIREMENTS], check=True)
    return python


@torch.no_grad()
def random_network(config: Config, input_shape: tuple[int, int]) -> YoloV4:
    """Random weights whose activations neither vanish nor explode: BN measured on noise."""
    torch.manual_seed(config.seed)
    network = YoloV4(config.num_classes, width=config.width, depth=config.depth)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.uniform_(-0.5, 0.5)
            module.momentum = None  # plain mean
    for head in (network.head_p3, network.head_p4, network.head_p5):
        assert head.output.bias is not None  # it has no BN
        head.output.bias.uniform_(-1, 1)
    network.train()(torch.from_numpy(random_images(config.seed + 1, input_shape, count=2)))
    return network.eval()


def frozen_network() -> YoloV4:
    """A small network whose weights are the same everywhere: torch's generators may change."""
    generator = np.random.default_rng(0)
    network = YoloV4(2, width=0.05, depth=0.1)
    state = {}
    for name, shape in layout_of(network).items():
        values: np.ndarray = generator.standard_normal(shape, dtype=np.float32)
        if name.endswith(("bn.weight", "running_var")):
            values = 1 + 0.2 * np.tanh(values)
        elif len(shape) == 4:
            # 1.5 makes up for the activations: with 1 the image has no say in the result.
            values *= (2 if ".output." in name else 1.5) / np.prod(shape[1:]) ** 0.5
        else:
            values *= 0.1
        state[name] = torch.from_numpy(values)
    network.load_state_dict(state, strict=False)
    return network.eval()


def random_images(seed: int, input_shape: tuple[int, int], count: int = 1) -> np.ndarray:
    """(count, 3, H, W) float32 in 0..1."""
    generator = np.random.default_rng(seed)
    return generator.random((count, 3, *input_shape), dtype=np.float32)


def describe(config: Config, input_shape: tuple[int, int]) -> Cfg:
    anchors = read_anchors(config.anchors_path)
    return Cfg(config.num_classes, anchors, input_shape, DARKNET_SCALE_XY)


def run_opencv(
    python: Path, network: YoloV4, images: np.ndarray, cfg: Cfg
) -> tuple[np.ndarray, str]:
    """(K, 5) centre, size (fractions of the input) and objectness, and OpenCV's version."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "network.cfg").write_text(write_cfg(network, cfg), encoding="utf-8")
        save_darknet_weights(network, folder / "network.weights")
        np.save(folder / "images.npy", images)
        paths = [folder / file for file in ("network.cfg", "network.weights", "images.npy")]
        result = folder / "result.npy"
        command: list[str | Path] = [python, "-c", READER, *paths, result]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"OpenCV could not run the network:\n{done.stderr}")
        return np.load(result)[:, :5], done.stdout.strip()


@torch.inference_mode()
def run_ours(network: YoloV4, images: np.ndarray, cfg: Cfg) -> np.ndarray:
    """The same from this network."""
    outputs = network(torch.from_numpy(images))
    boxes = decode(outputs, cfg.anchors, cfg.input_shape, cfg.scale_xy)[0].double()
    height, width = cfg.input_shape
    centre, size = (boxes[:, :2] + boxes[:, 2:4]) / 2, boxes[:, 2:4] - boxes[:, :2]
    scale = torch.tensor([width, height], dtype=torch.float64)
    return torch.cat((centre / scale, size / scale, boxes[:, 4:5]), dim=1).numpy()


def freeze(config: Config, python: Path, path: Path) -> None:
    """Keep OpenCV's result for a network that the tests can build again from the same seed."""
    network = frozen_network()
    cfg = describe(dataclasses.replace(config, num_classes=network.num_classes), FROZEN_SHAPE)
    theirs, version = run_opencv(python, network, random_images(0, FROZEN_SHAPE), cfg)
    rows = [[float(f"{value:.6g}") for value in row] for row in theirs]
    path.write_text(json.dumps({"opencv": version, "boxes_cxcywh_objectness": rows}))
    print(f"wrote {len(rows)} boxes to {path}")


if __name__ == "__main__":
    run_script(main)
