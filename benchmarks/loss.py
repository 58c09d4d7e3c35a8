"""The loss against the plain reference, forward and backward, side by side in one process.

python -m benchmarks.loss [--device cuda --batch_size 64 ...]
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from torch import Tensor

from losses.assign import ASSIGNERS
from losses.yolo_loss import YOLOLoss
from nets.decode import STRIDES
from tests.reference_loss import ANCHORS, reference_loss
from utils.errors import UserError, run_script


@dataclass(frozen=True)
class Config:
    # Every line is also a flag; its comment is the flag's help.
    device: str = "cpu"  # cpu or cuda
    batch_size: int = 8  # images
    input_shape: tuple[int, int] = (416, 416)  # height, width in pixels; multiples of 32
    num_classes: int = 80  # as COCO
    boxes: int = 15  # ground truths an image
    focal_loss: bool = False  # the focal confidence term instead of BCE
    assigner: str = "best_anchor"  # of ours; the reference knows best_anchor alone
    rounds: int = 10  # timed steps of each, alternating
    seed: int = 0  # of maps and boxes
    # for benchmarks.original: one alone, figures as JSON
    variant: Literal["", "ours", "reference"] = ""


def make_batch(config: Config) -> tuple[list[Tensor], Tensor]:
    """Random raw maps, as leaves that take gradients, and boxes of all sizes."""
    torch.manual_seed(config.seed)
    channels, (height, width) = 3 * (5 + config.num_classes), config.input_shape
    sizes = [(config.batch_size, channels, height // s, width // s) for s in STRIDES]
    outputs = [torch.randn(size).to(config.device).requires_grad_() for size in sizes]
    targets = torch.rand(config.batch_size * config.boxes, 6)
    targets[:, 0] = torch.arange(config.batch_size).repeat_interleave(config.boxes)
    targets[:, 1] = torch.randint(config.num_classes, (len(targets),))
    targets[:, 4:] = 0.02 + 0.6 * targets[:, 4:] ** 2
    return outputs, targets.to(config.device)


def make_steps(
    config: Config, outputs: list[Tensor], targets: Tensor
) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """What computes the terms of the loss, by name."""
    shape, classes = config.input_shape, config.num_classes
    loss = YOLOLoss(
        ANCHORS, classes, shape, focal_loss=config.focal_loss, assigner=config.assigner
    ).to(config.device)

    def reference() -> dict[str, Tensor]:
        return reference_loss(fresh(outputs), targets, classes, shape, focal_loss=config.focal_loss)

    # Ours in the memory that the trainer's network gives, the reference in the fork's.
    memory = torch.channels_last
    own = [raw.detach().clone(memory_format=memory).requires_grad_() for raw in outputs]
    return {"ours": lambda: loss(fresh(own), targets), "reference": reference}


def fresh(leaves: list[Tensor]) -> list[Tensor]:
    """The leaves themselves, without a gradient."""
    for leaf in leaves:
        leaf.grad = None
    return leaves


def step_times(
    steps: dict[str, Callable[[], dict[str, Tensor]]], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each step, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            taken = step_seconds(step, device)
            if turn:  # the first is a warm-up
                seconds[name].append(taken)
    return seconds


def step_seconds(step: Callable[[], dict[str, Tensor]], device: torch.device) -> float:
    """Forward and backward, until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    step()["total"].backward()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_no_sync(step: Callable[[], dict[str, Tensor]]) -> None:
    """On CUDA a step that waits for the device raises here."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()["total"].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    print("no synchronisation inside the loss: checked with set_sync_debug_mode('error')")


def main() -> None:
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device. Use --device cpu.")
    if config.assigner not in ASSIGNERS:
        raise UserError(f"--assigner {config.assigner}: allowed are {', '.join(ASSIGNERS)}.")
    outputs, targets = make_batch(config)
    steps = make_steps(config, outputs, targets)
    if config.variant:
        steps = {config.variant: steps[config.variant]}
    totals = {name: step()["total"].item() for name, step in steps.items()}
    seconds = step_times(steps, targets.device, config.rounds)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    if config.variant:
        print(json.dumps({"seconds": median[config.variant], "total": totals[config.variant]}))
        return
    print(f"{config}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    print(f"total: ours {totals['ours']:.6f}, reference {totals['reference']:.6f}")
    for name, times in seconds.items():
        print(f"{name:9} median {1e3 * median[name]:8.2f} ms, fastest {1e3 * min(times):8.2f} ms")
    gradient_bytes = sum(raw.numel() * raw.element_size() for raw in outputs)
    gb_per_s = gradient_bytes / median["ours"] / 1e9
    print(f"ours writes {gradient_bytes / 1e6:.1f} MB of gradients at least: {gb_per_s:.1f} GB/s")
    print(f"ratio {median['reference'] / median['ours']:.2f} (reference / ours)")
    if config.device == "cuda":
        check_no_sync(steps["ours"])


if __name__ == "__main__":
    run_script(main)
