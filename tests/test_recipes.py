"""Recipes by name: what they set, what beats them, and what a run says of them."""

import dataclasses
import math
import re
import sys

import pytest
import torch

import train
from engine.config import FORK, describe_recipe, parse_config, recipe_changes, stored_config
from engine.optimizer import build_optimizer
from engine.start import SCRATCH_SCALE_XY
from engine.trainer import TrainStep
from losses.yolo_loss import YOLOLoss
from nets.yolo import YoloV4
from tests.reference_loss import ANCHORS
from tests.test_yolo_loss import SHAPE, make_outputs, make_targets, values
from tests.training import flags, run_train
from train import Config
from utils.errors import UserError


def parsed(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    return parse_config(Config, description="", changeable=train.CHANGEABLE)[0]


def test_every_constant_of_the_forks_recipe_is_one_of_train_py():
    names = {field.name for field in dataclasses.fields(Config)}
    assert FORK.keys() <= names


def test_the_forks_recipe_has_the_forks_loss(monkeypatch):
    config = parsed(monkeypatch, "--recipe", "fork", "--input_shape", *map(str, SHAPE))
    assert config.scale_xy == (1, 1, 1)
    ours = train.build_loss(config, ANCHORS, 3, config.scale_xy)
    forks = YOLOLoss(ANCHORS, 3, SHAPE)  # its defaults are the fork's: test_yolo_loss.py
    outputs, targets = make_outputs(), make_targets()
    assert values(ours(outputs, targets)) == values(forks(outputs, targets))


def test_a_flag_beats_the_recipe_and_the_recipe_beats_the_constants(monkeypatch):
    config = parsed(monkeypatch, "--recipe=fork", "--loc_gain", "0.3")
    assert config.loc_gain == 0.3
    assert config.optimizer == "sgd"
    assert (config.mixup_prob, config.epochs) == (0.5, 300)
    assert parsed(monkeypatch) == Config()


def test_the_fork_freezes_the_backbone_of_given_weights_only(monkeypatch):
    assert parsed(monkeypatch, "--recipe", "fork").freeze_epochs == 0
    fine_tuned = parsed(monkeypatch, "--recipe", "fork", "--weights", "a.weights")
    assert fine_tuned.freeze_epochs == 50


def test_an_unknown_recipe_is_refused_with_the_known_ones(monkeypatch):
    with pytest.raises(UserError, match=r"recipe 'yolov5' is unknown\. Allowed: default, fork"):
        parsed(monkeypatch, "--recipe", "yolov5")


def test_the_start_of_a_run_names_the_recipe_and_what_was_changed():
    values = {"lr": 0.1, "hsv": (0, 0, 0), "optimizer": "sgd", "train": "x"}
    expected = {"lr": None, "hsv": (0.1, 0.7, 0.4), "optimizer": "sgd"}
    assert describe_recipe("fork", values, expected) == "recipe: fork, changed: lr 0.1, hsv 0 0 0"
    assert describe_recipe("default", expected, expected) == "recipe: default, unchanged"


def test_a_checkpoint_older_than_a_constant_goes_on_with_the_forks_value():
    old = {"assigner": "iou_threshold", "epochs": 7}
    stored = stored_config(Config, {**recipe_changes("fork", fine_tuning=False), **old})
    assert (stored.assigner, stored.epochs) == ("iou_threshold", 7)
    assert (stored.loc_gain, stored.iou_target, stored.patience) == (0.05, 0, 0)


def test_a_run_with_the_forks_recipe_trains_and_says_so(tiny_voc, tmp_path):
    more = {"recipe": "fork", "epochs": 1, "anchors_path": FORK["anchors_path"]}
    done = run_train(*flags(tiny_voc, tmp_path / "run", **more))
    assert done.returncode == 0, done.stderr
    assert "recipe: fork, changed: epochs 1\n" in done.stdout
    checkpoint = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert checkpoint["config"]["recipe"] == "fork"
    assert checkpoint["scale_xy"] == [1, 1, 1]


def test_zero_epochs_are_chosen_from_the_number_of_images(tiny_voc, tmp_path):
    """The number is said and stored; --patience ends the run long before."""
    more = {"epochs": 0, "patience": 2, "eval_period": 1}
    done = run_train(*flags(tiny_voc, tmp_path / "run", **more))
    assert done.returncode == 0, done.stderr
    assert "epochs: 300, for " in done.stdout
    (best,) = re.findall(r"no better AP50 in the 2 epochs since epoch (\d+)", done.stdout)
    assert "python evaluate.py --weights" in done.stdout
    checkpoint = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert checkpoint["epoch"] == checkpoint["metrics"]["best_epoch"] + 2 == int(best) + 2
    assert checkpoint["config"]["epochs"] == 300
    again = run_train("--resume", tmp_path / "run", "--patience", "4", "--num_workers", "0")
    assert again.returncode == 0, again.stderr
    checkpoint = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert checkpoint["epoch"] > int(best) + 2


def test_ten_steps_of_the_default_recipe_lower_the_loss_at_full_width():
    """The whole network from scratch, on one batch, at the rate that the schedule warms up to."""
    torch.manual_seed(0)
    shape, batch_size = (96, 96), 2
    config = dataclasses.replace(Config(), input_shape=shape, epochs=1, batch_size=batch_size)
    recipe = train.make_settings(config, torch.device("cpu"))
    model = YoloV4(3)
    loss = train.build_loss(config, ANCHORS, 3, SCRATCH_SCALE_XY)
    optimizer = build_optimizer(recipe.optimizer, model, momentum=recipe.momentum)
    rate, _ = recipe.rates(recipe.phases[0])
    for group in optimizer.param_groups:
        group["lr"] = rate
    step = TrainStep(
        model=model,
        loss=loss,
        optimizer=optimizer,
        ema=None,
        device=torch.device("cpu"),
        amp_dtype=None,
        clip_norm=recipe.clip_norm,
    )
    images = torch.randint(0, 256, (batch_size, 3, *shape), dtype=torch.uint8)
    targets = torch.tensor([[0, 0, 0.3, 0.4, 0.2, 0.3], [1, 2, 0.6, 0.5, 0.5, 0.4]])
    terms = [step(images, targets).read()[0] for _ in range(10)]
    assert all(math.isfinite(own["total"]) for own in terms)
    assert terms[-1]["total"] < 0.8 * terms[0]["total"]
