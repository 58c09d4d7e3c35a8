"""Train YOLOv4 on VOC-format images. Edit the constants of Config, or give them as flags."""

import dataclasses
import inspect
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from data.augment import Augmentation
from data.dataset import VocDataset
from data.voc import Sample, read_class_names
from engine.config import (
    check_same_anchors,
    check_same_classes,
    check_same_settings,
    describe_recipe,
    parse_config,
    recipe_values,
    run_folder,
    shared,
)
from engine.console import describe, how_to_go_on, how_to_use
from engine.process import seed_everything
from engine.runlog import RunLog, removed_if_unused
from engine.settings import (
    MultiScale,
    TrainingSettings,
    agree_on_precision,
    amp_dtype,
    epochs_for,
    plan_phases,
)
from engine.start import (
    build_network,
    check_config,
    choose_anchors,
    choose_scale_xy,
    other_decode,
    read_splits,
    set_prior,
)
from engine.trainer import Trainer
from losses.conf.spec import conf_loss_spec
from losses.yolo_loss import YOLOLoss
from nets.decode import YOLOV4_ANCHORS, read_anchors
from nets.memory import move
from nets.yolo import YoloV4
from utils.distributed import (
    broadcast_object,
    first_of_machine_first,
    is_main,
    patient_group,
    process_group,
    select_device,
)
from utils.errors import run_script
from utils.memory import LESS_MEMORY, memory_cure
from weights.loading import LoadReport


@dataclasses.dataclass(frozen=True)
class Config:
    # Edit the values here, or give them as flags. Each comment is the help text of its flag.
    recipe: str = "default"  # default: the values below; fork: the original fork's settings

    # Data
    train: str = "VOCdevkit/VOC2007:train"  # training split as ROOT:SPLIT; join several with +
    val: str = "VOCdevkit/VOC2007:val"  # validation split as ROOT:SPLIT; selects best.pt
    classes_path: str = "model_data/voc_classes.txt"  # text file of class names, one per line
    # text file of nine anchors, w,h in pixels of the network input; default: YOLOv4's anchors,
    # scaled down for small objects
    anchors_path: str = ""
    skip_bad: bool = False  # skip unreadable images and annotations instead of stopping
    include_difficult: bool = False  # train and evaluate on objects marked difficult
    cache: bool = False  # cache decoded images in RAM
    cache_gb: float = 2.0  # RAM limit of --cache in GiB
    # with --cache: images beyond --cache_gb go to a cache file in this folder, reused by later runs
    cache_dir: str = ""

    # Network
    weights: str = ""  # pretrained weights: .pt, .pth or darknet .weights; default: from scratch
    weights_classes: str = ""  # class names of --weights, for .weights and .pth files
    width: float = 1.0  # channel multiplier; 1 is the full YOLOv4
    depth: float = 1.0  # multiplier of the number of residual blocks; 1 is the full YOLOv4
    input_shape: tuple[int, int] = (416, 416)  # height and width in pixels, multiples of 32
    # grid sensitivity per scale (darknet's scale_x_y); default: 2 2 2, or taken from --weights
    scale_xy: tuple[float, float, float] | None = None
    init: str = "kaiming"  # weight initialization: kaiming, or normal (the original fork's)

    # Loss
    focal_loss: bool = False  # use focal loss for the confidence term
    focal_alpha: float = 0.25  # with --focal_loss: weight of positives; negatives get 1 - alpha
    focal_gamma: float = 2.0  # with --focal_loss: focusing parameter; 0 is weighted BCE
    conf_loss: str = ""  # any confidence loss, as name(key=value) or my_module:Class
    cls_loss: str = "bce"  # classification loss: bce, focal(gamma=1) or any element-wise loss
    box_loss: str = "ciou"  # box regression loss: iou, giou, diou, ciou, siou or eiou
    label_smoothing: float = 0.0  # smoothing e of class targets: y (1 - e) + e / 2
    # label assignment: best_anchor, iou_threshold, neighbours, aligned
    assigner: str = "neighbours"
    # with --assigner iou_threshold: minimum IoU of anchor and object
    anchor_threshold: float = 0.213
    # predictions whose IoU with any object exceeds this are ignored, not counted as negatives
    ignore_threshold: float = 0.5
    balance: tuple[float, float, float] = (4.0, 1.0, 0.4)  # confidence weight at stride 8, 16, 32
    loc_gain: float = 1.0  # weight of the box regression loss
    cls_gain: float = 12.0  # weight of the classification loss
    # objectness target of positives: 0 is always 1, 1 is the IoU of the box, between is a mix
    iou_target: float = 1.0

    # Optimization
    epochs: int = 0  # total epochs, including --freeze_epochs; 0: chosen from the number of images
    patience: int = 0  # stop after this many epochs without a better validation AP50; 0: never
    batch_size: int = 8  # images per GPU
    accumulate: int = 1  # gradient accumulation: batches per optimizer step
    freeze_epochs: int = 0  # train this many first epochs with a frozen backbone; needs --weights
    freeze_batch_size: int = 16  # images per GPU while the backbone is frozen
    optimizer: str = "adamw"  # sgd, adam or adamw
    # learning rate at a total batch of 64, scaled with the batch; default: the optimizer's
    lr: float | None = None
    momentum: float = 0.937  # momentum of SGD, beta1 of Adam and AdamW
    # on convolution weights; default: SGD 5e-4, Adam 0, AdamW .05
    weight_decay: float | None = None
    schedule: str = "cosine"  # learning rate schedule: cosine with warm-up, or step
    clip_norm: float = 10.0  # clip the gradient norm to this; 0 disables clipping
    ema: bool = True  # evaluate and save an exponential moving average of the weights
    ema_decay: float = 0.9998  # decay of the EMA; ramped up at the start
    recompute: bool = False  # gradient checkpointing in the backbone: less memory, slower
    amp: str = "auto"  # mixed precision: auto, bf16, fp16 or off; auto is off on a CPU

    # Augmentation
    # oversample images with classes that appear in less than this fraction of the images; 0: off
    repeat_threshold: float = 0.0
    mosaic_prob: float = 0.5  # probability that a sample is a mosaic of four images
    mixup_prob: float = 0.0  # probability of mixup per mosaic
    strong_share: float = 0.8  # disable mosaic and mixup after this fraction of the epochs
    scale: tuple[float, float] = (0.5, 1.5)  # range of random resizing of a single image
    mosaic_scale: tuple[float, float] = (0.6, 1.5)  # range of random resizing within a mosaic
    jitter: float = 0.1  # random change of the aspect ratio, up to this fraction
    flip_prob: float = 0.5  # probability of a horizontal flip
    hsv: tuple[float, float, float] = (0.015, 0.7, 0.4)  # maximum hue, saturation, value change
    multi_scale: float = 0.0  # resize the input every ten steps by up to this fraction; 0: off

    # Run
    device: str = ""  # cpu, cuda or cuda:N; default: CUDA when available
    num_workers: int = 4  # data loading processes; 0 loads in the main process
    seed: int = 0  # seed of weights, order and augmentation
    deterministic: bool = False  # bitwise reproducible training; slower on a GPU
    log_period: int = 10  # log loss and per-scale statistics every N steps
    eval_period: int = 5  # compute validation loss and mAP every N epochs
    # save last.pt every N epochs; 0: often, but in less than 5% of the time, and every five minutes
    save_period: int = 0
    save_dir: str = ""  # folder of the run, empty or new; default: logs/<time>
    resume: str = ""  # resume this run: its folder or its last.pt


# Flags that may change on --resume; all others are fixed.
CHANGEABLE = (
    *("train", "val", "classes_path", "skip_bad", "cache", "cache_gb", "cache_dir", "epochs"),
    "patience",
    *("device", "num_workers", "deterministic", "log_period", "eval_period", "save_period"),
    *("save_dir", "resume", "lr", "clip_norm", "amp", "recompute"),
)


def main() -> None:
    config, resume = parse_config(Config, description=__doc__, changeable=CHANGEABLE)
    device = select_device(config.device)
    check_config(config, resumes=resume is not None)
    with process_group(device), memory_cure(LESS_MEMORY):
        train(config, resume, device)


def train(config: Config, resume: dict[str, Any] | None, device: torch.device) -> None:
    """Read the data, build model and loss, and train; print how to use the weights."""
    class_names = read_class_names(config.classes_path)
    if config.anchors_path:
        check_same_anchors(read_anchors(config.anchors_path), resume)
    check_same_classes(class_names, config.classes_path, resume)
    make_settings(config, device)  # finds a wrong constant before the data is read
    model, report = make_model(config, class_names, starts=resume is None)
    scale_xy = choose_scale_xy(config.scale_xy, report, resume)
    build_loss(config, YOLOV4_ANCHORS, len(class_names), scale_xy)  # for the same reason
    training_set(config, [])  # likewise
    move(model, device)
    folder = broadcast_object(run_folder(config.resume, config.save_dir) if is_main() else None)
    train_set, val_samples = load_data(config, class_names, folder)
    config = with_epochs(config, len(train_set))
    anchors = choose_anchors(
        config.anchors_path, train_set.samples, config.input_shape, report=report, resume=resume
    )
    seed_everything(config.seed, deterministic=config.deterministic)  # a loss draws after any model
    loss = build_loss(config, anchors, len(class_names), scale_xy).to(device)
    check_same_settings(loss.conf_settings._asdict(), resume)
    if resume is None:
        set_prior(model, loss.prior_pi, report)
    metadata = checkpoint_metadata(
        config, class_names, anchors=anchors, scale_xy=scale_xy, loss=loss
    )
    if is_main():
        for note in other_decode(report, anchors=anchors, scale_xy=scale_xy):
            print(f"note: {note}")
    settings = agree_on_precision(make_settings(config, device))
    parts = {"model": model, "loss": loss, "settings": settings, "metadata": metadata}
    parts["device"] = device
    run(config, folder, parts, train_set=train_set, val_samples=val_samples, resume=resume)


def run(
    config: Config,
    folder: Path,
    parts: dict[str, Any],
    *,
    resume: dict[str, Any] | None,
    **data: Any,
) -> None:
    """Train with the Trainer's parts and data; print what is trained, and what to do afterwards."""
    last_epoch = 0 if resume is None else resume["epoch"]
    if is_main():
        print(describe_recipe(config.recipe, dataclasses.asdict(config), recipe_values(config)))
        print(describe(**parts, folder=folder))
        if last_epoch == config.epochs:
            print(f"all {config.epochs} epochs are done; raise --epochs to continue")
    stored = parts["metadata"]["config"]
    run_log = RunLog(folder, stored, last_epoch) if is_main() else nullcontext()
    with run_log as log:
        finished = Trainer(**parts, **data, log=log, resume=resume).fit()
    if is_main():
        stopped = how_to_go_on(folder, config.conf_loss)
        print(how_to_use(folder, config.val) if finished else stopped)
    if not finished:
        sys.exit(130)


def make_model(
    config: Config, class_names: tuple[str, ...], *, starts: bool
) -> tuple[YoloV4, LoadReport | None]:
    """The seeded network and the report of --weights, which a resumed run does not load again."""
    seed_everything(config.seed, deterministic=config.deterministic)
    files: dict[str, Any] = shared(config, ("weights", "weights_classes")) if starts else {}
    model, report = build_network(
        class_names, **shared(config, ("width", "depth", "init")), **files
    )
    model.backbone.recompute = config.recompute
    return model, report


def load_data(
    config: Config, class_names: tuple[str, ...], folder: Path
) -> tuple[VocDataset, list[Sample]]:
    """The training set and the validation samples, checked by the main process."""
    options = shared(config, ("skip_bad", "include_difficult", "classes_path"))
    options |= {"split_dir": folder, "progress": True}
    splits = {"train": config.train, "val": config.val}
    with removed_if_unused(folder), patient_group() as group:
        found = read_splits(splits, class_names, **options) if is_main() else None
        train_samples, val_samples = broadcast_object(found, group)
        with first_of_machine_first(group):  # a file of --cache_dir is written once
            return training_set(config, train_samples), val_samples


def with_epochs(config: Config, images: int) -> Config:
    """The config with its number of epochs: 0 is chosen from the number of images."""
    if config.epochs:
        return config
    config = dataclasses.replace(config, epochs=epochs_for(images))
    if is_main():
        print(f"epochs: {config.epochs}, for {images} images; --epochs sets it")
    return config


def build_loss(
    config: Config, anchors: Any, num_classes: int, scale_xy: tuple[float, ...]
) -> YOLOLoss:
    """The loss that the constants describe."""
    known = inspect.signature(YOLOLoss).parameters
    return YOLOLoss(
        anchors,
        num_classes,
        config.input_shape,
        scale_xy=scale_xy,
        **shared(config, known, but=("input_shape", "scale_xy")),
    )


def make_settings(config: Config, device: torch.device) -> TrainingSettings:
    """How the weights are learnt."""
    shape, share = config.input_shape, config.multi_scale
    fields = [field.name for field in dataclasses.fields(TrainingSettings)]
    return TrainingSettings(
        phases=plan_phases(
            epochs=config.epochs,
            batch_size=config.batch_size,
            freeze_epochs=config.freeze_epochs,
            freeze_batch_size=config.freeze_batch_size,
        ),
        ema_decay=config.ema_decay if config.ema else 0.0,
        amp_dtype=amp_dtype(config.amp, device),
        multi_scale=MultiScale(shape, share, config.seed) if share else None,
        **shared(config, fields, but=("epochs", "ema_decay", "multi_scale")),
    )


def training_set(config: Config, samples: list[Sample]) -> VocDataset:
    """The augmented training images."""
    hue, saturation, value = config.hsv
    strength = shared(config, ("scale", "mosaic_scale", "jitter", "flip_prob"))
    options = shared(
        config,
        ("mosaic_prob", "mixup_prob", "repeat_threshold", "cache", "cache_gb", "cache_dir", "seed"),
    )
    augmentation = Augmentation(**strength, hue=hue, saturation=saturation, value=value)
    return VocDataset(samples, config.input_shape, train=True, augmentation=augmentation, **options)


def checkpoint_metadata(
    config: Config,
    class_names: tuple[str, ...],
    *,
    anchors: Any,
    scale_xy: tuple[float, ...],
    loss: YOLOLoss,
) -> dict[str, Any]:
    """Metadata of every checkpoint: all that is needed to use its network.

    The config includes the settings of the confidence loss, which a later version may change.
    """
    return {
        "class_names": list(class_names),
        "anchors": [list(anchor) for anchor in anchors],
        "input_shape": list(config.input_shape),
        "width": config.width,
        "depth": config.depth,
        "scale_xy": list(scale_xy),
        "conf_loss": conf_loss_spec(**shared(config, inspect.signature(conf_loss_spec).parameters)),
        "config": {**dataclasses.asdict(config), "conf_settings": loss.conf_settings._asdict()},
    }


if __name__ == "__main__":
    run_script(main)
