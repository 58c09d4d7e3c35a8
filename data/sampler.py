"""Which images make which batch and which mosaic, alike for any number of ranks and workers."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from data.voc import Sample
from utils.errors import UserError

BLOCK = 32  # images whose mosaics share their partners


def random_generator(*key: int) -> np.random.Generator:
    """A generator that depends on the key alone, such as (seed, epoch, index).

    Raises UserError for a negative number.
    """
    if min(key) < 0:
        raise UserError(f"A random seed was made of {key}; give a seed of 0 or more.")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def epoch_order(
    length: int, *, seed: int, epoch: int, repeats: np.ndarray | None = None
) -> np.ndarray:
    """(length,) the images of an epoch, shuffled by (seed, epoch) alone.

    repeats: (length,) how often each is drawn relative to the others; None: each once. A place
    `i + k * length` is the k-th further time that image i comes in this epoch.
    """
    # Four numbers, the last not 0: an image's own (seed, epoch, index) is never the same key.
    rng = random_generator(seed, epoch, 0, 1)
    if repeats is None:
        return rng.permutation(length)
    # Systematic sampling: an image of expectation e comes floor(e) or ceil(e) times.
    expected = np.cumsum(repeats * (length / repeats.sum()))
    drawn = np.searchsorted(expected, np.arange(length) + rng.random(), side="right")
    drawn = np.minimum(drawn, length - 1)
    times = np.arange(length) - np.searchsorted(drawn, drawn)
    return rng.permutation(drawn + times * length)


def repeat_factors(samples: Sequence[Sample], threshold: float) -> np.ndarray | None:
    """How often images with rare classes are repeated (Gupta et al. 2019, LVIS).

    A class that is in a share f < threshold of the images has the factor sqrt(threshold / f), an
    image the largest of its classes, at least 1. threshold 0: None, no image is repeated.
    """
    if not threshold:
        return None
    present = [np.unique(sample.class_ids[~sample.difficult]) for sample in samples]
    counts = Counter(np.concatenate(present).tolist()) if present else Counter()
    wanted = threshold * len(samples)
    factors = {name: max(1.0, math.sqrt(wanted / count)) for name, count in counts.items()}
    return np.array([max([1.0, *(factors[name] for name in own.tolist())]) for own in present])


class EpochBlocks:
    """For an image, the `BLOCK` images around it in an epoch's order, itself among them.

    A mosaic's partners are drawn from them: who loads one batch after the other decodes each
    image once, not four times, and still meets other partners in every epoch. Blocks depend on
    (seed, epoch) alone, so that batch size, workers and ranks change nothing.
    """

    def __init__(self, length: int, *, seed: int, repeats: np.ndarray | None = None):
        self.length, self.seed, self.repeats = length, seed, repeats
        self._epoch = -1
        self._order = self._places = np.empty(0, np.int64)

    def around(self, index: int, *, epoch: int) -> np.ndarray:
        """(min(BLOCK, length),) indices of images; `index` as `epoch_order` gives it."""
        if epoch != self._epoch:
            order = epoch_order(self.length, seed=self.seed, epoch=epoch, repeats=self.repeats)
            self._places = np.zeros(order.max() + 1, np.int64)
            self._places[order] = np.arange(self.length)
            self._order = order % self.length
            self._epoch = epoch
        start = self._places[index] // BLOCK * BLOCK
        start = max(0, min(start, self.length - BLOCK))  # the last one is whole, too
        return self._order[start : start + BLOCK]


class EpochBatchSampler(Sampler[list[int]]):
    """Batches of indices, shuffled by (seed, epoch) alone: `DataLoader(batch_sampler=...)`.

    All ranks together take the batches that one rank at batch_size * world_size would. The last
    one is filled from the start of the order, so that every step has the full size; a data set
    smaller than that gives one step of what there is, repeated only until the ranks have equally
    many. batch_size counts the images of one rank. repeats: as `epoch_order` takes them.

    Raises UserError for no images or a batch size below 1, ValueError for an impossible rank.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        repeats: np.ndarray | None = None,
    ):
        if length < 1:
            raise UserError("There is no image to train on: the training split is empty.")
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; give 1 or more.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in 0..{world_size - 1}")
        self.length = length
        self.batch_size = min(batch_size, -(-length // world_size))
        self.seed, self.rank, self.world_size, self.repeats = seed, rank, world_size, repeats
        self.epoch = self.start_step = 0

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch; with start_step, iteration begins at that step of it (a resume)."""
        self.epoch, self.start_step = epoch, start_step

    def __len__(self) -> int:
        """Steps of a whole epoch, whatever start_step is."""
        return -(-self.length // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(self.length, seed=self.seed, epoch=self.epoch, repeats=self.repeats)
        filled = np.resize(order, (len(self), self.world_size, self.batch_size))
        yield from filled[self.start_step :, self.rank].tolist()
