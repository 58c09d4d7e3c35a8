"""What a look at the confidence cells costs a training step, side by side in one process.

python -m benchmarks.cells [--device cuda --width 1 --depth 1 --batch_size 16 ...]
"""

import statistics
import time
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

from benchmarks.loss import synchronize
from engine.optimizer import Ema, build_optimizer
from engine.settings import amp_dtype
from engine.trainer import TrainStep
from losses.yolo_loss import YOLOLoss
from nets.memory import move
from nets.yolo import YoloV4
from tests.reference_loss import ANCHORS
from utils.errors import UserError, run_script


@dataclass(frozen=True)
class Config:
    # Every line is also a flag; its comment is the flag's help.
    device: str = "cpu"  # cpu or cuda
    width: float = 0.25  # channels against YOLOv4's
    depth: float = 0.34  # residual blocks against YOLOv4's
    batch_size: int = 8  # images
    input_shape: tuple[int, int] = (224, 224)  # height, width in pixels; multiples of 32
    num_classes: int = 3  # of the network
    boxes: int = 12  # ground truths an image
    conf_loss: str = "focal"  # confidence loss
    log_period: int = 10  # of train.py: one step in so many looks at the cells
    rounds: int = 30  # timed steps of each, alternating


def main() -> None:
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device. Use --device cpu.")
    step, images, targets = make_step(config)
    print(f"{config}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(config.rounds + 1):
        for cells in (turn % 2 == 0, turn % 2 == 1):  # neither is always the first
            taken = step_seconds(step, images, targets, cells=cells)
            if turn:  # the first is a warm-up
                seconds[cells].append(taken)
    plain, looking = (statistics.median(seconds[cells]) for cells in (False, True))
    print(f"step without a look {1e3 * plain:.2f} ms, with one {1e3 * looking:.2f} ms (medians)")
    print(f"ratio {looking / plain:.4f} (with a look / without)")
    share = (looking / plain - 1) / config.log_period
    print(f"training with a look every {config.log_period} steps is {100 * share:+.2f}% slower")


def make_step(config: Config) -> tuple[TrainStep, Tensor, Tensor]:
    """A training step as train.py builds it, and a random batch."""
    torch.manual_seed(0)
    device = torch.device(config.device)
    model = YoloV4(config.num_classes, width=config.width, depth=config.depth)
    move(model, device).train()
    loss = YOLOLoss(ANCHORS, config.num_classes, config.input_shape, conf_loss=config.conf_loss).to(
        device
    )
    step = TrainStep(
        model=model,
        loss=loss,
        optimizer=build_optimizer("adamw", model),
        ema=Ema(model, 0.9998),
        device=device,
        amp_dtype=amp_dtype("auto", device),
        clip_norm=10.0,
    )
    images = torch.randint(256, (config.batch_size, 3, *config.input_shape), dtype=torch.uint8)
    targets = torch.rand(config.batch_size * config.boxes, 6)
    targets[:, 0] = torch.arange(config.batch_size).repeat_interleave(config.boxes)
    targets[:, 1] = torch.randint(config.num_classes, (len(targets),))
    targets[:, 4:] = 0.02 + 0.6 * targets[:, 4:] ** 2
    return step, images, targets


def step_seconds(step: TrainStep, images: Tensor, targets: Tensor, *, cells: bool) -> float:
    """One whole step, until its figures are on the host."""
    synchronize(step.device)
    start = time.perf_counter()
    step(images, targets, cells=cells).read()
    synchronize(step.device)
    return time.perf_counter() - start


if __name__ == "__main__":
    run_script(main)
