"""The network on a CPU: the same results up to rounding, in less time."""

from torch import nn

from nets.cpu.mish import FastMish
from nets.cpu.winograd import use_winograd


def use_fast_mish(model: nn.Module) -> None:
    """Replace, in place, each Mish by one that is quick on a CPU; it can be trained."""
    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Mish):
                setattr(module, name, FastMish(inplace=child.inplace))


def speed_up_detection(model: nn.Module) -> None:
    """Change, in place, a network with folded BN; it cannot be trained any more."""
    use_fast_mish(model)
    use_winograd(model)
