"""A whole training step of full YOLOv4: ours beside the original fork's network and loss.

    python -m benchmarks.step                      # CPU: time and peak memory
    python -m benchmarks.step --device cuda --batch_size 64 --amp bf16

Forward, loss, backward and SGD with nesterov momentum. Each variant runs in a process of its own,
so that the peak of memory is its own; the processes run in turn. The reference is
benchmarks/fork_network.py in float32 with tests/reference_loss.py.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable

import torch
import tyro
from torch import Tensor, nn

from benchmarks.fork_network import ForkYolo
from benchmarks.load_weights import RESET_PEAK, status_bytes
from benchmarks.processes import run_in_turn
from engine.optimizer import build_optimizer
from engine.recipe import amp_dtype
from engine.step import TrainStep
from losses.yolo_loss import YOLOLoss
from nets.yolo import YoloV4
from tests.reference_loss import ANCHORS, reference_loss
from utils.errors import UserError, run_script

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Config:
    # Every line is a flag; its comment is the flag's help.
    device: str = "cpu"  # cpu or cuda
    batch_size: int = 4  # pictures
    input_shape: tuple[int, int] = (416, 416)  # height, width in pixels
    num_classes: int = 20
    boxes: int = 8  # a picture
    amp: str = "off"  # of ours: off, bf16 or fp16
    recompute: bool = False  # of ours
    steps: int = 2  # timed ones of a process
    rounds: int = 3  # processes of each variant
    variant: str = ""  # used by the processes: ours or fork


def main() -> None:
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device. Use --device cpu.")
    if config.variant:
        print(json.dumps(measure(config)))
        return
    found = run_in_turn("benchmarks.step", config, ("fork", "ours"))
    print(f"{config}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    medians = {
        variant: {key: statistics.median(one[key] for one in results) for key in results[0]}
        for variant, results in found.items()
    }
    for variant, figures in medians.items():
        print(
            f"{variant:5s} {1e3 * figures['seconds']:9.1f} ms a step, "
            f"{figures['peak'] / MIB:8.0f} MiB above the idle process"
        )
    fork, ours = medians["fork"], medians["ours"]
    print(f"time   {fork['seconds'] / ours['seconds']:.2f} (fork / ours)")
    print(f"memory {ours['peak'] / fork['peak']:.2f} (ours / fork)")


def measure(config: Config) -> dict[str, float]:
    """Median seconds of a step, and by how many bytes memory rises at most."""
    torch.manual_seed(0)
    before = start_memory(config.device)
    step = {"ours": our_step, "fork": fork_step}[config.variant](config)
    images = torch.randint(0, 256, (config.batch_size, 3, *config.input_shape), dtype=torch.uint8)
    targets = torch.rand(config.batch_size * config.boxes, 6)
    targets[:, 0] = torch.arange(config.batch_size).repeat_interleave(config.boxes)
    targets[:, 1] = torch.randint(config.num_classes, (len(targets),))
    seconds = []
    for number in range(config.steps + 1):
        start = time.perf_counter()
        step(images, targets)
        if config.device == "cuda":
            torch.cuda.synchronize()
        if number:  # the first warms up
            seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "peak": peak_memory(config.device) - before}


def our_step(config: Config) -> Callable[[Tensor, Tensor], object]:
    device = torch.device(config.device)
    model = YoloV4(config.num_classes).to(device, memory_format=torch.channels_last)
    model.backbone.recompute = config.recompute
    return TrainStep(
        model=model,
        loss=YOLOLoss(ANCHORS, config.num_classes, config.input_shape).to(device),
        optimizer=build_optimizer("sgd", model, momentum=0.937, weight_decay=5e-4),
        ema=None,  # the fork has one only as an option
        device=device,
        amp_dtype=amp_dtype(config.amp, device),
        clip_norm=10.0,
    )


def fork_step(config: Config) -> Callable[[Tensor, Tensor], object]:
    model: nn.Module = ForkYolo(config.num_classes).to(config.device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.937, nesterov=True, weight_decay=5e-4
    )

    def step(images: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        outputs = model(images.to(config.device).float() / 255)
        terms = reference_loss(
            outputs, targets.to(config.device), config.num_classes, config.input_shape
        )
        terms["total"].backward()
        optimizer.step()

    return step


def start_memory(device: str) -> int:
    """Bytes in use before anything is built; the peak counts from here."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    RESET_PEAK.write_text("5")  # Linux only
    return status_bytes("VmRSS")


def peak_memory(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else status_bytes("VmHWM")


if __name__ == "__main__":
    run_script(main)
