"""From an image to its boxes, batch 1: ours beside the original fork's method, and others.

    python -m benchmarks.detect [--device cuda]
    python -m benchmarks.detect --network --engines onnxruntime openvino   # pip install them, onnx
                                                                           # and onnxscript first

Full YOLOv4 with random weights, the same in all. Ours is the Predictor: letterbox, the network
with BN folded, decode, NMS for all classes at once. The fork's: Pillow's bicubic resize, its own
network, its decode, NMS class by class. Each runs in processes of its own, in turn, and keeps the
same number of boxes: letterbox and plain resize show the network different pixels, so that each
takes the threshold at which its own path keeps that many. With --network only the network is timed,
from a tensor to its maps: that is what other engines run.
"""

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sized
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torchvision
import tyro
from PIL import Image
from torch import Tensor, nn

from benchmarks.fork_network import ForkYolo
from benchmarks.processes import run_in_turn
from data.image import read_image
from data.letterbox import letterbox
from engine.predictor import Predictor
from tests.reference_loss import ANCHORS
from utils.errors import UserError, run_script
from weights.checkpoint import save_checkpoint
from weights.foreign import FileMetadata, as_checkpoint

ENGINES = ("onnxruntime", "openvino")
IMAGE = "image.jpg"
LOWEST, NMS_IOU = 0.001, 0.3  # the threshold before the right one is known; the fork's NMS


@dataclasses.dataclass(frozen=True)
class Config:
    # Every line is a flag; its comment is the flag's help.
    device: str = "cpu"  # cpu or cuda
    input_shape: tuple[int, int] = (416, 416)  # height, width in pixels
    image: tuple[int, int] = (480, 640)  # height, width of the image
    num_classes: int = 20
    boxes: int = 150  # that each path keeps; ours keeps 300 at most
    network: bool = False  # time the network alone
    engines: tuple[str, ...] = ()  # beside it: onnxruntime, openvino
    images: int = 8  # timed ones of a process
    rounds: int = 3  # processes of each variant
    seed: int = 0
    amp: str = "off"  # of ours: off, fp16 or bf16
    variant: Literal["", "fork", "ours", "onnxruntime", "openvino"] = ""  # used by the processes


def main() -> None:
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    if unknown := set(config.engines) - set(ENGINES):
        raise UserError(f"--engines {' '.join(sorted(unknown))}: choose from {', '.join(ENGINES)}.")
    if config.engines and not config.network:
        raise UserError("--engines run the network alone: add --network.")
    if not 1 <= config.boxes <= 300:
        raise UserError(f"--boxes {config.boxes}: give 1 to 300; ours keeps no more than 300.")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device. Use --device cpu.")
    if any(side % 32 for side in config.input_shape):
        raise UserError(f"--input_shape {config.input_shape}: give multiples of 32.")
    if config.variant:
        print(json.dumps(measure(config)))
        return
    found = run_in_turn("benchmarks.detect", config, ("fork", "ours", *config.engines))
    print(f"{config}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    seconds = {
        variant: statistics.median(one["seconds"] for one in results)
        for variant, results in found.items()
    }
    for variant, taken in seconds.items():
        boxes = "" if config.network else f", {found[variant][0]['boxes']} boxes"
        print(f"{variant:12s}{1e3 * taken:8.1f} ms{boxes}")
    for variant, taken in seconds.items():
        if variant != "ours":
            print(f"ratio {taken / seconds['ours']:.2f} ({variant} / ours)")


def measure(config: Config) -> dict[str, float]:
    """Median seconds of one variant, and how many boxes it finds."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        fork = random_network(config, draw_image(folder, config))
        detect = (network_alone if config.network else image_to_boxes)(fork, folder, config)
        boxes = len(detect())  # of the network alone, its maps
        seconds = []
        for _ in range(config.images):
            synchronize(config.device)
            start = time.perf_counter()
            detect()
            synchronize(config.device)
            seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "boxes": boxes}


@torch.no_grad()
def random_network(config: Config, path: Path) -> ForkYolo:
    """Random weights whose outputs differ between cells, as a trained network's do.

    As torch initialises it, all cells give the same score: the input is lost on the way. So BN
    takes its statistics from the image, as both ways show it, and the heads give logits of 1.5.
    """
    torch.manual_seed(config.seed)
    fork = ForkYolo(config.num_classes)
    for module in fork.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.weight, std=1.5 * module.in_channels**-0.5)
    pixels = torch.from_numpy(letterbox(read_image(path), config.input_shape)).permute(2, 0, 1)
    fork(torch.stack((fork_input(path, config), pixels.float() / 255)))
    return fork.eval()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def image_to_boxes(fork: ForkYolo, folder: Path, config: Config) -> Callable[[], np.ndarray]:
    """A call that finds `config.boxes` boxes in an image and returns their scores."""
    path = folder / IMAGE
    if config.variant == "ours":
        predictor = as_predictor(fork, folder, config)

        def detect(threshold: float) -> np.ndarray:
            predictor.conf_threshold = threshold
            return predictor(path).scores
    else:
        fork.to(config.device)

        def detect(threshold: float) -> np.ndarray:
            return fork_detect(fork, path, config, threshold)[:, 4]

    scores = np.sort(detect(LOWEST))
    if len(scores) < config.boxes:
        raise UserError(
            f"--boxes {config.boxes}: {config.variant} finds {len(scores)} boxes of a score of "
            f"{LOWEST} or more. Give fewer, or a larger --input_shape."
        )
    threshold = float(scores[-config.boxes])
    return lambda: detect(threshold)


def draw_image(folder: Path, config: Config) -> Path:
    path = folder / IMAGE
    pixels = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    size = config.image[::-1]
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
    return path


def network_alone(fork: ForkYolo, folder: Path, config: Config) -> Callable[[], Sized]:
    images = torch.rand(1, 3, *config.input_shape)
    if config.variant in ENGINES:
        return engine(config.variant, as_onnx(fork, folder, images), images.numpy())
    images = images.to(config.device)
    network: nn.Module = fork
    if config.variant == "ours":
        network = as_predictor(fork, folder, config).model
        images = images.contiguous(memory_format=torch.channels_last)
    network.to(config.device)
    return torch.inference_mode()(lambda: network(images))


def as_onnx(fork: ForkYolo, folder: Path, images: Tensor) -> Path:
    """The fork's network as a file, its activation as the operation that runtimes know."""
    for module in list(fork.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "Mish":
                setattr(module, name, nn.Mish())
    path = folder / "network.onnx"
    torch.onnx.export(fork, (images,), path, opset_version=18, verbose=False)
    return path


def engine(name: str, path: Path, images: np.ndarray) -> Callable[[], Sized]:
    """A call that runs the network with another engine, on as many threads as torch has."""
    threads = torch.get_num_threads()
    if name == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: images}
        return lambda: session.run(None, feed)
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    return lambda: request.infer({0: images})


def as_predictor(fork: ForkYolo, folder: Path, config: Config) -> Predictor:
    """Our predictor with the fork's weights, which travel as one of its files."""
    torch.save(fork.state_dict(), folder / "fork.pth")
    names, anchors = folder / "names.txt", folder / "anchors.txt"
    names.write_text("\n".join(map(str, range(config.num_classes))))
    anchors.write_text("\n".join(f"{w},{h}" for w, h in ANCHORS))
    metadata = FileMetadata(
        classes_path=str(names), anchors_path=str(anchors), input_shape=config.input_shape
    )
    save_checkpoint(folder / "fork.pt", as_checkpoint(folder / "fork.pth", metadata))
    return Predictor(
        folder / "fork.pt",
        device=config.device,
        conf_threshold=LOWEST,
        nms_iou=NMS_IOU,
        amp=config.amp,
    )


@torch.no_grad()
def fork_detect(network: ForkYolo, path: Path, config: Config, threshold: float) -> np.ndarray:
    """(n, 6) boxes as fractions of the image, score, class: plain resize, NMS class by class."""
    outputs = network(fork_input(path, config)[None].to(config.device))
    boxes = torch.cat([fork_decode(raw, scale, config) for scale, raw in enumerate(outputs)])
    corners = torch.cat((boxes[:, :2] - boxes[:, 2:4] / 2, boxes[:, :2] + boxes[:, 2:4] / 2), dim=1)
    probability, class_ids = boxes[:, 5:].max(dim=1)
    scores = boxes[:, 4] * probability
    rows = torch.cat((corners, scores[:, None], class_ids[:, None].float()), dim=1)
    rows = rows[scores >= threshold]
    kept = []
    for class_id in rows[:, 5].unique():
        own = rows[rows[:, 5] == class_id]
        kept.append(own[torchvision.ops.nms(own[:, :4], own[:, 4], NMS_IOU)].cpu().numpy())
    return np.concatenate(kept) if kept else np.zeros((0, 6))


def fork_input(path: Path, config: Config) -> Tensor:
    """float32 (3, H, W) in 0..1."""
    height, width = config.input_shape
    image = Image.open(path).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image, dtype=np.float32).transpose(2, 0, 1) / 255)


def fork_decode(raw: Tensor, scale: int, config: Config) -> Tensor:
    """(cells, 5 + C): centre and size as fractions of the input, probabilities."""
    _, _, rows, columns = raw.shape
    stride = config.input_shape[1] / columns
    anchors = torch.tensor(ANCHORS[3 * scale : 3 * scale + 3], device=raw.device) / stride
    maps = raw.view(3, -1, rows, columns).permute(0, 2, 3, 1).contiguous()
    grid_x = torch.linspace(0, columns - 1, columns, device=raw.device).expand(3, rows, columns)
    grid_y = torch.linspace(0, rows - 1, rows, device=raw.device)[:, None].expand(3, rows, columns)
    boxes = torch.empty_like(maps)
    boxes[..., 0] = (maps[..., 0].sigmoid() + grid_x) / columns
    boxes[..., 1] = (maps[..., 1].sigmoid() + grid_y) / rows
    boxes[..., 2] = maps[..., 2].exp() * anchors[:, 0, None, None] / columns
    boxes[..., 3] = maps[..., 3].exp() * anchors[:, 1, None, None] / rows
    boxes[..., 4:] = maps[..., 4:].sigmoid()
    return boxes.view(-1, maps.shape[-1])


if __name__ == "__main__":
    run_script(main)
