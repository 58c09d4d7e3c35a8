"""A whole training step of full YOLOv4: ours beside the original fork's network and loss.

    python -m benchmarks.step                      # CPU: time and peak memory
    python -m benchmarks.step --device cuda --batch_size 64 --amp bf16
    python -m benchmarks.step --device cuda --batch_size 64 --amp bf16 --network   # network alone

Forward, loss, backward and SGD with nesterov momentum. Each variant runs in a process of its own,
so that the peak of memory is its own; the processes run in turn. The reference is
benchmarks/fork_network.py in float32 with tests/reference_loss.py. With --network no loss and no
optimizer: forward, and backward from the sum of the maps. The rate counts the convolutions' work
three times: forward, gradient of their inputs, gradient of their weights.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from typing import Literal

import torch
import tyro
from torch import Tensor, nn

from benchmarks.fork_network import ForkYolo
from benchmarks.processes import RESET_PEAK, run_in_turn, status_bytes
from data.loader import to_input
from engine.optimizer import build_optimizer
from engine.settings import amp_dtype
from engine.trainer import TrainStep
from losses.yolo_loss import YOLOLoss
from nets.memory import move
from nets.yolo import YoloV4
from tests.reference_loss import ANCHORS, reference_loss
from tools.summary import convolution_flops, meta_model, trace_layers
from utils.errors import UserError, run_script
from utils.heap import keep_freed_memory

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Config:
    # Every line is a flag; its comment is the flag's help.
    device: str = "cpu"  # cpu or cuda
    batch_size: int = 4  # images
    input_shape: tuple[int, int] = (416, 416)  # height, width in pixels
    num_classes: int = 20
    boxes: int = 8  # an image
    amp: str = "off"  # of ours: off, bf16 or fp16
    recompute: bool = False  # of ours
    network: bool = False  # the network alone: no loss, no optimizer
    tf32: bool = True  # float32 convolutions on a GPU may use TF32, as torch has it; in both
    steps: int = 2  # timed ones of a process
    rounds: int = 3  # processes of each variant
    variant: Literal["", "ours", "fork"] = ""  # used by the processes


def main() -> None:
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device. Use --device cpu.")
    torch.backends.cudnn.allow_tf32 = config.tf32
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
    print(f"convolutions of ours at {1e-12 * work(config) / ours['seconds']:.3g} TFLOP/s")
    matrix, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    print(f"TF32 on a GPU: convolutions {allowed(convolution)}, matrix products {allowed(matrix)}")


def work(config: Config) -> float:
    """Floating point operations of a step's convolutions."""
    layers = trace_layers(meta_model(config.num_classes), config.input_shape)
    return 3.0 * config.batch_size * convolution_flops(layers)


def allowed(flag: bool) -> str:
    return "allowed" if flag else "not allowed"


def measure(config: Config) -> dict[str, float]:
    """Median seconds of a step, and by how many bytes memory rises at most."""
    before = start_memory(config.device)
    torch.backends.cudnn.benchmark = True
    batch = make_batch(config)
    torch.manual_seed(0)
    prepare = {"ours": our_step, "fork": fork_step}[config.variant]
    step = (network_step if config.network else prepare)(config, *batch)
    seconds = []
    for number in range(config.steps + 1):
        start = time.perf_counter()
        step()
        if config.device == "cuda":
            torch.cuda.synchronize()
        if number:  # the first warms up
            seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "peak": peak_memory(config.device) - before}


def make_batch(config: Config) -> tuple[Tensor, Tensor]:
    """uint8 (B, 3, H, W) images and (N, 6) targets."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (config.batch_size, 3, *config.input_shape), dtype=torch.uint8)
    targets = torch.rand(config.batch_size * config.boxes, 6)
    targets[:, 0] = torch.arange(config.batch_size).repeat_interleave(config.boxes)
    targets[:, 1] = torch.randint(config.num_classes, (len(targets),))
    if config.device == "cuda":
        return images.pin_memory(), targets.pin_memory()
    return images, targets


def our_step(config: Config, images: Tensor, targets: Tensor) -> Callable[[], object]:
    device = torch.device(config.device)
    model = our_network(config)
    step = TrainStep(
        model=model,
        loss=YOLOLoss(ANCHORS, config.num_classes, config.input_shape).to(device),
        optimizer=build_optimizer("sgd", model, momentum=0.937, weight_decay=5e-4),
        ema=None,  # the fork has one only as an option
        device=device,
        amp_dtype=amp_dtype(config.amp, device),
        clip_norm=10.0,
    )
    return lambda: step(images, targets)


def our_network(config: Config) -> YoloV4:
    model = move(YoloV4(config.num_classes), config.device)
    model.backbone.recompute = config.recompute
    return model


def fork_step(config: Config, images: Tensor, targets: Tensor) -> Callable[[], object]:
    model: nn.Module = ForkYolo(config.num_classes).to(config.device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.937, nesterov=True, weight_decay=5e-4
    )

    def step() -> None:
        optimizer.zero_grad()
        outputs = model(images.to(config.device, non_blocking=True).float() / 255)
        terms = reference_loss(
            outputs, targets.to(config.device), config.num_classes, config.input_shape
        )
        terms["total"].backward()
        optimizer.step()

    return step


def network_step(config: Config, images: Tensor, _targets: Tensor) -> Callable[[], None]:
    """Forward and backward of one network, its input on the device before the clock starts."""
    device, dtype = torch.device(config.device), None
    model: nn.Module
    if config.variant == "ours":
        model, inputs = our_network(config), to_input(images, device)
        dtype = amp_dtype(config.amp, device)
    else:
        model, inputs = ForkYolo(config.num_classes).to(device), images.to(device).float() / 255

    def step() -> None:
        model.zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            outputs = model(inputs)
        sum(raw.float().sum() for raw in outputs).backward()
        if device.type == "cpu":
            keep_freed_memory()  # as after a training's step; it holds for the process

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
