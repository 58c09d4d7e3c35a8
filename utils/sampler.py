"""Which pictures make which batch and which mosaic, alike for any number of ranks and workers."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from utils.errors import UserError

BLOCK = 32  # pictures whose mosaics share their partners


def random_generator(*key: int) -> np.random.Generator:
    """A generator that depends on the key alone, such as (seed, epoch, index).

    Raises UserError for a negative number.
    """
    if min(key) < 0:
        raise UserError(f"A random seed was made of {key}; give a seed of 0 or more.")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def epoch_order(length: int, *, seed: int, epoch: int) -> np.ndarray:
    """(length,) the pictures of an epoch, shuffled by (seed, epoch) alone."""
    # Four numbers, the last not 0: a picture's own (seed, epoch, index) is never the same key.
    return random_generator(seed, epoch, 0, 1).permutation(length)


class EpochBlocks:
    """For a picture, the `BLOCK` pictures around it in an epoch's order, itself among them.

    A mosaic's partners are drawn from them: who loads one batch after the other decodes each
    picture once, not four times, and still meets other partners in every epoch. Blocks depend on
    (seed, epoch) alone, so that batch size, workers and ranks change nothing.
    """

    def __init__(self, length: int, *, seed: int):
        self.length, self.seed = length, seed
        self._epoch = -1
        self._order = self._places = np.empty(0, np.int64)

    def around(self, index: int, *, epoch: int) -> np.ndarray:
        """(min(BLOCK, length),) indices."""
        if epoch != self._epoch:
            self._order = epoch_order(self.length, seed=self.seed, epoch=epoch)
            self._places = np.argsort(self._order)
            self._epoch = epoch
        start = self._places[index] // BLOCK * BLOCK
        start = max(0, min(start, self.length - BLOCK))  # the last one is whole, too
        return self._order[start : start + BLOCK]


class EpochBatchSampler(Sampler[list[int]]):
    """Batches of indices, shuffled by (seed, epoch) alone: `DataLoader(batch_sampler=...)`.

    All ranks together take the batches that one rank at batch_size * world_size would. The last
    one is filled from the start of the order, so that every step has the full size; a data set
    smaller than that gives one step of what there is, repeated only until the ranks have equally
    many. batch_size counts the pictures of one rank.

    Raises UserError for no pictures or a batch size below 1, ValueError for an impossible rank.
    """

    def __init__(
        self, length: int, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1
    ):
        if length < 1:
            raise UserError("There is no picture to train on: the training split is empty.")
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; give 1 or more.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in 0..{world_size - 1}")
        self.length = length
        self.batch_size = min(batch_size, -(-length // world_size))
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch = self.start_step = 0

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch; with start_step, iteration begins at that step of it (a resume)."""
        self.epoch, self.start_step = epoch, start_step

    def __len__(self) -> int:
        """Steps of a whole epoch, whatever start_step is."""
        return -(-self.length // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(self.length, seed=self.seed, epoch=self.epoch)
        filled = np.resize(order, (len(self), self.world_size, self.batch_size))
        yield from filled[self.start_step :, self.rank].tolist()
