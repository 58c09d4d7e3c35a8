import pytest
import torch
from torch import nn

from engine.optimizer import (
    OPTIMIZERS,
    Ema,
    build_optimizer,
    learning_rate,
    parameter_groups,
    scaled_lr,
)
from nets.yolo import YoloV4
from utils.errors import UserError


def tiny():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def test_weight_decay_reaches_convolution_weights_only():
    model = YoloV4(2, width=0.01, depth=0.01)
    decayed, others = parameter_groups(model, 5e-4)
    assert {p.ndim for p in decayed["params"]} == {4}
    assert {p.ndim for p in others["params"]} == {1}
    assert (decayed["weight_decay"], others["weight_decay"]) == (5e-4, 0.0)
    count = len(decayed["params"]) + len(others["params"])
    assert count == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("name", "batch", "expected"),
    [
        ("sgd", 64, (1e-2, 1e-4)),
        ("sgd", 8, (1.25e-3, 1.25e-5)),
        ("sgd", 1, (5e-4, 5e-6)),  # clamped below
        ("sgd", 1024, (5e-2, 5e-4)),  # clamped above
        ("adam", 16, (3e-4, 3e-6)),
        ("adam", 32, (5e-4, 5e-6)),
        ("adam", 640, (1e-3, 1e-5)),
    ],
)
def test_learning_rate_scales_with_the_batch_and_is_clamped_as_in_the_fork(name, batch, expected):
    assert scaled_lr(name, None, batch) == pytest.approx(expected)


def test_adamw_starts_narrow_networks_from_more_and_ends_at_a_rate_of_its_own():
    assert scaled_lr("adamw", None, 8)[0] == pytest.approx(2.5e-3)
    assert scaled_lr("adamw", None, 8, width=0.25)[0] == pytest.approx(5e-3)
    assert scaled_lr("adamw", None, 64)[0] == pytest.approx(5e-3)
    assert scaled_lr("adamw", 0.1, 8, width=0.25)[0] == pytest.approx(1.25e-2)  # as given
    assert scaled_lr("sgd", None, 64, width=0.25) == scaled_lr("sgd", None, 64)


def test_a_given_learning_rate_is_scaled_like_the_default():
    assert scaled_lr("sgd", 0.02, 32) == pytest.approx((1e-2, 1e-4))


def cosine(progress, epochs=100):
    return learning_rate(progress, epochs=epochs, schedule="cosine", initial=1.0, minimal=0.01)


def test_cosine_warms_up_quadratically_and_ends_flat():
    assert cosine(0) == pytest.approx(0.1)
    assert cosine(1.5) == pytest.approx(0.1 + 0.9 * 0.25)  # warm-up of 3 epochs
    assert cosine(3) == pytest.approx(1.0)
    assert cosine(3 + (100 - 3 - 5) / 2) == pytest.approx((1 + 0.01) / 2)
    assert cosine(95) == cosine(99.99) == 0.01  # flat for the last 5
    rates = [cosine(3 + i / 10) for i in range(900)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("epochs", [1, 2, 3, 20])
def test_cosine_stays_in_its_range_in_short_runs(epochs):
    rates = [cosine(i * epochs / 50, epochs) for i in range(51)]
    assert all(0.01 <= rate <= 1 for rate in rates)
    assert rates[0] == pytest.approx(0.1)


def test_step_schedule_has_ten_equal_steps_from_one_to_a_hundredth():
    rates = [
        learning_rate(p, epochs=50, schedule="step", initial=1.0, minimal=0.01) for p in range(50)
    ]
    assert rates[:5] == [1.0] * 5
    assert len({round(rate, 9) for rate in rates}) == 10
    assert rates[-1] == pytest.approx(0.01)
    assert rates[5] / rates[0] == pytest.approx(rates[10] / rates[5])


def one_step(model, optimizer):
    model(torch.randn(2, 3, 4, 4)).square().sum().backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_found_inf_skips_a_step_without_a_trace(name):
    model = tiny()
    optimizer = build_optimizer(name, model)
    one_step(model, optimizer)
    before = [p.clone() for p in model.parameters()]
    state = [
        {k: v.clone() for k, v in optimizer.state[p].items() if v is not None}
        for p in model.parameters()
    ]
    optimizer.found_inf = torch.ones(())
    one_step(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for saved, parameter in zip(state, model.parameters(), strict=True):
        for key, value in saved.items():
            assert torch.equal(optimizer.state[parameter][key], value), key
    optimizer.found_inf = torch.zeros(())
    one_step(model, optimizer)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_an_unknown_optimizer_is_told_with_the_known_ones():
    with pytest.raises(UserError, match="sgd, adam, adamw"):
        build_optimizer("lion", tiny())


def test_ema_follows_weights_and_statistics_with_a_ramped_decay():
    model = tiny()
    ema = Ema(model, decay=0.5)
    expected = {k: v.clone().double() for k, v in model.state_dict().items()}
    for update in range(1, 6):
        for value in (*model.parameters(), *model.buffers()):
            with torch.no_grad():
                value.add_(1)
        ema.update_parameters(model)
        decay = min(0.5, (1 + update) / (10 + update))
        for key, value in model.state_dict().items():
            old = expected[key]
            expected[key] = (
                value.double()
                if value.dtype == torch.int64
                else (old * decay + value.double() * (1 - decay))
            )
    for key, value in ema.module.state_dict().items():
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-6, atol=1e-6)


def test_ema_gives_no_gradients():
    ema = Ema(tiny(), decay=0.9)
    assert not any(p.requires_grad for p in ema.parameters())
