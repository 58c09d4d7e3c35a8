"""torchvision's Faster R-CNN with the focal loss as its box classifier, from scratch on the sample.

python examples/faster_rcnn_focal.py    (in the project's folder; --help shows the flags)

The classifier is one sigmoid a class, without a background column: what changes with it is the
prior of its biases, the loss, the selection of proposals and the scores of detections.
"""

import dataclasses
import math
import sys
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN, fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image
from tqdm import trange

sys.path.insert(0, ".")  # a script's own folder is on Python's path, the project's is not
from data.image import read_image
from data.voc import Sample, read_class_names, read_split
from losses.focal import SigmoidFocalClassificationLoss
from tools.make_sample_voc import make_sample
from tools.train_sample import SAMPLE
from utils.distributed import select_device
from utils.errors import UserError, run_script

PRIOR_PI = 0.01  # score of every class before training (Lin et al. 2017)
ENOUGH_STEPS = 20  # from so many on, a loss that has not fallen is an error
Item = tuple[Tensor, dict[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class Config:
    root: Path = SAMPLE  # a VOC tree with classes.txt; the sample is drawn when it is missing
    images: int = 2  # training images, all of them in every step
    steps: int = 100  # updates; a minute or two on two CPU cores
    lr: float = 5e-4  # of AdamW
    seed: int = 0  # of weights and proposals
    device: str = ""  # cpu or cuda; "" takes a GPU when there is one


def box_losses(
    class_logits: Tensor, box_regression: Tensor, labels: Tensor, box_targets: Tensor
) -> dict[str, Tensor]:
    """Focal loss over the number of positives, and Smooth L1 over all N proposals as before.

    class_logits (N, C), box_regression (N, 4 C), box_targets (N, 4); labels (N,) as torchvision
    has them: 0 is background, classes count from 1.
    """
    focal = SigmoidFocalClassificationLoss(gamma=2.0, alpha=0.25, reduction="sum")
    (positive,) = torch.where(labels > 0)
    deltas = box_regression.reshape(*class_logits.shape, 4)[positive, labels[positive] - 1]
    smooth_l1 = F.smooth_l1_loss(deltas, box_targets[positive], beta=1 / 9, reduction="sum")
    return {
        # labels - 1: background becomes -1, which is a negative for every class
        "loss_classifier": focal(class_logits, labels - 1) / max(1, len(positive)),
        "loss_box_reg": smooth_l1 / max(1, len(labels)),
    }


class FocalRoIHeads(RoIHeads):
    """Box heads that train with `box_losses` and score with sigmoids, not a softmax."""

    def forward(self, features, proposals, image_shapes, targets=None):
        if not self.training:
            return super().forward(features, proposals, image_shapes)
        proposals, _, labels, box_targets = self.select_training_samples(proposals, targets)
        pooled = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        outputs = self.box_predictor(pooled)
        return [], box_losses(*outputs, torch.cat(labels), torch.cat(box_targets))

    def postprocess_detections(self, class_logits, box_regression, proposals, image_shapes):
        counts = [len(boxes) for boxes in proposals]
        boxes = self.box_coder.decode(box_regression, proposals).reshape(*class_logits.shape, 4)
        by_image = zip(
            boxes.split(counts), class_logits.sigmoid().split(counts), image_shapes, strict=True
        )
        found = [self.detect(*image) for image in by_image]
        return tuple(map(list, zip(*found, strict=True)))

    def detect(self, boxes: Tensor, scores: Tensor, image_hw: tuple[int, int]):
        """One image's (N, C, 4) boxes and (N, C) scores -> boxes, scores, labels after NMS."""
        rows, classes = torch.where(scores > self.score_thresh)
        boxes = clip_boxes_to_image(boxes[rows, classes], image_hw)
        scores = scores[rows, classes]
        keep = batched_nms(boxes, scores, classes, self.nms_thresh)[: self.detections_per_img]
        return boxes[keep], scores[keep], classes[keep] + 1


def build_model(num_classes: int) -> FasterRCNN:
    """A small Faster R-CNN without pretrained weights, its box heads exchanged."""
    model = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, min_size=192, rpn_post_nms_top_n_train=50
    )
    heads = model.roi_heads
    predictor = FastRCNNPredictor(heads.box_predictor.cls_score.in_features, num_classes)
    nn.init.constant_(predictor.cls_score.bias, -math.log((1 - PRIOR_PI) / PRIOR_PI))
    model.roi_heads = FocalRoIHeads(
        heads.box_roi_pool,
        heads.box_head,
        predictor,
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=512,  # all proposals: with the focal loss none is left out
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=0.3,
        nms_thresh=0.5,
        detections_per_img=100,
    )
    return model


def to_item(sample: Sample, device: torch.device) -> Item:
    """An image, (3, H, W) in 0..1, and its objects, as torchvision's detectors take them."""
    image = torch.from_numpy(read_image(sample.image_path)).permute(2, 0, 1) / 255
    target = {"boxes": sample.boxes_xyxy, "labels": sample.class_ids + 1}
    sure = ~sample.difficult
    return image.to(device), {k: torch.from_numpy(v[sure]).to(device) for k, v in target.items()}


def train(model: FasterRCNN, items: list[Item], *, steps: int, lr: float) -> list[float]:
    """Returns the loss of every step."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=lr)
    images, targets = zip(*items, strict=True)
    history = []
    for _ in (bar := trange(steps, desc="training", unit="step")):
        losses = model(images, targets)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
        bar.set_postfix({name: f"{value.item():.2f}" for name, value in losses.items()})
    return history


@torch.no_grad()
def count_found(model: FasterRCNN, items: list[Item]) -> int:
    """How many objects have a detection of their class with an IoU of at least one half."""
    model.eval()
    found = 0
    for image, target in items:
        (seen,) = model([image])
        right = box_iou(target["boxes"], seen["boxes"]) >= 0.5
        right &= target["labels"][:, None] == seen["labels"]
        found += int(right.any(dim=1).sum())
    return found


def main() -> None:
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    if min(config.images, config.steps) < 1:
        raise UserError(f"images {config.images}, steps {config.steps}: give at least 1 each.")
    device = select_device(config.device)
    if config.root == SAMPLE and not SAMPLE.exists():
        make_sample(SAMPLE, images=300, seed=0, difficulty="easy")
    torch.manual_seed(config.seed)
    class_names = read_class_names(config.root / "classes.txt")
    samples = read_split(f"{config.root}:train", class_names)[: config.images]
    items = [to_item(sample, device) for sample in samples]
    model = build_model(len(class_names)).to(device)
    history = train(model, items, steps=config.steps, lr=config.lr)
    count = max(1, config.steps // 5)
    first, last = sum(history[:count]) / count, sum(history[-count:]) / count
    print(f"mean loss of the first {count} steps {first:.3f}, of the last {last:.3f}")
    if config.steps >= ENOUGH_STEPS and not last < first:
        raise UserError("the loss did not fall: give more --steps or a lower --lr.")
    objects = sum(len(target["labels"]) for _, target in items)
    print(f"finds {count_found(model, items)} of the {objects} objects that it was trained on")


if __name__ == "__main__":
    run_script(main)
