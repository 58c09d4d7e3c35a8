import pytest
import torch
from torch import nn

from nets.cpu.winograd import WinogradConv, use_winograd
from nets.fold import fold_batch_norm
from nets.yolo import YoloV4
from weights.checkpoint import build_model


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (1, 5, 13, 13), (2, 4, 8, 6), (3, 2, 7, 4)])
def test_it_computes_the_convolution(size, layout):
    torch.manual_seed(0)
    conv = nn.Conv2d(size[1], 3, 3, padding=1).double()
    x = torch.randn(size, dtype=torch.float64).contiguous(memory_format=layout)
    kept = x.clone()
    with torch.no_grad():
        found = WinogradConv(conv)(x)
        torch.testing.assert_close(found, conv(x), rtol=1e-12, atol=1e-12)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, kept)


def test_in_float32_it_is_off_by_rounding_alone():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(256, 256, 3, padding=1), torch.randn(1, 256, 26, 26)
    with torch.no_grad():
        exact = conv.double()(x.double())
        error = (WinogradConv(conv.float())(x) - exact).abs().max() / exact.abs().max()
    assert error < 1e-5


DEEP = {(256, 256), (256, 512), (512, 512), (512, 1024)}


@pytest.mark.parametrize(("avx512", "expected"), [(False, {(128, 256), *DEEP}), (True, DEEP)])
def test_a_network_for_detection_has_it_where_it_gains_and_computes_the_same(
    avx512, expected, monkeypatch
):
    monkeypatch.setattr("nets.cpu.winograd.has_avx512", lambda: avx512)
    torch.manual_seed(0)
    network = YoloV4(2, depth=0.1).eval()
    names = ("0", "1")
    metadata = {"class_names": names, "width": 1.0, "depth": 0.1, "model": network.state_dict()}
    built = build_model(metadata, "cpu")
    layers = [module for module in built.modules() if isinstance(module, WinogradConv)]
    shapes = {tuple(layer.weight.shape[1:]) for layer in layers}
    assert not any(tensor.requires_grad for tensor in (*built.parameters(), *built.buffers()))
    assert shapes == expected
    images = torch.rand(2, 3, 96, 160)  # odd maps of 3 x 5
    with torch.no_grad():
        for found, expected in zip(built(images), network(images), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_small_and_other_convolutions_stay():
    network = YoloV4(2, width=0.1, depth=0.1).eval()
    fold_batch_norm(network)
    use_winograd(network)
    assert not any(isinstance(module, WinogradConv) for module in network.modules())
    others = nn.Sequential(
        nn.Conv2d(256, 256, 3, padding=1, stride=2),
        nn.Conv2d(256, 256, 1),
        nn.Conv2d(256, 256, 3, padding=1, bias=False),
    )
    use_winograd(others)
    assert all(isinstance(module, nn.Conv2d) for module in others)
