"""From decoded cells to detections: threshold, best class, non-maximum suppression."""

from importlib import metadata

import torch
from torch import Tensor

from utils.errors import UserError


def non_max_suppression(
    decoded: Tensor,
    conf_threshold: float,
    nms_iou: float,
    *,
    max_candidates: int = 3000,
    max_detections: int = 300,
) -> list[Tensor]:
    """Keep the best of overlapping boxes of a class, one label a box.

    The score is objectness times best class probability. Boxes that are not finite are dropped.

    Args:
        decoded: (B, K, 5 + C) of `decode`: xyxy, objectness, class probabilities.
        conf_threshold: A box is kept when its score is this or more.
        nms_iou: A box is suppressed when its IoU with a better one of its class exceeds this.
        max_candidates: Best boxes of an image that go on to suppression.
        max_detections: Best boxes of an image that are returned.

    Returns:
        For each image float32 (n, 6): xyxy, score, class, by falling score; of equal scores the
        earlier cell comes first.

    Raises:
        UserError: If torch and torchvision do not belong together.
    """
    with torch.no_grad():
        return [
            suppress_image(candidates[:max_candidates], nms_iou)[:max_detections]
            for candidates in (ranked_candidates(cells, conf_threshold) for cells in decoded)
        ]


def ranked_candidates(cells: Tensor, conf_threshold: float) -> Tensor:
    """(K, 5 + C) cells of one image -> (n, 6) xyxy, score, class, by falling score."""
    probability, class_id = cells[:, 5:].float().max(dim=1)
    score = cells[:, 4].float() * probability
    kept = (score >= conf_threshold) & cells[:, :4].isfinite().all(dim=1) & score.isfinite()
    rows = torch.cat((cells[:, :4].float(), score[:, None], class_id[:, None].float()), dim=1)[kept]
    return rows[rows[:, 4].argsort(descending=True, stable=True)]


def suppress_image(candidates: Tensor, nms_iou: float) -> Tensor:
    """Suppress within each class; candidates are (n, 6) by falling score, their order is kept."""
    if len(candidates) == 0:
        return candidates
    # Shifting each class to its own stretch of the plane lets one call serve all classes. In
    # float64: a box may be 22026 (e^10) anchors wide, and a shift of 80 such widths leaves
    # float32 with steps of 64 px, while float64 still resolves a millionth of a pixel.
    boxes = candidates[:, :4].double()
    stretch = boxes.max() - boxes.min() + 1
    shifted = boxes + candidates[:, 5:].double() * stretch
    # Ranks for scores: they have no ties, so the order does not depend on the device's sort.
    ranks = torch.arange(len(boxes), 0, -1, device=boxes.device, dtype=boxes.dtype)
    return candidates[torchvision_nms(shifted, ranks, nms_iou)]


def torchvision_nms(boxes_xyxy: Tensor, scores: Tensor, nms_iou: float) -> Tensor:
    """Indices of the boxes that torchvision's NMS keeps, best first.

    torchvision is imported here, because one built for another torch fails on import.
    """
    try:
        from torchvision.ops import nms

        return nms(boxes_xyxy, scores, nms_iou)
    except (ImportError, RuntimeError) as error:
        mentions = ("torchvision", "C++ ops")
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in mentions):
            raise
        raise UserError(
            f"torch {torch.__version__} and torchvision {torchvision_version()} do not fit "
            f"together ({str(error).splitlines()[0]}). Install a pair from one source: "
            "pip install --upgrade --force-reinstall torch torchvision"
        ) from error


def torchvision_version() -> str:
    """The installed version, read without importing the package."""
    try:
        return metadata.version("torchvision")
    except metadata.PackageNotFoundError:
        return "(not installed)"
