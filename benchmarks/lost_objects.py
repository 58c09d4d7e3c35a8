"""Where a detector loses its objects: no box on it, a low objectness, or the wrong class.

python -m benchmarks.lost_objects --weights A/best.pt B/best.pt --data VOCdevkit/BCCD:test
"""

from dataclasses import dataclass

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torchvision.ops import box_iou

from engine.checkpoint import build_model, read_checkpoint
from engine.distributed import select_device
from engine.evaluator import forward_batches
from utils.decode import decode
from utils.errors import run_script
from utils.letterbox import image_to_letterbox
from utils.voc import Sample, scan_split

ON_IT = 0.5  # IoU from which a box lies on an object


@dataclass(frozen=True)
class Config:
    # Every line is also a flag; its comment is the flag's help.
    weights: tuple[str, ...]  # checkpoints of runs to compare
    data: str  # split, ROOT:SPLIT
    device: str = ""  # cpu or cuda; "" takes a GPU when there is one


def main() -> None:
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    device = select_device(config.device)
    print("Of the most objective box on each object (IoU >= .5), before NMS and any threshold:")
    for path in config.weights:
        checkpoint = read_checkpoint(path)
        names = checkpoint["class_names"]
        samples, _ = scan_split(config.data, names, classes_path=path)
        found = judge(build_model(checkpoint, device), checkpoint, samples, device)
        print(f"\n{path} ({checkpoint['conf_loss']})")
        print(f"{'class':16} objects  with a box  objectness  P(own class)  rightly named")
        for index, name in enumerate(names):
            own = found[found[:, 0] == index, 1:]
            if len(own):
                shares = " ".join(f"{value:12.3f}" for value in own.mean(axis=0))
                print(f"{name:16} {len(own):7}{shares}")


@torch.no_grad()
def judge(
    model: nn.Module, checkpoint: dict, samples: list[Sample], device: torch.device
) -> np.ndarray:
    """(objects, 5): class, and of its box: is there one, objectness, own class, rightly named."""
    input_hw = tuple(checkpoint["input_shape"])
    rows = []
    for batch, outputs, _ in forward_batches(model, samples, input_shape=input_hw, device=device):
        decoded = decode(outputs, checkpoint["anchors"], input_hw, checkpoint["scale_xy"]).cpu()
        for sample, cells in zip(batch, decoded, strict=True):
            boxes_xyxy = torch.from_numpy(sample.boxes_xyxy).float()
            on_input = image_to_letterbox(boxes_xyxy, sample.image_hw, input_hw)
            overlaps = box_iou(on_input, cells[:, :4]) >= ON_IT
            pairs = zip(overlaps, sample.class_ids.tolist(), strict=True)
            rows += [[class_id, *best_box(cells[on], class_id)] for on, class_id in pairs]
    return np.array(rows)


def best_box(cells: Tensor, class_id: int) -> tuple[float, float, float, float]:
    """Of the (n, 5 + C) decoded boxes on an object, the one of highest objectness."""
    if not len(cells):
        return 0.0, 0.0, 0.0, 0.0
    best = cells[cells[:, 4].argmax()]
    right = float(best[5:].argmax() == class_id)
    return 1.0, float(best[4]), float(best[5 + class_id]), right


if __name__ == "__main__":
    run_script(main)
