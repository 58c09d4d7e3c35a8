import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.loader import to_input
from engine.console import progress_text
from engine.guard import NonFiniteGuard
from engine.settings import INPUT_COLUMNS, MultiScale, Phase
from engine.statistics import STATISTICS, EpochStatistics, StepStatistics
from engine.trainer import Trainer
from losses.yolo_loss import YOLOLoss
from nets.yolo import YoloV4
from tests.reference_loss import ANCHORS
from tests.test_train_resume import OWN, STOPPING
from tests.training import (
    checkpoint_of,
    flags,
    rows_of,
    run_train,
    same_tensors,
    training_settings,
    without_times,
)
from utils.errors import UserError

CPU = torch.device("cpu")
SEED = 5  # its 24 steps are of three sizes
FROZEN, UNFROZEN = Phase(2, 4, frozen=True), Phase(5, 2, frozen=False)


@pytest.mark.parametrize(
    ("input_shape", "share", "sizes"),
    [
        ((128, 128), 0.25, [(128, 128), (160, 160)]),  # 1.25 itself is within; 96 is at .75
        ((128, 128), 0.34, [(96, 96), (128, 128), (160, 160)]),
        ((96, 64), 0.5, [(64, 32), (96, 64), (128, 96)]),
        ((32, 320), 0.25, [(32, side) for side in (256, 288, 320, 352, 384)]),
    ],
)
def test_sizes_are_the_multiples_of_32_within_the_share(input_shape, share, sizes):
    assert list(MultiScale(input_shape, share, 0).sizes) == sizes


def test_darknets_share_gives_nine_sizes_at_416():
    scale = MultiScale((416, 416), 0.4, 0)
    assert [height for height, _ in scale.sizes] == list(range(320, 577, 32))
    assert str(scale) == "input: every 10 steps one of 9 sizes, 320 x 320 to 576 x 576"


def test_a_size_is_a_function_of_seed_and_step_and_holds_for_ten_steps():
    one, other = MultiScale((160, 224), 0.4, 3), MultiScale((160, 224), 0.4, 3)
    drawn = [one.size_at(step) for step in range(2000)]
    assert [other.size_at(step) for step in reversed(range(2000))] == drawn[::-1]
    for start in range(0, 2000, 10):
        assert len(set(drawn[start : start + 10])) == 1
    counts = [drawn[::10].count(size) for size in one.sizes]
    assert min(counts) > 20  # of 200 / 5 = 40
    assert sum(counts) == 200
    another = MultiScale((160, 224), 0.4, 4)
    assert [another.size_at(step) for step in range(2000)] != drawn


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, float("nan")])
def test_a_share_outside_0_to_1_is_refused(share):
    with pytest.raises(UserError, match="multi_scale is"):
        MultiScale((416, 416), share, 0)


def test_a_share_that_changes_nothing_is_refused_with_one_that_does():
    with pytest.raises(
        UserError, match=r"further from input_shape 96 64\. Give 0, at least 0\.334"
    ):
        MultiScale((96, 64), 0.3, 0)
    assert len(MultiScale((96, 64), 0.334, 0).sizes) == 2


def test_without_multi_scale_no_image_is_touched():
    recipe = training_settings(phases=(UNFROZEN,))
    assert recipe.input_size(7) is recipe.largest_input is None
    assert recipe.input_columns(7) == {}
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    assert torch.equal(to_input(images, CPU, (64, 96)), to_input(images, CPU))


@pytest.mark.parametrize("size_hw", MultiScale((128, 160), 0.6, 0).sizes)
def test_a_target_stays_on_its_object_at_every_size(size_hw):
    """A white rectangle's edges, found as the sums of its pixels, are where its target says."""
    images = torch.zeros(1, 128, 160, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    images[:, :, 24:88, 40:120] = 255
    inputs = to_input(images, CPU, size_hw)
    assert inputs.shape == (1, 3, *size_hw)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    white = inputs[0, 0].double()
    for axis, (low, high, side) in enumerate(((24, 88, 128), (40, 120, 160))):
        profile = white.amax(1 - axis)
        size, pixels = profile.sum(), torch.arange(len(profile)) + 0.5
        centre = (profile * pixels).sum() / size
        assert size == pytest.approx((high - low) / side * size_hw[axis], abs=0.1)
        assert centre == pytest.approx((low + high) / 2 / side * size_hw[axis], abs=0.05)


def test_shrinking_is_antialiased():
    """Lines of one pixel fade; sampled, they would leave a strong pattern (.27 here)."""
    images = torch.zeros(1, 3, 128, 128, dtype=torch.uint8)
    images[..., ::2] = 255
    inner = to_input(images, CPU, (96, 96))[..., 4:-4]
    assert inner.std() < 0.12


def test_what_is_dry_rund_before_the_first_epoch():
    scale = MultiScale((128, 128), 0.5, 0)
    both = training_settings(phases=(FROZEN, UNFROZEN), multi_scale=scale)
    assert both.largest_input == (192, 192)
    assert both.phases_to_dry_run(0, on_gpu=True) == [FROZEN, UNFROZEN]
    assert both.phases_to_dry_run(2, on_gpu=True) == [UNFROZEN]
    assert both.phases_to_dry_run(0, on_gpu=False) == [UNFROZEN]
    assert both.phases_to_dry_run(5, on_gpu=True) == []
    alone = training_settings(phases=(UNFROZEN,), multi_scale=scale)
    assert alone.phases_to_dry_run(0, on_gpu=True) == [UNFROZEN]
    assert alone.phases_to_dry_run(0, on_gpu=False) == []
    assert training_settings(phases=(UNFROZEN,)).phases_to_dry_run(0, on_gpu=True) == []
    plain = training_settings(phases=(FROZEN, UNFROZEN))
    assert plain.phases_to_dry_run(0, on_gpu=True) == [UNFROZEN]
    assert training_settings(phases=(FROZEN,)).phases_to_dry_run(0, on_gpu=True) == []


def test_the_bar_says_the_size_where_it_changes():
    figures = EpochStatistics(NonFiniteGuard())
    figures.push(StepStatistics(dict.fromkeys(STATISTICS, torch.ones(()))), ["a.jpg"])
    figures.flush()
    bar = {"lr": 0.01, "device": CPU}
    assert " lr 1.00e-02 320x416 " in progress_text(figures, input_size=(320, 416), **bar)
    assert " lr 1.00e-02 1.0 images" not in progress_text(figures, input_size=None, **bar)


@pytest.fixture(scope="module")
def runs(tiny_voc, tmp_path_factory):
    """A folder with my_losses.py and two runs: `whole`, 24 steps, and `cut` at the 11th."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "my_losses.py").write_text(STOPPING)
    more = {"multi_scale": 0.5, "conf_loss": OWN, "log_period": 1, "width": 0.05}
    more |= {"batch_size": 2, "epochs": 6, "eval_period": 1, "optimizer": "adam", "seed": SEED}
    whole = run_train(*flags(tiny_voc, folder / "whole", **more), cwd=folder)
    assert whole.returncode == 0, whole.stderr
    # Of an epoch the loss sees 4 batches to learn from and 2 to validate on.
    cut = run_train(*flags(tiny_voc, folder / "cut", **more), cwd=folder, STOP_AT="15")
    assert cut.returncode == 130, cut.stderr
    return folder, whole.stdout


def test_a_run_trains_at_several_sizes_and_says_which(runs):
    folder, printed = runs
    scale = MultiScale((64, 96), 0.5, SEED)
    assert str(scale) in printed
    events = EventAccumulator(str(folder / "whole")).Reload()
    logged = [
        [int(event.value) for event in events.Scalars(f"step/{name}")] for name in INPUT_COLUMNS
    ]
    expected = [scale.size_at(step) for step in range(24)]
    assert list(zip(*logged, strict=True)) == expected
    assert len(set(expected)) == 3
    rows = rows_of(folder / "whole")
    assert all(math.isfinite(float(row["loss"])) for row in rows)
    assert rows[-1]["skipped_steps"] == "0"
    assert checkpoint_of(folder / "whole")["input_shape"] == [64, 96]


def test_a_resumed_run_meets_the_same_sizes(runs):
    folder, _ = runs
    assert checkpoint_of(folder / "cut")["step"] == 11
    done = run_train("--resume", folder / "cut", "--conf_loss", OWN, cwd=folder)
    assert done.returncode == 0, done.stderr
    rows = [without_times(rows_of(folder / name)) for name in ("whole", "cut")]
    assert rows[0] == rows[1]
    models = [checkpoint_of(folder / name)["raw_model"] for name in ("whole", "cut")]
    assert same_tensors(*models)


def test_a_resume_cannot_change_it(runs):
    folder, _ = runs
    again = ["--resume", folder / "cut", "--conf_loss", OWN]
    done = run_train(*again, "--multi_scale", 0.4, cwd=folder)
    assert done.returncode == 2
    assert "cannot change multi_scale" in done.stderr


def make_trainer(device, phases, optimizer="adam"):
    """A trainer of a small network, without data."""
    torch.manual_seed(0)
    model = YoloV4(2, width=0.02, depth=0.1).to(device, memory_format=torch.channels_last)
    metadata = {"conf_loss": "ghm", "input_shape": [64, 96]}
    recipe = training_settings(
        phases=phases, optimizer=optimizer, multi_scale=MultiScale((64, 96), 0.5, 0)
    )
    return Trainer(
        model=model,
        loss=YOLOLoss(ANCHORS, 2, (64, 96), conf_loss="ghm").to(device),
        train_set=None,
        val_samples=[],
        settings=recipe,
        metadata=metadata,
        device=device,
    )


@pytest.mark.parametrize(
    ("device", "phases", "batches"),
    [
        ("cpu", (FROZEN, UNFROZEN), [2]),
        ("cpu", (UNFROZEN,), []),
        pytest.param("cuda", (FROZEN, UNFROZEN), [4, 2], marks=pytest.mark.cuda),
        pytest.param("cuda", (UNFROZEN,), [2], marks=pytest.mark.cuda),
    ],
)
def test_the_dry_run_is_at_the_largest_size_and_leaves_no_trace(device, phases, batches):
    trainer = make_trainer(torch.device(device), phases)
    parts = (trainer.model, trainer.step.loss, trainer.step.ema)
    before = [{k: v.clone() for k, v in part.state_dict().items()} for part in parts]
    state, seen = torch.get_rng_state(), []
    trainer.model.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    trainer._dry_run()
    assert seen == [(count, 3, 96, 128) for count in batches]
    for part, saved in zip(parts, before, strict=True):
        assert same_tensors(part.state_dict(), saved)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert not trainer.step.optimizer.state
