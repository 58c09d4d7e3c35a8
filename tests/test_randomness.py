import os
import random

import torch

from engine.process import random_states, restore_random_states, seed_everything


def numbers():
    return random.random(), torch.rand(3).tolist()


def test_one_seed_gives_one_sequence():
    seed_everything(3, deterministic=False)
    first = numbers()
    seed_everything(3, deterministic=False)
    assert numbers() == first
    seed_everything(4, deterministic=False)
    assert numbers() != first


def test_deterministic_is_a_switch_of_torch():
    seed_everything(0, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.backends.cudnn.benchmark
    seed_everything(0, deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_random_states_bring_the_same_numbers_back():
    states = random_states()
    first = numbers()
    restore_random_states(states)
    assert numbers() == first
