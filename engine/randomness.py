"""The generators of python and torch: seeded, saved and brought back."""

import random
from collections.abc import Mapping
from typing import Any

import torch


def seed_everything(seed: int, *, deterministic: bool) -> None:
    """Seed python and torch; with `deterministic`, avoid torch's faster algorithms that vary.

    An operation that has no other form only warns. The data need no seed of their own: each
    sample has a generator of its seed, epoch and index.
    """
    random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic != torch.are_deterministic_algorithms_enabled():  # setting it takes seconds
        torch.use_deterministic_algorithms(deterministic, warn_only=True)


def random_states() -> dict[str, Any]:
    """The states of python's and torch's generators, as plain types and tensors."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Inverse of `random_states`; CUDA states are restored where there are as many devices."""
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
