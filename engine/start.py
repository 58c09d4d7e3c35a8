"""What a training starts from: a network, the weights of a file, a decode, an objectness."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data.voc import Sample, read_class_names, scan_split
from nets.decode import YOLOV4_ANCHORS, read_anchors
from nets.yolo import YoloV4, initialise
from utils.distributed import is_main
from utils.errors import UserError
from weights.foreign import check_scale_xy
from weights.loading import LoadReport, load_weights

# A cell beside that of an object's centre reaches the centre, too. Darknet has 1.2, 1.1, 1.05 at
# strides 8, 16, 32, the original fork 1.
SCRATCH_SCALE_XY = (2.0, 2.0, 2.0)
# YOLOv4's anchors as they are suit a median object of 33 pixels, the size of the largest anchor at
# stride 8. Above this share of it they stay: BCCD's 36 pixels do better with them than with smaller
# ones. Below the lower share an object is smaller than a cell of stride 8 anyway.
ANCHORS_AS_THEY_ARE, SMALLEST_ANCHORS = 0.8, 0.2


def check_config(config: Any, *, resumes: bool) -> None:
    """Raise UserError for constants of train.py that are wrong whatever the data are."""
    height, width = config.input_shape
    if min(height, width) < 32 or height % 32 or width % 32:
        raise UserError(f"input_shape {height} {width}: both must be multiples of 32, at least 32.")
    if config.freeze_epochs > 0 and not config.weights and not resumes:
        raise UserError(
            "--freeze_epochs needs pretrained weights: give --weights, or --freeze_epochs 0"
        )
    default = type(config)
    focal = (config.focal_alpha, config.focal_gamma) != (default.focal_alpha, default.focal_gamma)
    if focal and not config.focal_loss:
        raise UserError(
            "focal_alpha and focal_gamma count with --focal_loss only; for another loss write "
            'them in its name: --conf_loss "focal(alpha=0.5, gamma=1)".'
        )
    if not 0 <= config.cache_gb < float("inf"):
        raise UserError(f"cache_gb is {config.cache_gb}; give 0 or more GiB.")
    if config.cache_dir and not config.cache:
        raise UserError("cache_dir is for what --cache cannot keep in memory: give --cache, too.")
    least = {"epochs": 0, "patience": 0, "batch_size": 1, "accumulate": 1, "freeze_batch_size": 1}
    least |= {"log_period": 1, "eval_period": 1, "save_period": 0}
    least |= {"freeze_epochs": 0, "num_workers": 0, "seed": 0}
    for name, low in least.items():
        if getattr(config, name) < low:
            raise UserError(f"{name} is {getattr(config, name)}; give {low} or more.")


def build_network(
    class_names: Sequence[str],
    *,
    width: float,
    depth: float,
    weights: str = "",
    weights_classes: str = "",
    init: str = "kaiming",
) -> tuple[YoloV4, LoadReport | None]:
    """A network with what the file `weights` has for it, and the report of that; "": from scratch.

    weights_classes: file with the class names of weights that do not hold them; "": not known.
    Raises UserError for files that cannot be used.
    """
    model = YoloV4(len(class_names), width=width, depth=depth)
    if init != "kaiming":
        initialise(model, init)
    if not weights and weights_classes:
        raise UserError(
            f"--weights_classes {weights_classes} names the classes of --weights; give both."
        )
    if not weights:
        return model, None
    in_file = read_class_names(weights_classes) if weights_classes else None
    report = load_weights(model, weights, class_names=class_names, file_class_names=in_file)
    if is_main():
        print(report)
    return model, report


def read_splits(
    specs: Mapping[str, str], class_names: Sequence[str], **options: Any
) -> list[list[Sample]]:
    """The samples of each split, whose report is printed under its name.

    options: as `scan_split` takes them. Raises UserError for the faults of all splits at once.
    """
    found, faults = [], []
    for name, spec in specs.items():
        try:
            samples, report = scan_split(spec, class_names, **options)
            print(f"{name}: {report}")
            found.append(samples)
        except UserError as error:
            if str(error) not in faults:  # a missing root is often that of both
                faults.append(str(error))
    if faults:
        raise UserError("\n".join(faults))
    return found


def choose_scale_xy(
    given: Sequence[float] | None, report: LoadReport | None, resume: Mapping[str, Any] | None
) -> tuple[float, ...]:
    """Grid sensitivity: as given, else as the loaded heads were trained, else the default.

    Raises UserError for numbers not above 0.
    """
    loaded = report.scale_xy if report is not None and report.heads_loaded else None
    source = loaded if resume is None else resume["scale_xy"]
    scale_xy = tuple(given or source or SCRATCH_SCALE_XY)
    check_scale_xy(scale_xy)
    return scale_xy


def choose_anchors(
    path: str,
    samples: Sequence[Sample],
    input_shape: tuple[int, int],
    *,
    report: LoadReport | None,
    resume: Mapping[str, Any] | None,
) -> tuple[tuple[float, float], ...]:
    """The nine anchors, (width, height) in pixels of the input, and a line printed if made here.

    Args:
        path: File of anchors; "" takes those of a resumed run or of loaded heads, else YOLOv4's,
            scaled down to the median object of `samples` where that is small.
        samples: The training images.
        input_shape: (height, width) in pixels.
        report: Of the weights that the training starts from, if any.
        resume: Checkpoint of the resumed run, if any.

    Raises:
        UserError: If the file cannot be read.
    """
    if path:
        return read_anchors(path)
    loaded = report if report is not None and report.heads_loaded else None
    known = loaded.anchors if loaded is not None else None
    known = resume["anchors"] if resume is not None else known
    if known is not None or loaded is not None:
        return tuple(map(tuple, known or YOLOV4_ANCHORS))
    size = median_size(samples, input_shape)
    factor = max(size / math.sqrt(math.prod(YOLOV4_ANCHORS[2])), SMALLEST_ANCHORS)
    if not factor < ANCHORS_AS_THEY_ARE:  # or NaN
        return YOLOV4_ANCHORS
    if is_main():
        height, width = input_shape
        print(
            f"anchors: YOLOv4's x {factor:.2f}, since the median object measures {size:.1f} pixels "
            f"at {height} x {width}; --anchors_path sets them"
        )
    return tuple((round(w * factor, 1), round(h * factor, 1)) for w, h in YOLOV4_ANCHORS)


def median_size(samples: Sequence[Sample], input_shape: tuple[int, int]) -> float:
    """sqrt(width * height) of the median object in pixels of the input; NaN without objects."""
    sizes = [np.empty(0)]
    for sample in samples:
        boxes = sample.boxes_xyxy[~sample.difficult]
        scale = min(have / need for have, need in zip(input_shape, sample.image_hw, strict=True))
        sizes.append(np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)) * scale)
    joined = np.concatenate(sizes)
    return float(np.median(joined)) if len(joined) else math.nan


def set_prior(model: YoloV4, prior_pi: float | None, report: LoadReport | None) -> None:
    """Set the objectness prior of new heads to the one of the loss, and print it."""
    if prior_pi is None:
        return
    loaded = report is not None and report.heads_loaded
    if not loaded:
        model.set_objectness_prior(prior_pi)
    if is_main():
        done = "kept as loaded" if loaded else f"set to {prior_pi}"
        print(f"objectness prior of the heads: {done} (the loss declares {prior_pi})")


def other_decode(
    report: LoadReport | None, *, anchors: Sequence[Sequence[float]], scale_xy: Sequence[float]
) -> list[str]:
    """Where loaded heads are about to be read in another way than they were trained.

    report: of the weights that the training starts from, if any.
    """
    if report is None or not report.heads_loaded:
        return []
    pairs = (("scale_xy", scale_xy, report.scale_xy), ("anchors", anchors, report.anchors))
    return [
        f"{name} here is {_plain(here)}, the loaded heads were trained with {_plain(there)}: "
        "the heads predict shifted boxes at first; training corrects this."
        for name, here, there in pairs
        if there is not None and _plain(here) != _plain(there)
    ]


def _plain(numbers: Sequence[Any]) -> str:
    """Numbers, or pairs of them, as a user writes them."""
    words = [
        ",".join(f"{n:g}" for n in item) if isinstance(item, Sequence) else f"{item:g}"
        for item in numbers
    ]
    return " ".join(words)
