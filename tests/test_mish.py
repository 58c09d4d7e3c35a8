import pytest
import torch
from torch.nn import functional as F

import nets.cpu.mish
from nets.cpu.mish import FastMish


def plain(x):
    return F.mish(x.double())


def test_mish_is_torchs():
    x = torch.linspace(-30, 30, 100_001)
    torch.testing.assert_close(FastMish()(x).double(), plain(x), rtol=1e-6, atol=1e-12)


def test_extreme_inputs():
    x = torch.tensor([-1e30, -1e4, -100.0, 0.0, 100.0, 1e4, 1e30, float("inf"), float("nan")])
    x.requires_grad_()
    result = FastMish()(x)
    expected = F.mish(x)
    torch.testing.assert_close(result, expected, equal_nan=True)
    result[:7].sum().backward()
    assert x.grad[:7].tolist() == [0, 0, 0, pytest.approx(0.6), 1, 1, 1]


@pytest.mark.parametrize("block", [7, 64, 2**18])
def test_the_gradient_is_that_of_the_function(block, monkeypatch):
    monkeypatch.setattr(nets.cpu.mish, "BLOCK", block)
    x = (5 * torch.randn(2, 3, 4, 5, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(FastMish(), x)


def layouts():
    x = torch.randn(2, 6, 5, 4)
    return {
        "dense": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "with gaps": torch.randn(2, 6, 5, 8)[..., ::2],
        "expanded": torch.randn(2, 6, 1, 4).expand(2, 6, 5, 4),
        "scalar": torch.tensor(0.5),
        "empty": x[:0],
    }


@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("grad_name", ["dense", "channels_last"])
def test_memory_may_have_any_order(name, grad_name):
    x = layouts()[name]
    kept = x.clone()
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    grad = layouts()[grad_name] if x.shape == (2, 6, 5, 4) else torch.ones_like(x)
    result = FastMish()(leaf)
    result.backward(grad)
    reference = kept.double().requires_grad_()
    F.mish(reference).backward(grad.double())
    torch.testing.assert_close(result.double(), plain(kept), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(leaf.grad.double(), reference.grad, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(FastMish()(x), result)
    assert torch.equal(x, kept)


def test_in_place_the_input_is_overwritten():
    x = torch.randn(3, 5)
    kept = x.clone()
    result = FastMish(inplace=True)(x)
    assert result.data_ptr() == x.data_ptr()
    torch.testing.assert_close(x, F.mish(kept))


def test_in_place_an_input_with_gaps_is_copied():
    x = torch.randn(2, 6, 5, 8)[..., ::2]
    torch.testing.assert_close(FastMish(inplace=True)(x), F.mish(x))


def test_half_precision_is_left_to_torch():
    x = torch.randn(100).bfloat16()
    assert torch.equal(FastMish()(x), F.mish(x))


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_a_trace_holds_one_operation():
    traced = torch.jit.trace(FastMish(), torch.randn(3))
    assert "aten::mish" in str(traced.graph)
    assert "aten::sigmoid" not in str(traced.graph)
