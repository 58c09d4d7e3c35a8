"""Multi-scale training: every ten steps the input gets another size."""

import dataclasses
import math
from functools import cached_property

from data.sampler import random_generator
from nets.yolo import MAX_STRIDE
from utils.errors import UserError

PERIOD = 10  # steps of one size, as in darknet
INPUT_FIGURES = ("input_height", "input_width")  # of a step, in TensorBoard


@dataclasses.dataclass(frozen=True)
class MultiScale:
    """Which size the network's input has at a step: a function of seed and step alone.

    input_shape: (height, width). share: sizes lie between 1 / (1 + share) and 1 + share times
    that, darknet's random=1 being .4. They are all multiples of 32 there of the longer side; the
    shorter one has the same factor and is rounded to a multiple of 32, at least 32. So they are
    few, 9 for .4 at 416: cuDNN chooses its algorithms for each once.
    Every multiple is as likely as another, and stays so to the last epoch: unlike a mosaic, a
    resized image is a natural one. Validation is always at input_shape.
    Raises UserError for a share outside 0..1, or one that leaves input_shape as the only size.
    """

    input_shape: tuple[int, int]
    share: float
    seed: int

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise UserError(
                f"multi_scale is {self.share}; give a share from 0 (never) to below 1, such as 0.4."
            )
        if len(self.sizes) == 1:
            height, width = self.input_shape
            enough = math.ceil(1000 * MAX_STRIDE / max(height, width)) / 1000
            more = f"at least {enough}, " if enough < 1 else ""
            raise UserError(
                f"multi_scale {self.share} changes nothing: the next multiple of {MAX_STRIDE} is "
                f"further from input_shape {height} {width}. Give 0, {more}or a larger input_shape."
            )

    @cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """All (height, width), small to large."""
        longer, reach = max(self.input_shape) // MAX_STRIDE, 1 + self.share
        slack = 1e-9  # 160 is within a share of .25 of 128, whatever the rounding
        first, last = math.ceil(longer / reach - slack), math.floor(longer * reach + slack)
        return tuple(self._scaled(count / longer) for count in range(first, last + 1))

    def size_at(self, step: int) -> tuple[int, int]:
        """(height, width) of a step, counted over all epochs from 0."""
        # Four numbers, the last not 0 and not that of an epoch's order: no other draw has this key.
        rng = random_generator(self.seed, step // PERIOD, 0, 2)
        return self.sizes[rng.integers(len(self.sizes))]

    def _scaled(self, factor: float) -> tuple[int, int]:
        height, width = (
            MAX_STRIDE * max(1, round(side * factor / MAX_STRIDE)) for side in self.input_shape
        )
        return height, width

    def __str__(self) -> str:
        (low, left), (high, right) = self.sizes[0], self.sizes[-1]
        return (
            f"input: every {PERIOD} steps one of {len(self.sizes)} sizes, "
            f"{low} x {left} to {high} x {right}"
        )
