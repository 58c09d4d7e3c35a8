import copy

import pytest
import torch
from torch import nn

import nets.blocks
import nets.lean
from nets.blocks import ConvBnAct
from nets.recipe import add, concatenate, recipe_of
from nets.yolo import YoloV4


@pytest.fixture
def plainly(monkeypatch):
    """Calls a function with the modules one by one, as elsewhere than on a CPU."""

    def call(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(nets.blocks, "is_lean", lambda *_: False)
            return function(*args)

    return call


def random_network(dtype=torch.float64):
    torch.manual_seed(0)
    network = YoloV4(2, width=0.25, depth=0.34).to(dtype, memory_format=torch.channels_last)
    for module in network.modules():
        if isinstance(module, ConvBnAct):
            module.lean = True  # as at full width
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return network


def step(network, images):
    outputs = network(images)
    scales = [torch.linspace(-1, 1, output.numel()).to(output) for output in outputs]
    sum((o.flatten() * s).sum() for o, s in zip(outputs, scales, strict=True)).backward()
    return outputs


@pytest.mark.parametrize("avx512", [False, True])
def test_a_step_has_the_results_gradients_and_statistics_of_the_modules_one_by_one(
    plainly, avx512, monkeypatch
):
    monkeypatch.setattr(nets.lean, "has_avx512", lambda: avx512)
    lean = random_network()
    plain = copy.deepcopy(lean)
    images = torch.rand(2, 3, 96, 64, dtype=torch.float64)
    for _ in range(2):
        found, expected = step(lean, images), plainly(step, plain, images)
    torch.testing.assert_close(found, expected)
    for (name, parameter), reference in zip(
        lean.named_parameters(), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-9, atol=1e-12, msg=name)
    for (name, buffer), reference in zip(lean.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, reference, msg=name)


def test_stages_that_are_recomputed_have_the_same_gradients():
    lean = random_network()
    frugal = copy.deepcopy(lean)
    frugal.backbone.recompute = True
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(step(frugal, images), step(lean, images))
    for (name, parameter), other in zip(lean.named_parameters(), frugal.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-9, atol=1e-12, msg=name)
    for (name, buffer), other in zip(lean.named_buffers(), frugal.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, msg=name)


def kept_bytes(network, images):
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        network(images)
    return sum(kept.values()) - sum(p.nbytes for p in network.parameters() if p.ndim == 4)


def test_it_keeps_less_than_half(plainly):
    images = torch.rand(2, 3, 128, 128)
    network = random_network(torch.float32)
    assert kept_bytes(network, images) < 0.45 * plainly(kept_bytes, network, images)


@pytest.mark.parametrize("activation", ["mish", "leaky"])
def test_the_gradient_is_that_of_the_function(activation, monkeypatch):
    monkeypatch.setattr(nets.lean, "MIN_CHANNELS", 1)
    torch.manual_seed(0)
    first = ConvBnAct(2, 2, 3, activation=activation).double()
    second = ConvBnAct(4, 3, 3, stride=2, activation=activation).double()

    def network(x, *_):
        x = first(x)
        x = add(x, first(x))
        return second(concatenate(x, first(x)))

    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    parameters = (*first.parameters(), *second.parameters())
    assert torch.autograd.gradcheck(network, (x, *parameters))


def test_a_recipe_makes_the_map_again():
    torch.manual_seed(0)
    units = [ConvBnAct(16, 16, 1, activation=kind) for kind in ("mish", "leaky")]
    x = torch.randn(2, 16, 4, 4)
    a, b = (unit(x) for unit in units)
    for map_ in (a, b, add(a, b), concatenate(a, b)):
        torch.testing.assert_close(recipe_of(map_).make(), map_.detach())
    assert recipe_of(add(add(a, b), a)) is None
    assert recipe_of(add(a, x)) is None


def test_a_second_backward_is_an_error_as_ever():
    result = ConvBnAct(16, 8, 3)(torch.randn(1, 16, 4, 4)).sum()
    result.backward()
    with pytest.raises(RuntimeError, match="second time"):
        result.backward()


@pytest.mark.parametrize("case", ["evaluation", "no gradients", "frozen", "bfloat16"])
def test_elsewhere_the_modules_run_one_by_one(case):
    unit, x = ConvBnAct(16, 8, 3), torch.randn(2, 16, 4, 4, requires_grad=True)
    unit.train(case != "evaluation")
    unit.conv.weight.requires_grad_(case != "frozen")
    with (
        torch.set_grad_enabled(case != "no gradients"),
        torch.autocast("cpu", torch.bfloat16, enabled=case == "bfloat16"),
    ):
        assert recipe_of(unit(x)) is None


@pytest.mark.parametrize(("width", "lean"), [(0.5, False), (1.0, True)])
def test_a_small_network_runs_its_modules_one_by_one(width, lean):
    with torch.device("meta"):
        network = YoloV4(2, width=width, depth=0.1)
    assert {m.lean for m in network.modules() if isinstance(m, ConvBnAct)} == {lean}


def test_a_single_value_per_channel_is_an_error():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ConvBnAct(16, 8, 3, stride=2)(torch.randn(1, 16, 2, 2))


@pytest.mark.parametrize("case", ["SiLU", "slope", "bias", "groups", "hook"])
def test_a_unit_that_was_changed_runs_its_own_modules(case, plainly):
    torch.manual_seed(0)
    unit, x, seen = ConvBnAct(16, 16, 3), torch.randn(2, 16, 4, 4), []
    if case == "SiLU":
        unit.act = nn.SiLU()
    elif case == "slope":
        unit.act = nn.LeakyReLU(0.3)
    elif case == "hook":
        unit.bn.register_forward_hook(lambda *_: seen.append(1))
    else:
        options = {"bias": True} if case == "bias" else {"bias": False, "groups": 4}
        unit.conv = nn.Conv2d(16, 16, 3, padding=1, **options)
    result = unit(x)
    assert bool(seen) == (case == "hook")
    assert torch.equal(result, plainly(unit, x))


def test_a_map_that_is_changed_in_place_is_kept_as_it_is_then():
    torch.manual_seed(0)
    first, second = ConvBnAct(16, 16, 1).double(), ConvBnAct(16, 4, 1).double()
    x = torch.randn(2, 16, 4, 4, dtype=torch.float64)
    made = first(x)
    made *= 2
    assert recipe_of(made) is None
    second(made).sum().backward()
    found = second.conv.weight.grad.clone()
    second.zero_grad()
    second(2 * first(x)).sum().backward()
    torch.testing.assert_close(found, second.conv.weight.grad)
