"""The gradient of a convolution's weights, on a CPU, by matrix products."""

from torch import Tensor

PIXELS = 2048  # of a block: its columns, 9 MiB at 128 channels, are multiplied out of the cache


def weight_gradient(
    x: Tensor, grad: Tensor, *, kernel_size: int, stride: int, padding: int
) -> Tensor:
    """(O, C, k, k) gradient of the sum of conv2d(x, weight) * grad.

    x: (B, C, H, W), grad: (B, O, H', W'), fastest in channels_last memory. The rows of x that a
    block of outputs sees, laid side by side, times the block's gradients (Chellapilla et al. 2006):
    oneDNN's own kernel for AVX2 and channels_last reaches a quarter to a half of the processor's
    matrix rate here, this three quarters.
    """
    batch, channels, _, _ = x.shape
    grad = grad.permute(0, 2, 3, 1)
    rows, columns, out_channels = grad.shape[1:]
    padded = pad(x.permute(0, 2, 3, 1), padding)
    line = padded.stride(1)
    taps = kernel_size * channels  # of one row of the kernel: they lie side by side
    strides = (stride * line, stride * channels, line, 1)
    found = x.new_zeros(kernel_size * taps, out_channels)
    height = max(1, PIXELS // columns)
    for image in range(batch):
        for top in range(0, rows, height):
            part = grad[image, top : top + height]
            size = (len(part), columns, kernel_size, taps)
            start = padded[image, stride * top :].storage_offset()
            seen = padded.as_strided(size, strides, start)
            found.addmm_(seen.reshape(-1, kernel_size * taps).t(), part.reshape(-1, out_channels))
    weight = found.view(kernel_size, kernel_size, channels, out_channels)
    return weight.permute(3, 2, 0, 1)


def pad(x: Tensor, padding: int) -> Tensor:
    """(B, H, W, C) with zeros around, contiguous."""
    if not padding:
        return x.contiguous()
    batch, height, width, channels = x.shape
    padded = x.new_zeros(batch, height + 2 * padding, width + 2 * padding, channels)
    padded[:, padding:-padding, padding:-padding] = x
    return padded
