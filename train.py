"""Train YOLOv4 on VOC-format images: edit the constants of Config, or give them as flags."""

import dataclasses
import inspect
import sys
from collections.abc import Collection, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from data.augment import Augmentation
from data.dataset import VocDataset
from data.voc import Sample, read_class_names
from engine.console import describe, how_to_go_on, how_to_use
from engine.multi_scale import MultiScale
from engine.presets import FORK, describe_recipe, recipe_changes
from engine.randomness import seed_everything
from engine.recipe import Recipe, amp_dtype, epochs_for, plan_phases
from engine.resume import (
    check_same_anchors,
    check_same_classes,
    check_same_settings,
    folder_of_resumed,
    parse_config,
)
from engine.runlog import RunLog, new_run_folder, removed_if_unused
from engine.start import (
    build_network,
    choose_anchors,
    choose_scale_xy,
    other_decode,
    read_splits,
    set_prior,
)
from engine.trainer import Trainer
from losses.yolo_loss import YOLOLoss
from nets.decode import YOLOV4_ANCHORS, read_anchors
from utils.distributed import (
    broadcast_object,
    first_of_machine_first,
    is_main,
    process_group,
    select_device,
)
from utils.errors import UserError, run_script


@dataclasses.dataclass(frozen=True)
class Config:
    # Edit here. Every line is also a flag; its comment is the flag's help.
    recipe: str = "default"  # default: the values below; fork: the original fork's training

    # Data
    train: str = "VOCdevkit/VOC2007:train"  # training split, ROOT:SPLIT, several joined by +
    val: str = "VOCdevkit/VOC2007:val"  # validation split, which chooses best.pt
    classes_path: str = "model_data/voc_classes.txt"  # class names, one a line
    anchors_path: str = ""  # nine w,h in pixels of the input; "": YOLOv4's, fitted to the objects
    skip_bad: bool = False  # go on without the images that cannot be used
    include_difficult: bool = False  # learn and count difficult objects like any other
    cache: bool = False  # keep decoded images in memory
    cache_gb: float = 2.0  # as many of them as fit into this
    cache_dir: str = ""  # with --cache: the others in a file here, also for later runs; "": none

    # Network
    weights: str = ""  # start from a checkpoint, darknet's .weights or the fork's .pth; "": scratch
    weights_classes: str = ""  # class names of --weights where the file does not hold them
    width: float = 1.0  # channels against YOLOv4's
    depth: float = 1.0  # residual blocks against YOLOv4's
    input_shape: tuple[int, int] = (416, 416)  # height, width in pixels; multiples of 32
    scale_xy: tuple[float, float, float] | None = None  # grid sensitivity; None: from --weights
    init: str = "kaiming"  # initial weights: kaiming, or normal (the original fork's)

    # Loss
    focal_loss: bool = False  # weight the confidence BCE by difficulty
    focal_alpha: float = 0.25  # weight of positives, 1 - alpha for negatives; with --focal_loss
    focal_gamma: float = 2.0  # how fast easy cells fade; with --focal_loss
    conf_loss: str = ""  # another confidence loss: name(key=value) or my_file:Class
    cls_loss: str = "bce"  # class term: bce, focal(gamma=1) or another that looks at one cell
    box_loss: str = "ciou"  # iou, giou, diou, ciou, siou or eiou
    label_smoothing: float = 0.0  # class targets y (1 - e) + e / 2
    assigner: str = "neighbours"  # best_anchor, iou_threshold, neighbours or aligned
    anchor_threshold: float = 0.213  # iou_threshold: anchors whose shape overlaps more are positive
    ignore_threshold: float = 0.5  # cells whose box overlaps an object more are no negatives
    balance: tuple[float, float, float] = (4.0, 1.0, 0.4)  # confidence at strides 8, 16, 32
    loc_gain: float = 1.0  # weight of the location loss
    cls_gain: float = 12.0  # weight of the classification loss
    iou_target: float = 1.0  # objectness target of a positive: 0: 1; 1: the IoU of its box

    # Optimisation
    epochs: int = 0  # total epochs, including --freeze_epochs; 0: from the number of images
    patience: int = 0  # stop after so many epochs without a better validation AP50; 0: never
    batch_size: int = 8  # images a GPU; halve it on "out of memory"
    accumulate: int = 1  # batches an update
    freeze_epochs: int = 0  # first epochs with the backbone frozen; needs --weights
    freeze_batch_size: int = 16  # images a GPU in these epochs
    optimizer: str = "adamw"  # sgd, adam or adamw
    lr: float | None = None  # for 64 images an update; scaled, clamped. None: by optimizer
    momentum: float = 0.937  # of SGD; beta1 of Adam
    weight_decay: float | None = None  # of convolutions; None: SGD 5e-4, Adam 0, AdamW .05
    schedule: str = "cosine"  # cosine with warm-up, or step
    clip_norm: float = 10.0  # longest gradient; 0: no limit
    ema: bool = True  # evaluate and keep an average of the weights
    ema_decay: float = 0.9998  # its decay in a long run; shorter memory at the start
    recompute: bool = False  # compute the backbone's activations twice: less memory, more time
    amp: str = "auto"  # auto: bf16, or fp16 where the GPU lacks it, off on CPU; or bf16, fp16, off

    # Augmentation
    repeat_threshold: float = 0.0  # oversample classes in a smaller share of the images; 0: never
    mosaic_prob: float = 0.5  # probability that a sample is a mosaic of four images
    mixup_prob: float = 0.0  # probability of mixup per mosaic
    strong_share: float = 0.8  # disable mosaic and mixup after this fraction of the epochs
    scale: tuple[float, float] = (0.5, 1.5)  # size of a single image relative to the input
    mosaic_scale: tuple[float, float] = (0.6, 1.5)  # size of the images of a mosaic
    jitter: float = 0.1  # change of aspect ratio
    flip_prob: float = 0.5  # share of mirrored images
    hsv: tuple[float, float, float] = (0.015, 0.7, 0.4)  # change of hue, saturation, value
    multi_scale: float = 0.0  # the input's size changes by up to this share every ten steps; 0: no

    # Run
    device: str = ""  # cpu, cuda or cuda:1; "" takes a GPU when there is one
    num_workers: int = 4  # processes that load images; 0 loads in this one
    seed: int = 0  # of weights, order and augmentation
    deterministic: bool = False  # the same numbers every time, slower on a GPU
    log_period: int = 10  # steps between looks at the cells; the first of an epoch has one too
    eval_period: int = 5  # compute validation loss and mAP every N epochs
    save_period: int = 1  # epochs between last.pt, which is also written every five minutes
    save_dir: str = ""  # the run's folder, empty or new; "" makes logs/<time>
    resume: str = ""  # go on with this run: its folder or last.pt


# What a resumed run may be given anew; the rest is what it started with.
CHANGEABLE = (
    *("train", "val", "classes_path", "skip_bad", "cache", "cache_gb", "cache_dir", "epochs"),
    "patience",
    *("device", "num_workers", "deterministic", "log_period", "eval_period", "save_period"),
    *("save_dir", "resume", "lr", "clip_norm", "amp", "recompute"),
)


def main() -> None:
    config, resume = parse_config(
        Config, description=__doc__, changeable=CHANGEABLE, recipe_changes=recipe_changes
    )
    device = select_device(config.device)
    check_config(config, resumes=resume is not None)
    with process_group(device):
        train(config, resume, device)


def train(config: Config, resume: dict[str, Any] | None, device: torch.device) -> None:
    """Read the data, build model and loss, and train; then say what to do with the weights."""
    class_names = read_class_names(config.classes_path)
    if config.anchors_path:
        check_same_anchors(read_anchors(config.anchors_path), resume)
    check_same_classes(class_names, config.classes_path, resume)
    make_recipe(config, device)  # finds a wrong constant before the data is read
    seed_everything(config.seed, deterministic=config.deterministic)
    model, report = build_network(
        class_names,
        width=config.width,
        depth=config.depth,
        weights="" if resume else config.weights,
        weights_classes="" if resume else config.weights_classes,
        init=config.init,
    )
    model.backbone.recompute = config.recompute
    scale_xy = choose_scale_xy(config.scale_xy, report, resume)
    num_classes = len(class_names)
    build_loss(config, YOLOV4_ANCHORS, num_classes, scale_xy)  # for the same reason
    model = model.to(device, memory_format=torch.channels_last)
    folder = broadcast_object(run_folder(config) if is_main() else None)
    with removed_if_unused(folder):
        train_samples, val_samples = broadcast_object(
            read_data(config, class_names, folder) if is_main() else None
        )
        with first_of_machine_first():  # a file of --cache_dir is written once
            train_set = training_set(config, train_samples)
    anchors = choose_anchors(
        config.anchors_path, train_samples, config.input_shape, report=report, resume=resume
    )
    seed_everything(config.seed, deterministic=config.deterministic)  # a loss draws after any model
    loss = build_loss(config, anchors, num_classes, scale_xy).to(device)
    check_same_settings(loss.conf_settings._asdict(), resume)
    if resume is None:
        set_prior(model, loss.prior_pi, report)
    if not config.epochs:
        config = dataclasses.replace(config, epochs=epochs_for(len(train_samples)))
        if is_main():
            print(f"epochs: {config.epochs}, for {len(train_samples)} images; --epochs sets it")
    recipe = make_recipe(config, device)
    facts = checkpoint_facts(config, class_names, anchors=anchors, scale_xy=scale_xy, loss=loss)
    if is_main():
        for note in other_decode(report, anchors=anchors, scale_xy=scale_xy):
            print(f"note: {note}")
        print(describe_recipe(config.recipe, dataclasses.asdict(config), recipe_values(config)))
        print(describe(model, loss, recipe, facts=facts, device=device, folder=folder))
    last_epoch = 0 if resume is None else resume["epoch"]
    if last_epoch == config.epochs and is_main():
        print(f"all {config.epochs} epochs are done; --epochs gives more, the schedule follows")
    run_log = RunLog(folder, facts["config"], last_epoch) if is_main() else nullcontext()
    with run_log as log:
        trainer = Trainer(
            model=model,
            loss=loss,
            train_set=train_set,
            val_samples=val_samples,
            recipe=recipe,
            facts=facts,
            device=device,
            log=log,
            resume=resume,
        )
        finished = trainer.fit()
    if finished and is_main():
        print(how_to_use(folder, config.val))
    if not finished:
        if is_main():
            print(how_to_go_on(folder, config.conf_loss))
        sys.exit(130)


def check_config(config: Config, *, resumes: bool) -> None:
    """Everything that can be known to be wrong before any data is read."""
    height, width = config.input_shape
    if min(height, width) < 32 or height % 32 or width % 32:
        raise UserError(f"input_shape {height} {width}: both must be multiples of 32, at least 32.")
    if config.freeze_epochs > 0 and not config.weights and not resumes:
        raise UserError(
            "freeze_epochs would freeze a backbone that knows nothing: give --weights, or 0 epochs"
        )
    focal = (config.focal_alpha, config.focal_gamma) != (Config.focal_alpha, Config.focal_gamma)
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
    least |= {"log_period": 1, "eval_period": 1, "save_period": 1}
    least |= {"freeze_epochs": 0, "num_workers": 0, "seed": 0}
    for name, low in least.items():
        if getattr(config, name) < low:
            raise UserError(f"{name} is {getattr(config, name)}; give {low} or more.")


def run_folder(config: Config) -> Path:
    """The resumed run's folder, or a new one."""
    if config.resume:
        return folder_of_resumed(Path(config.resume), config.save_dir)
    return new_run_folder(config.save_dir)


def read_data(
    config: Config, class_names: tuple[str, ...], folder: Path
) -> tuple[list[Sample], list[Sample]]:
    """Training and validation samples."""
    train_samples, val_samples = read_splits(
        {"train": config.train, "val": config.val},
        class_names,
        split_dir=folder,
        progress=True,
        **shared(config, ("skip_bad", "include_difficult", "classes_path")),
    )
    return train_samples, val_samples


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


def shared(config: Config, names: Iterable[str], *, but: Collection[str] = ()) -> dict[str, Any]:
    """The constants of these names, some left out: what a part of the training calls them too."""
    own = {field.name for field in dataclasses.fields(config)}
    return {name: getattr(config, name) for name in names if name in own and name not in but}


def conf_loss_spec(config: Config) -> str:
    """The confidence loss in full, as --conf_loss takes it."""
    focal = f"focal(alpha={config.focal_alpha}, gamma={config.focal_gamma})"
    return config.conf_loss or (focal if config.focal_loss else "bce")


def recipe_values(config: Config) -> dict[str, Any]:
    """The constants that the recipe decides, as it alone gives them."""
    values = dataclasses.asdict(Config()) | recipe_changes(
        config.recipe, fine_tuning=bool(config.weights)
    )
    return {key: values[key] for key in FORK}


def make_recipe(config: Config, device: torch.device) -> Recipe:
    """How the weights are learnt."""
    shape, share = config.input_shape, config.multi_scale
    fields = [field.name for field in dataclasses.fields(Recipe)]
    return Recipe(
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
    colour = {"hue": hue, "saturation": saturation, "value": value}
    strength = shared(config, ("scale", "mosaic_scale", "jitter", "flip_prob"))
    options = shared(
        config,
        ("mosaic_prob", "mixup_prob", "repeat_threshold", "cache", "cache_gb", "cache_dir", "seed"),
    )
    augmentation = Augmentation(**strength, **colour)
    return VocDataset(samples, config.input_shape, train=True, augmentation=augmentation, **options)


def checkpoint_facts(
    config: Config,
    class_names: tuple[str, ...],
    *,
    anchors: Any,
    scale_xy: tuple[float, ...],
    loss: YOLOLoss,
) -> dict[str, Any]:
    """What every checkpoint says of its network, so that nothing else is needed to use it.

    Its config says, too, what the confidence loss declared: a later version may declare otherwise.
    """
    return {
        "class_names": list(class_names),
        "anchors": [list(anchor) for anchor in anchors],
        "input_shape": list(config.input_shape),
        "width": config.width,
        "depth": config.depth,
        "scale_xy": list(scale_xy),
        "conf_loss": conf_loss_spec(config),
        "config": {**dataclasses.asdict(config), "conf_settings": loss.conf_settings._asdict()},
    }


if __name__ == "__main__":
    run_script(main)
