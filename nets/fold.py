"""Fold BN into the convolutions before it: the same network, for detection only."""

import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from nets.blocks import ConvBnAct


@torch.no_grad()
def fold_batch_norm(model: nn.Module) -> None:
    """Fold, in place, each BN of a network in eval mode into its convolution.

    The outputs stay the same up to rounding. Activations then overwrite their input, so the network
    can no longer be trained.

    Raises:
        ValueError: If the network is in training mode.
    """
    if model.training:
        raise ValueError("BN has no fixed statistics in training mode: call model.eval() first")
    for module in model.modules():
        if isinstance(module, ConvBnAct) and not isinstance(module.bn, nn.Identity):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
            module.act.inplace = True
