"""The original fork's own code at work: a process that benchmarks.original starts.

    python original_child.py CLONE      # in a folder with job.json and the row's inputs

It imports nothing of this project, whose packages `nets` and `utils` have the names of the
fork's: the clone takes their place on the search path. The result is a line of JSON.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

MASK = [[6, 7, 8], [3, 4, 5], [0, 1, 2]]  # the fork's anchors of strides 32, 16, 8
RESET_PEAK, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")  # Linux only


def main() -> None:
    job = json.loads(Path("job.json").read_text(encoding="utf-8"))
    sys.path[0] = sys.argv[1]  # was the folder of this file, whose names could hide others
    torch.set_num_threads(job["threads"])
    torch.backends.cudnn.benchmark = True  # as its train.py has it
    rows = {"loss": run_loss, "sample": run_sample, "step": run_step, "detect": run_detect}
    print(json.dumps(rows[job["row"]](job)))


def run_loss(job: dict[str, Any]) -> dict[str, float]:
    """Forward and backward over the three scales, from the coarsest, as its training goes."""
    maps, targets = torch.load("batch.pt", map_location=job["device"])
    maps = [raw.requires_grad_() for raw in reversed(maps)]
    truths, loss = by_image(targets, len(maps[0])), make_loss(job)

    def run() -> Tensor:
        for raw in maps:
            raw.grad = None
        total = sum(loss(scale, raw, truths) for scale, raw in enumerate(maps))
        total.backward()
        return total

    return {"total": run().item(), "seconds": median_seconds(run, job["rounds"], job)}


def make_loss(job: dict[str, Any]) -> nn.Module:
    from nets.yolo_training import YOLOLoss

    class OneDevice(YOLOLoss):
        """The fork indexes a mask on the CPU by one on the GPU: it gets it on the GPU here."""

        def get_ignore(self, *arguments: Any) -> tuple[Tensor, Tensor]:
            *others, mask = arguments
            return super().get_ignore(*others, mask.type_as(others[1]))

    anchors, cuda = np.array(job["anchors"], dtype=float), job["device"] == "cuda"
    return OneDevice(anchors, job["num_classes"], job["input_shape"], cuda)


def by_image(targets: Tensor, batch: int) -> list[Tensor]:
    """(N, 6) index, class, cx, cy, w, h -> for each image (n, 5) cx, cy, w, h, class."""
    columns = targets[:, [2, 3, 4, 5, 1]]
    return [columns[targets[:, 0] == index] for index in range(batch)]


def run_sample(job: dict[str, Any]) -> dict[str, float]:
    """Mosaic samples on one core, as its data loader's workers make them."""
    import cv2

    from utils.dataloader import YoloDataset

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    lines = Path("lines.txt").read_text(encoding="utf-8").splitlines()
    augmentation = {"mosaic": True, "mosaic_prob": 1, "mixup": False, "mixup_prob": 0}
    data = YoloDataset(lines, job["input_shape"], 3, epoch_length=1, train=True, **augmentation)

    def run() -> None:
        for index in range(job["samples"]):
            data[index]

    return {"seconds": median_seconds(run, job["rounds"], job) / job["samples"]}


def run_step(job: dict[str, Any]) -> dict[str, float]:
    """Forward, loss, backward and SGD, in float32 as it ships; without DataParallel around it."""
    before = start_memory(job["device"])
    from nets.yolo import YoloBody  # type: ignore[attr-defined]  # the clone's nets, not ours

    images, targets = torch.load("batch.pt")
    images = images.float() / 255  # by its loader's workers: not part of the step
    truths = by_image(targets.to(job["device"]), len(images))
    model = YoloBody(MASK, job["num_classes"]).to(job["device"]).train()
    loss, optimizer = make_loss(job), make_optimizer(model)

    def run() -> None:
        optimizer.zero_grad()
        outputs = model(images.to(job["device"]))
        sum(loss(scale, raw, truths) for scale, raw in enumerate(outputs)).backward()
        optimizer.step()

    seconds = median_seconds(run, job["steps"], job)
    return {"seconds": seconds, "peak": peak_memory(job["device"]) - before}


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """SGD with its numbers: the weights of convolutions decay, nothing else does."""
    decayed = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    known = {id(weight) for weight in decayed}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": 5e-4}, {"params": others}]
    return torch.optim.SGD(groups, lr=0.01, momentum=0.937, nesterov=True)


def run_detect(job: dict[str, Any]) -> dict[str, float]:
    """An image's file to its boxes, without the drawing, at the threshold that keeps so many."""
    find = make_detector(job)
    scores = np.sort(find(job["lowest"]))
    if len(scores) < job["boxes"]:
        sys.exit(f"the original finds {len(scores)} boxes, fewer than the {job['boxes']} wanted")
    threshold = float(scores[-job["boxes"]])
    seconds = median_seconds(lambda: find(threshold), job["images"], job)
    return {"seconds": seconds, "boxes": len(find(threshold))}


def make_detector(job: dict[str, Any]) -> Callable[[float], np.ndarray]:
    """What finds an image's boxes at a threshold and returns their scores."""
    from nets.yolo import YoloBody  # type: ignore[attr-defined]  # the clone's nets, not ours
    from utils.utils import cvtColor, preprocess_input, resize_image
    from utils.utils_bbox import DecodeBox

    classes, (height, width) = job["num_classes"], job["input_shape"]
    network = YoloBody(MASK, classes)
    network.load_state_dict(torch.load("fork.pth"))
    network.to(job["device"]).eval()
    boxes = DecodeBox(np.array(job["anchors"], dtype=float), classes, (height, width), MASK)

    @torch.no_grad()
    def find(threshold: float) -> np.ndarray:
        image = Image.open("image.jpg")
        image_hw = np.asarray(image).shape[:2]
        resized = resize_image(cvtColor(image), (width, height), False)
        pixels = preprocess_input(np.array(resized, dtype=np.float32)).transpose(2, 0, 1)[None]
        decoded = torch.cat(
            boxes.decode_box(network(torch.from_numpy(pixels).to(job["device"]))), 1
        )
        limits = {"conf_thres": threshold, "nms_thres": job["nms_iou"]}
        shapes = (height, width), image_hw
        rows = boxes.non_max_suppression(decoded, classes, *shapes, False, **limits)[0]
        return rows[:, 4] * rows[:, 5]

    return find


def median_seconds(run: Callable[[], object], count: int, job: dict[str, Any]) -> float:
    """Of `count` runs until the device has finished, after one that warms up."""
    seconds = []
    for _ in range(count + 1):
        synchronize(job["device"])
        start = time.perf_counter()
        run()
        synchronize(job["device"])
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def start_memory(device: str) -> int:
    """Bytes in use before anything is built; the peak counts from here."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    RESET_PEAK.write_text("5")
    return status_bytes("VmRSS")


def peak_memory(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else status_bytes("VmHWM")


def status_bytes(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
