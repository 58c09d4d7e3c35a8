import weakref

import pytest
import torch
from torch import nn

from data.loader import to_input
from engine.optimizer import Ema, build_optimizer
from engine.trainer import TrainStep, state_to_come

CPU = torch.device("cpu")


class SquareLoss(nn.Module):
    """Stands for YOLOLoss: a term from the outputs, times what a target row asks for."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, outputs, targets, *, cells=False):
        self.calls += 1
        total = outputs.square().mean() * targets[:, 1].mean()
        nothing = torch.zeros(())
        names = ("loc", "conf", "cls", "positives", "ignored")
        groups = {"groups": total.detach() * torch.arange(48.0).view(3, 4, 4)} if cells else {}
        return {"total": total, **dict.fromkeys(names, nothing), **groups}


def make_step(clip_norm=0.0, optimizer="sgd", bn=True):
    torch.manual_seed(0)
    middle = [nn.BatchNorm2d(4)] if bn else []
    model = nn.Sequential(nn.Conv2d(3, 4, 1), *middle, nn.BatchNorm2d(4) if bn else nn.Identity())
    if not bn:
        model.append(nn.BatchNorm2d(4, affine=False).eval())
    ema = Ema(model, 0.9)
    optim = build_optimizer(optimizer, model)
    for group in optim.param_groups:
        group["lr"] = 0.1
    loss = SquareLoss()
    return TrainStep(
        model=model,
        loss=loss,
        optimizer=optim,
        ema=ema,
        device=CPU,
        amp_dtype=None,
        clip_norm=clip_norm,
    )


def batch(value=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return images, torch.tensor([[0, value, 0.5, 0.5, 0.1, 0.1]])


def read(figures):
    return figures.read()[0]


def state_of(step):
    tensors = {**step.model.state_dict(), **step.ema.module.state_dict(prefix="ema.")}
    return {k: v.clone() for k, v in tensors.items() if "num_batches" not in k}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_loss_changes_nothing_and_the_next_step_learns(bad):
    step = make_step()
    assert read(step(*batch()))["finite"] == 1
    before = state_of(step)
    figures = read(step(*batch(bad)))
    assert (figures["finite"], figures["skipped"]) == (0, 1)
    assert step.loss.calls == 1  # its state is as before the bad batch
    model_part = {k: v for k, v in before.items() if not k.startswith("ema.")}
    after = state_of(step)
    for key, value in model_part.items():
        assert torch.equal(after[key], value), key
    assert all(value.isfinite().all() for value in after.values())
    assert read(step(*batch()))["finite"] == 1
    assert not torch.equal(state_of(step)["0.weight"], before["0.weight"])


def test_one_bad_batch_of_an_accumulated_update_skips_the_update():
    step = make_step()
    before = step.model[0].weight.clone()
    first = read(step(*batch(float("nan")), group_size=2, update=False))
    assert (first["finite"], first["skipped"]) == (0, 0)
    second = read(step(*batch(), group_size=2, update=True))
    assert (second["finite"], second["skipped"]) == (1, 1)
    assert torch.equal(step.model[0].weight, before)
    assert read(step(*batch()))["skipped"] == 0


def test_accumulating_two_batches_is_the_mean_of_their_gradients():
    step = make_step(bn=False)
    weight = step.model[0].weight
    gradients = []
    for seed in (1, 2):
        images, _ = batch(seed=seed)
        step.model(to_input(images, CPU)).square().mean().backward()
        gradients.append(weight.grad.clone())
        step.model.zero_grad()
    step.clip_norm = 1e9
    captured = []
    weight.register_post_accumulate_grad_hook(lambda p: captured.append(p.grad.clone()))
    step(*batch(seed=1), group_size=2, update=False)
    step(*batch(seed=2), group_size=2, update=True)
    torch.testing.assert_close(captured[-1], (gradients[0] + gradients[1]) / 2)


def test_clipping_limits_the_step_and_reports_the_unclipped_norm():
    free, clipped = make_step(), make_step(clip_norm=1e-6)
    norm = read(free(*batch(1e3)))["grad_norm"]
    assert read(clipped(*batch(1e3)))["grad_norm"] == pytest.approx(norm)
    steps = [step.model[2].bias.norm().item() for step in (free, clipped)]  # from 0, no decay
    assert 0 < steps[1] < 1e-4 * steps[0]


def test_a_dry_run_leaves_no_trace():
    step = make_step()
    step(*batch())
    before = {**step.model.state_dict(), **step.loss.state_dict()}
    before = {key: value.clone() for key, value in before.items()}
    step.dry_run(*batch(seed=3))
    after = {**step.model.state_dict(), **step.loss.state_dict()}
    for key, value in before.items():
        assert torch.equal(after[key], value), key
    assert all(p.grad is None for p in step.model.parameters())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_dry_run_takes_the_memory_of_the_optimizers_state_and_leaves_it_to_be_made(
    optimizer, monkeypatch
):
    step, held = make_step(optimizer=optimizer), []
    wanted = 2 * sum(p.numel() for p in step.model.parameters()) if optimizer == "adam" else 0

    def state_as_a_set(optimizer):
        tensors = set(state_to_come(optimizer))
        held.append(weakref.ref(tensors))
        return tensors

    class Watching(SquareLoss):
        def forward(self, *args, **options):
            assert sum(tensor.numel() for tensor in held[0]()) == wanted  # while memory is tried
            return super().forward(*args, **options)

    monkeypatch.setattr("engine.trainer.state_to_come", state_as_a_set)
    before = len(step.optimizer.state)
    step.loss = Watching()
    step.dry_run(*batch(), (32, 32))
    assert held[0]() is None
    assert len(step.optimizer.state) == before
    step.loss = SquareLoss()
    step(*batch())
    assert state_to_come(step.optimizer) == []


def test_a_step_at_another_size_learns_from_the_resized_images():
    step, by_hand = make_step(), make_step()
    images, targets = batch()
    resized = torch.nn.functional.interpolate(images, size=(6, 4), mode="bilinear", antialias=True)
    assert read(step(images, targets, size_hw=(6, 4))) == read(by_hand(resized, targets))
    for key, value in state_of(by_hand).items():
        assert torch.equal(state_of(step)[key], value), key


def test_images_become_channels_last_fractions():
    images, _ = batch()
    inputs = to_input(images, CPU)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(inputs, images.float() / 255)


def test_a_look_at_the_cells_changes_nothing_and_comes_with_the_figures():
    plain, looking = make_step(), make_step()
    figures, groups = plain(*batch()).read()
    assert groups == []
    figures_too, groups = looking(*batch(), cells=True).read()
    assert figures_too == figures
    assert groups == pytest.approx([figures["total"] * value for value in range(48)])
    for key, value in state_of(plain).items():
        assert torch.equal(state_of(looking)[key], value), key


class InfiniteLoss(SquareLoss):
    """The value is infinite where the targets are, its gradient is not: a logit beyond 65504."""

    def forward(self, outputs, targets, *, cells=False):
        terms = super().forward(outputs, torch.ones_like(targets), cells=cells)
        return terms | {"total": terms["total"] + targets[:, 1].mean()}


@pytest.mark.parametrize("group_size", [1, 2])
def test_in_half_precision_an_update_reported_as_skipped_is_not_made(group_size):
    step = make_step()
    step.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    step.loss = InfiniteLoss()
    before = [parameter.clone() for parameter in step.model.parameters()]
    if group_size == 2:
        step(*batch(), group_size=2, update=False)
    assert read(step(*batch(float("inf")), group_size=group_size))["skipped"] == 1
    assert all(map(torch.equal, step.model.parameters(), before))
    assert read(step(*batch(), group_size=1))["skipped"] == 0
    assert not torch.equal(step.model[0].weight, before[0])
