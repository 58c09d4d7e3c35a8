import pytest
import torch
from torch.nn import functional as F

import nets.weight_gradient
from nets.weight_gradient import weight_gradient


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("pixels", [1, 20, 2048])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 4, 6, 8), (3, 2, 7, 5)])
def test_it_is_autograds(size, kernel_size, stride, pixels, layout, monkeypatch):
    monkeypatch.setattr(nets.weight_gradient, "PIXELS", pixels)
    torch.manual_seed(0)
    x = torch.randn(size, dtype=torch.float64).contiguous(memory_format=layout)
    weight = torch.randn(3, size[1], kernel_size, kernel_size, dtype=torch.float64)
    weight.requires_grad_()
    padding = kernel_size // 2
    result = F.conv2d(x, weight, stride=stride, padding=padding)
    grad = torch.randn_like(result).contiguous(memory_format=layout)
    result.backward(grad)
    found = weight_gradient(x, grad, kernel_size=kernel_size, stride=stride, padding=padding)
    torch.testing.assert_close(found, weight.grad)
