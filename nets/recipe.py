"""How to make an activation again in the backward pass, instead of keeping it. Training on a CPU.

A map that a unit (convolution, BN, activation) returns carries its recipe as an attribute. What
takes the map as its input keeps the recipe's tensors, which that unit keeps anyway.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nets.mish import mish_, mish_backward_

LEAKY_SLOPE = 0.1


class Unit(NamedTuple):
    """activation(scale * convolved + shift)."""

    convolved: Tensor  # (B, C, H, W)
    scale: Tensor  # (C,)
    shift: Tensor  # (C,)
    mish: bool  # else leaky ReLU

    def normalised(self) -> Tensor:
        """What the activation is given: BN's result."""
        mean, variance = torch.zeros_like(self.scale), torch.ones_like(self.scale)
        return F.batch_norm(self.convolved, mean, variance, self.scale, self.shift, eps=0.0)

    def make(self) -> Tensor:
        return activate_(self.normalised(), mish=self.mish)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """The gradient with respect to `normalised`, from that with respect to the activation."""
        x = self.normalised()
        if self.mish:
            return mish_backward_(x, grad)
        return torch.ops.aten.leaky_relu_backward(grad, x, LEAKY_SLOPE, False)


class Recipe(NamedTuple):
    """Units, and whether their activations are added or, if not, concatenated."""

    units: tuple[Unit, ...]
    added: bool = True

    def make(self) -> Tensor:
        first, *others = (unit.make() for unit in self.units)
        if not self.added:
            return torch.cat((first, *others), dim=1)
        for other in others:
            first += other
        return first

    def tensors(self) -> list[Tensor]:
        """Three of each unit: what a backward pass has to keep."""
        return [tensor for unit in self.units for tensor in unit[:3]]

    def form(self) -> tuple[list[bool], bool]:
        """All that is not a tensor, for `from_tensors`."""
        return [unit.mish for unit in self.units], self.added

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor], form: tuple[list[bool], bool]) -> "Recipe":
        mish, added = form
        triples = zip(tensors[::3], tensors[1::3], tensors[2::3], mish, strict=True)
        return cls(tuple(Unit(*triple) for triple in triples), added)


def activate_(x: Tensor, *, mish: bool) -> Tensor:
    """Overwrite x with its activation; returns it."""
    return mish_(x) if mish else F.leaky_relu_(x, LEAKY_SLOPE)


def give_recipe(x: Tensor, recipe: Recipe) -> Tensor:
    """x, which then carries its recipe, as long as nothing changes it in place."""
    x.recipe, x.recipe_version = recipe, x._version
    return x


def recipe_of(x: Tensor) -> Recipe | None:
    """None for a map without one, or changed since."""
    recipe = getattr(x, "recipe", None)
    return recipe if recipe is not None and x._version == x.recipe_version else None


def concatenate(x: Tensor, y: Tensor) -> Tensor:
    """torch.cat of two maps along their channels."""
    return _combine(torch.cat((x, y), dim=1), x, y, added=False)


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y."""
    return _combine(x + y, x, y, added=True)


def _combine(result: Tensor, x: Tensor, y: Tensor, *, added: bool) -> Tensor:
    """Give the result a recipe of two units, not of more: each is made again for every use."""
    recipes = (recipe_of(x), recipe_of(y))
    if all(recipe is not None and len(recipe.units) == 1 for recipe in recipes):
        return give_recipe(result, Recipe(recipes[0].units + recipes[1].units, added))
    return result
