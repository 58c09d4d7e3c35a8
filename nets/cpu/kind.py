"""What kind of CPU computes, and whether one does at all."""

import torch
from torch import Tensor


def is_plain_cpu(x: Tensor) -> bool:
    """Whether x is of float32 or float64, on the CPU, and run now: not traced, not compiled."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
    )


def has_avx512() -> bool:
    """Whether torch runs its kernels for AVX-512. oneDNN's convolutions are good with it: they
    reach the rate of matrix products in all directions, with AVX2 in the forward one alone."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"
