"""Find objects in images with a trained checkpoint, from Python or for predict.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any, TypeVar, overload

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data.image import read_image
from data.letterbox import letterbox, letterbox_to_image
from engine.settings import detection_dtype
from metrics.calibration import is_measured
from metrics.nms import non_max_suppression
from nets.decode import decode
from utils.distributed import select_device
from utils.errors import UserError
from utils.heap import keep_freed_memory
from weights.checkpoint import build_model
from weights.foreign import FileMetadata, read_network

ImageLike = str | PathLike | np.ndarray | Image.Image
Some = TypeVar("Some", bound=ImageLike)


@dataclass(frozen=True)
class Detections:
    """Objects of one image, by falling score.

    Attributes:
        boxes_xyxy: float32 (n, 4), pixels of the original image, clipped to it.
        scores: float32 (n,).
        class_ids: int64 (n,), indices into class_names.
        class_names: All names.
    """

    boxes_xyxy: np.ndarray
    scores: np.ndarray
    class_ids: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.scores)


class Predictor:
    """A detector from a checkpoint: `Predictor("best.pt")("street.jpg").boxes_xyxy`.

    Evaluation, in training and afterwards, is always in float32: one mAP, whatever the device.
    On a CPU freed memory stays with the process from then on (utils/heap.py).

    Args:
        device: "cpu", "cuda", "cuda:1"; None takes CUDA when it is there.
        conf_threshold: Lowest score kept; None takes the checkpoint's own, which had the best F1 in
            validation.
        nms_iou: Boxes of a class that overlap a better one by more are dropped.
        class_thresholds: Take, instead, for each class the score at which that class had it.
        metadata: What a file of another program does not say, such as darknet's.
        amp: Of network weights and activations (boxes are float32): auto (fp16 on a GPU, else
            off), bf16, fp16 or off.

    Attributes:
        max_score: Highest score that the last call saw, kept or not; None before any image.
        stand_in: Whether the thresholds are the checkpoint's, but not measured by an evaluation.

    Raises:
        UserError: For weights, device, thresholds or amp that cannot be used.
    """

    def __init__(
        self,
        weights: str | PathLike,
        *,
        device: str | torch.device | None = None,
        conf_threshold: float | None = None,
        nms_iou: float = 0.45,
        class_thresholds: bool = False,
        metadata: FileMetadata | None = None,
        amp: str = "auto",
    ):
        self.device = select_device(str(device or ""))
        self.dtype = detection_dtype(amp, self.device)
        checkpoint = read_network(fspath(weights), metadata or FileMetadata())
        self.class_names = tuple(checkpoint["class_names"])
        self.class_thresholds: dict[str, float] = {}  # empty: conf_threshold holds for all
        self.stand_in = conf_threshold is None and not is_measured(checkpoint["metrics"])
        if class_thresholds:
            self.class_thresholds = _class_thresholds(checkpoint, weights, conf_threshold)
            conf_threshold = min(self.class_thresholds.values())
        elif conf_threshold is None:
            conf_threshold = checkpoint["conf_threshold"]
        self.conf_threshold = _fraction("conf_threshold", conf_threshold)
        self.nms_iou = _fraction("nms_iou", nms_iou)
        self.anchors = checkpoint["anchors"]
        self.input_shape = tuple(checkpoint["input_shape"])
        self.scale_xy = checkpoint["scale_xy"]
        self.model = build_model(checkpoint, self.device, self.dtype)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.max_score: float | None = None

    @overload
    def __call__(self, images: ImageLike, *, batch_size: int = 8) -> Detections: ...

    @overload
    def __call__(
        self, images: list[Some] | tuple[Some, ...], *, batch_size: int = 8
    ) -> list[Detections]: ...

    def __call__(
        self, images: ImageLike | list[Some] | tuple[Some, ...], *, batch_size: int = 8
    ) -> Detections | list[Detections]:
        """Detect in an image, or in a list of them.

        Args:
            images: A path, an RGB uint8 array (H, W, 3), also (H, W) grey or (H, W, 4) with alpha,
                or a PIL image; or a list of such.
            batch_size: Images that pass the network together.

        Returns:
            Detections; a list of them for a list.

        Raises:
            UserError: For anything else.
        """
        self.max_score = None
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: give 1 or more.")
        if not isinstance(images, list | tuple):
            return self._detect([images])[0]
        detections: list[Detections] = []
        for start in range(0, len(images), batch_size):
            detections += self._detect(images[start : start + batch_size])
        return detections

    @torch.inference_mode()
    def _detect(self, inputs: Sequence[ImageLike]) -> list[Detections]:
        images = [to_rgb(item) for item in inputs]
        outputs = self.model(self._to_input(images))
        decoded = decode(outputs, self.anchors, self.input_shape, self.scale_xy)
        probabilities, class_ids = decoded[..., 5:].max(dim=-1)
        scores = decoded[..., 4] * probabilities
        highest = scores.max().item()
        if self.dtype == torch.float16:
            check_range(outputs)
        self.max_score = highest if self.max_score is None else max(highest, self.max_score)
        if self.class_thresholds:
            limits = scores.new_tensor([self.class_thresholds[name] for name in self.class_names])
            # Dropped before NMS counts its candidates: a negative score passes no threshold.
            decoded[..., 4].masked_fill_(scores < limits[class_ids], -1)
        rows = non_max_suppression(decoded, self.conf_threshold, self.nms_iou)
        return [
            self._to_detections(found.cpu(), image.shape[:2])
            for found, image in zip(rows, images, strict=True)
        ]

    def _to_input(self, images: Sequence[np.ndarray]) -> Tensor:
        """(B, 3, *input_shape) RGB in 0..1, of the model's dtype and channels_last as it is."""
        batch = np.stack([letterbox(image, self.input_shape) for image in images])
        pixels = torch.from_numpy(batch).to(self.device).permute(0, 3, 1, 2).float() / 255
        return pixels.to(self.dtype)

    def _to_detections(self, rows: Tensor, image_hw: tuple[int, int]) -> Detections:
        boxes = letterbox_to_image(rows[:, :4], self.input_shape, image_hw)
        return Detections(
            boxes_xyxy=boxes.numpy(),
            scores=rows[:, 4].numpy(),
            class_ids=rows[:, 5].long().numpy(),
            class_names=self.class_names,
        )


def check_range(outputs: Sequence[Tensor]) -> None:
    """Raise UserError where raw maps in float16 are not finite: NMS would drop such boxes."""
    if not torch.stack([raw.isfinite().all() for raw in outputs]).all():
        raise UserError(
            "The network's activations exceed the range of float16 on this image. Use amp off, "
            "or bf16 where the GPU has it."
        )


def to_rgb(image: ImageLike) -> np.ndarray:
    """A path, array or PIL image as RGB uint8 (H, W, 3); transparency is laid on white.

    Raises UserError for another type, shape or number format, and for an image without pixels.
    """
    if isinstance(image, str | PathLike):
        return read_image(image)
    if isinstance(image, Image.Image):
        image = _pil_to_array(image)
    if not isinstance(image, np.ndarray):
        raise UserError(
            f"cannot detect in a {type(image).__name__}: give a path, an RGB uint8 array "
            "(H, W, 3) or a PIL image, or a list of these."
        )
    if image.dtype != np.uint8:
        raise UserError(
            f"an image array must be uint8 in 0..255, got {image.dtype}; "
            "one of floats in 0..1 becomes that by (image * 255).round().astype('uint8')."
        )
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
        raise UserError(f"an image array must be (H, W, 3), (H, W) or (H, W, 4): {image.shape}.")
    if image.size == 0:
        raise UserError(f"an image without pixels: shape {image.shape}.")
    return _to_three_channels(image)


def _pil_to_array(image: Image.Image) -> np.ndarray:
    if image.mode == "F" or image.mode.startswith("I"):
        raise UserError(
            f"a PIL image of mode {image.mode} has no fixed range: "
            "convert it to 8 bits, or give the path of its file."
        )
    upright = ImageOps.exif_transpose(image)
    return np.asarray(upright.convert("RGBA" if upright.has_transparency_data else "RGB"))


def _to_three_channels(image: np.ndarray) -> np.ndarray:
    if image.ndim == 2:
        return np.repeat(image[..., None], 3, axis=2)
    if image.shape[2] == 3:
        return image
    alpha = image[..., 3:] / np.float32(255)
    return (image[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)


def _class_thresholds(
    checkpoint: Mapping[str, Any], weights: str | PathLike, conf_threshold: float | None
) -> dict[str, float]:
    """Each class's score of best F1, as the evaluation of the training has found it."""
    if conf_threshold is not None:
        raise UserError(
            f"conf_threshold {conf_threshold} and class_thresholds are both given. Give one: a "
            "score for all classes, or each class's own."
        )
    names, found = checkpoint["class_names"], checkpoint["metrics"].get("class_thresholds", {})
    if any(name not in found for name in names):
        raise UserError(
            f"{weights}: the checkpoint holds no class_thresholds: it was saved before the first "
            "evaluation, or by an older version. Leave class_thresholds out, or train on."
        )
    return {name: _fraction(f"class_thresholds[{name!r}]", found[name]) for name in names}


def _fraction(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise UserError(f"{name} is {value}: give a number from 0 to 1.")
    return float(value)
