"""Gradient checkpointing: less memory, since the backward pass computes activations again."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_recomputed(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), keeping only x; the backward pass runs it once more (Chen et al. 2016).

    The results, the gradients and BN's running statistics are those of module(x).
    """

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), keep_statistics(module)

    return checkpoint(module, x, use_reentrant=False, context_fn=contexts)


@contextmanager
def keep_statistics(module: nn.Module) -> Iterator[None]:
    """Freeze BN's running statistics: the first forward pass has already updated them."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
