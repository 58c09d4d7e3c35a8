"""The place and layout of a network in memory."""

from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def move(network: Network, device: torch.device | str, dtype: torch.dtype | None = None) -> Network:
    """Move the network itself to a device, its weights in channels_last, which suits convolutions.

    Args:
        dtype: Of the weights; None keeps it.
    """
    # torch's stubs of Module.to lack the memory format.
    return network.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
