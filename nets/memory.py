"""Where a network lies in memory."""

from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def move(network: Network, device: torch.device | str, dtype: torch.dtype | None = None) -> Network:
    """The network itself on a device, its weights in channels_last, as convolutions like it best.

    dtype None: as it is.
    """
    # torch's stubs of Module.to lack the memory format.
    return network.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
