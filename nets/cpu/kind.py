"""Which kind of CPU runs the network, and whether a tensor is on a CPU at all."""

import torch
from torch import Tensor


def is_plain_cpu(x: Tensor) -> bool:
    """Whether x is float32 or float64 on the CPU and run eagerly: not traced, not compiled."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
    )


def has_avx512() -> bool:
    """Whether torch runs its kernels for AVX-512.

    With it, oneDNN's convolutions reach the rate of matrix products in all directions; with AVX2
    only in the forward one.
    """
    return torch.backends.cpu.get_cpu_capability() == "AVX512"
