"""From a picture to its boxes, batch 1: ours beside the original fork's method.

    python -m benchmarks.detect [--device cuda]

Full YOLOv4 with random weights, the same in both. Ours is the Predictor: letterbox, the network
with BN folded, decode, NMS for all classes at once. The fork's: Pillow's bicubic resize, its own
network, its decode, NMS class by class. In alternating rounds in one process.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
import tyro
from PIL import Image
from torch import Tensor

from benchmarks.fork_network import ForkYolo
from engine.checkpoint import save_checkpoint
from engine.foreign import FileFacts, as_checkpoint
from engine.predictor import Predictor
from tests.reference_loss import ANCHORS
from utils.errors import run_script


@dataclasses.dataclass(frozen=True)
class Config:
    # Every line is a flag; its comment is the flag's help.
    device: str = "cpu"  # cpu or cuda
    input_shape: tuple[int, int] = (416, 416)  # height, width in pixels
    picture: tuple[int, int] = (480, 640)  # height, width of the picture
    num_classes: int = 20
    conf_threshold: float = 0.3
    rounds: int = 15  # of each
    seed: int = 0


def main() -> None:
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    torch.manual_seed(config.seed)
    fork = ForkYolo(config.num_classes).eval()
    with tempfile.TemporaryDirectory() as name:
        predictor = as_predictor(fork, Path(name), config)
        path = Path(name) / "picture.jpg"
        pixels = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
        size = config.picture[::-1]
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
        fork.to(config.device)
        methods = {
            "fork": lambda: fork_detect(fork, path, config),
            "ours": lambda: predictor(path).boxes_xyxy,
        }
        found = {name: len(detect()) for name, detect in methods.items()}
        seconds = measure(methods, config.rounds)
    print(f"{config}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    for name, taken in seconds.items():
        print(f"{name:5s} {1e3 * taken:8.1f} ms, {found[name]} boxes")
    print(f"ratio {seconds['fork'] / seconds['ours']:.2f} (fork / ours)")


def as_predictor(fork: ForkYolo, folder: Path, config: Config) -> Predictor:
    """Our predictor with the fork's weights, which travel as one of its files."""
    torch.save(fork.state_dict(), folder / "fork.pth")
    names, anchors = folder / "names.txt", folder / "anchors.txt"
    names.write_text("\n".join(map(str, range(config.num_classes))))
    anchors.write_text("\n".join(f"{w},{h}" for w, h in ANCHORS))
    facts = FileFacts(
        classes_path=str(names), anchors_path=str(anchors), input_shape=config.input_shape
    )
    save_checkpoint(folder / "fork.pt", as_checkpoint(folder / "fork.pth", facts))
    return Predictor(
        folder / "fork.pt", device=config.device, conf_threshold=config.conf_threshold, nms_iou=0.3
    )


def measure(methods: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, detect in methods.items():
            start = time.perf_counter()
            detect()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


@torch.no_grad()
def fork_detect(network: ForkYolo, path: Path, config: Config) -> np.ndarray:
    """(n, 6) boxes as fractions of the picture, score, class: plain resize, NMS class by class."""
    height, width = config.input_shape
    image = Image.open(path).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.array(image, dtype=np.float32).transpose(2, 0, 1) / 255
    outputs = network(torch.from_numpy(pixels)[None].to(config.device))
    boxes = torch.cat([fork_decode(raw, scale, config) for scale, raw in enumerate(outputs)])
    corners = torch.cat((boxes[:, :2] - boxes[:, 2:4] / 2, boxes[:, :2] + boxes[:, 2:4] / 2), dim=1)
    probability, class_ids = boxes[:, 5:].max(dim=1)
    scores = boxes[:, 4] * probability
    rows = torch.cat((corners, scores[:, None], class_ids[:, None].float()), dim=1)
    rows = rows[scores >= config.conf_threshold]
    kept = []
    for class_id in rows[:, 5].unique():
        own = rows[rows[:, 5] == class_id]
        kept.append(own[torchvision.ops.nms(own[:, :4], own[:, 4], 0.3)].cpu().numpy())
    return np.concatenate(kept) if kept else np.zeros((0, 6))


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
