"""3x3 convolutions for detection on a CPU with 4 multiplications where 9 are needed otherwise.

Winograd's F(2 x 2, 3 x 3) (Lavin & Gray 2016): tiles of 4 x 4 inputs become, by sums alone, 16
numbers a channel; 16 matrix products give 16 numbers an output channel; sums make 2 x 2 outputs of
them. Sums cost memory traffic, so it pays for many channels only.
"""

import torch
from torch import Tensor, nn

from nets.cpu.kind import has_avx512, is_plain_cpu

# Fewest input channels, and fewest input times output channels, as measured; other CPUs use AVX2's.
# Speed against oneDNN at batch 1: with AVX2 1.3 to 1.5 times from 128 to 256 channels on, 1.1 times
# from 128 to 128, and slower below; with AVX-512 .9 times from 128 to 256 and 1.3 to 1.6 times from
# 256 to 256 on.
LEAST = {"AVX2": (128, 128 * 256), "AVX-512": (256, 256 * 256)}


class WinogradConv(nn.Module):
    """What a 3x3 convolution of stride 1 computes, up to rounding; for inference only."""

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        assert conv.bias is not None  # `gains` checks it
        basis = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
        basis, filters = basis.to(conv.weight), conv.weight.detach()
        # In the order of the transformed input: column of the tile, row, in, out.
        weight = torch.einsum("ri,ocij,sj->srco", basis, filters, basis)
        self.register_buffer("weight", weight.flatten(0, 1).contiguous())
        self.register_buffer("bias", conv.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        # Image by image: the tiles take four times the memory of the input, and more.
        return torch.cat([self._convolve(image) for image in x.split(1)])

    def _convolve(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        rows, columns = -(-height // 2), -(-width // 2)  # of tiles; the last may reach beyond
        padded = x.new_zeros(batch, 2 * rows + 2, 2 * columns + 2, channels)
        padded[:, 1 : height + 1, 1 : width + 1] = x.permute(0, 2, 3, 1)
        tiles = to_tiles(to_tiles(padded, 1, rows), 3, columns)  # (4, 4, B, rows, columns, C)
        product = torch.bmm(tiles.view(16, -1, channels), self.weight)
        by_column = from_tiles(product.view(4, 4, batch, rows, columns, -1))
        result = x.new_empty(batch, rows, 2, columns, 2, self.weight.shape[-1])
        for column in range(2):
            by_row = from_tiles(by_column[column])
            for row in range(2):
                result[:, :, row, :, column] = by_row[row]
        result = result.view(batch, 2 * rows, 2 * columns, -1).add_(self.bias)
        # Of an odd number of rows or columns the last is cut off; the copy leaves no gaps.
        return result[:, :height, :width].contiguous().permute(0, 3, 1, 2)


def to_tiles(x: Tensor, dim: int, count: int) -> Tensor:
    """(...) -> (4, ...): the four combinations of `count` overlapping fours along `dim`."""
    first, second, third, fourth = (
        x.narrow(dim, start, x.shape[dim] - 3).unfold(dim, 1, 2).squeeze(-1) for start in range(4)
    )
    found = x.new_empty(4, *first.shape)
    torch.sub(first, third, out=found[0])
    torch.add(second, third, out=found[1])
    torch.sub(third, second, out=found[2])
    torch.sub(second, fourth, out=found[3])
    return found


def from_tiles(x: Tensor) -> Tensor:
    """(4, ...) -> (2, ...): the two results of each four."""
    found = x.new_empty(2, *x.shape[1:])
    torch.add(x[0], x[1], out=found[0]).add_(x[2])
    torch.sub(x[1], x[2], out=found[1]).sub_(x[3])
    return found


def use_winograd(model: nn.Module) -> None:
    """Replace, in place, the convolutions of a folded network on a CPU that get faster by it."""
    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d) and gains(child):
                setattr(module, name, WinogradConv(child))


def gains(conv: nn.Conv2d) -> bool:
    least_channels, least_weights = LEAST["AVX-512" if has_avx512() else "AVX2"]
    return (
        is_plain_cpu(conv.weight)
        and conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.bias is not None
        and conv.in_channels >= least_channels
        and conv.in_channels * conv.out_channels >= least_weights
    )
