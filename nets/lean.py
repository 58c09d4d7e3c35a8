"""Convolution, BN and activation in training on a CPU: quick, and with little kept.

Autograd keeps three maps of a unit: the convolution's result, BN's, and the activation as the next
one's input. Here the first alone is kept; the others are computed from it again (nets/recipe.py).
Gradients of gradients are not to be had of it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nets.cpu import has_avx512, is_plain_cpu
from nets.mish import Mish
from nets.recipe import LEAKY_SLOPE, Recipe, Unit, activate_, give_recipe, recipe_of
from nets.weight_gradient import weight_gradient

PLAIN = (None, 1, (1, 1), "zeros")  # bias, groups, dilation, padding mode
MIN_CHANNELS = 16  # with fewer, the stem's, matrix products are too thin


def is_lean(x: Tensor, conv: nn.Module, norm: nn.Module, act: nn.Module) -> bool:
    """Whether `lean_unit` can take the place of the modules: training on a CPU without autocast,
    and modules as a ConvBnAct makes them, without hooks.

    A single pixel, for which BN has no variance, is left to BN and its message.
    """
    return (
        is_plain_cpu(x)
        and isinstance(norm, nn.BatchNorm2d)  # not folded
        and norm.training
        and norm.affine
        and norm.momentum is not None
        and (conv.bias, conv.groups, conv.dilation, conv.padding_mode) == PLAIN
        and (isinstance(act, Mish) or getattr(act, "negative_slope", None) == LEAKY_SLOPE)
        and not any(has_hooks(module) for module in (conv, norm, act))
        and torch.is_grad_enabled()
        and conv.weight.requires_grad
        and not torch.is_autocast_enabled("cpu")
        and x[:, 0].numel() > conv.stride[0] ** 2
    )


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def lean_unit(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, *, mish: bool) -> Tensor:
    """act(norm(conv(x))) of a layer in training, with its recipe. If x has one, x is not kept."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    parameters = (conv.weight, norm.weight, norm.bias)
    result, *made = _LeanUnit.apply(x, *parameters, conv, norm, mish, recipe_of(x))
    return give_recipe(result, Recipe((Unit(*made, mish),)))


class _LeanUnit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gamma: Tensor,
        beta: Tensor,
        conv: nn.Conv2d,
        norm: nn.BatchNorm2d,
        mish: bool,
        recipe: Recipe | None,
    ) -> tuple[Tensor, ...]:
        convolved = F.conv2d(x, weight, None, conv.stride, conv.padding)
        statistics = (norm.running_mean, norm.running_var)
        result, mean, inverse_std = torch.native_batch_norm(
            convolved, gamma, beta, *statistics, True, norm.momentum, norm.eps
        )
        scale = gamma * inverse_std
        made = (convolved, scale, beta - mean * scale)
        kept = [x] if recipe is None else recipe.tensors()
        ctx.save_for_backward(weight, gamma, mean, inverse_std, *made, *kept)
        ctx.mark_non_differentiable(*made)
        ctx.set_materialize_grads(False)
        ctx.conv, ctx.eps, ctx.mish = conv, norm.eps, mish
        ctx.form = None if recipe is None else recipe.form()
        return activate_(result, mish=mish), *made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        weight, gamma, mean, inverse_std, *tensors = ctx.saved_tensors
        unit, kept = Unit(*tensors[:3], ctx.mish), tensors[3:]
        grad = unit.input_gradient(grad)
        grad, *of_norm = torch.ops.aten.native_batch_norm_backward(
            *(grad, unit.convolved, gamma, None, None, mean, inverse_std, True, ctx.eps),
            [True, True, True],
        )
        x = kept[0] if ctx.form is None else Recipe.from_tensors(kept, ctx.form).make()
        of_x, of_weight = convolution_gradients(
            grad, x, weight, ctx.conv, of_input=ctx.needs_input_grad[0]
        )
        return of_x, of_weight, *of_norm, None, None, None, None


def convolution_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, conv: nn.Conv2d, *, of_input: bool
) -> tuple[Tensor | None, Tensor]:
    """The gradients of the input, if wanted, and of the weights."""
    by_torch = has_avx512() or x.shape[1] < MIN_CHANNELS
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        *(grad, x, weight, None, conv.stride, conv.padding, conv.dilation, False, (0, 0), 1),
        [of_input, by_torch, False],
    )
    if not by_torch:
        geometry = {"kernel_size": conv.kernel_size[0], "stride": conv.stride[0]}
        of_weight = weight_gradient(x, grad, **geometry, padding=conv.padding[0])
    return of_x, of_weight
