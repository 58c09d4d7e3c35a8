import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils.distributed import gather_objects, is_main, select_device, world_size
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
TWO_RANKS = """
import torch
from utils.distributed import *
with process_group(torch.device("cpu")):
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean.fill_(rank() + 5)
    broadcast_buffers(norm)
    assert norm.running_mean.tolist() == [5, 5]
    assert gather_objects(rank()) == [0, 1] and world_size() == 2
    assert broadcast_object({"from": rank()}) == {"from": 0}
    if is_main():
        print("fine")
"""


def test_a_single_process_is_a_world_of_its_own():
    assert (world_size(), is_main(), gather_objects("a")) == (1, True, ["a"])


def assert_fine_on_two_ranks(folder, text):
    """Run a script that says "fine" on the main of two ranks."""
    script = folder / "two.py"
    script.write_text(text)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "--standalone", str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fine") == 1


def test_two_ranks_share_buffers_and_objects(tmp_path):
    assert_fine_on_two_ranks(tmp_path, TWO_RANKS)


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_told(name):
    with pytest.raises(UserError, match="cpu"):
        select_device(name)


def test_no_name_means_a_gpu_when_there_is_one():
    assert select_device("").type == ("cuda" if torch.cuda.is_available() else "cpu")


ACCUMULATE = """
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from utils.distributed import *
from tests.test_step import batch, make_step

with process_group(torch.device("cpu")):
    step = make_step(bn=False)
    step.network = DistributedDataParallel(step.model, broadcast_buffers=False)
    for number in range(4):
        step(*batch(seed=10 * rank() + number), group_size=2, update=number % 2 == 1)
        if number % 2 == 0:
            first, second = gather_objects([p.grad.clone() for p in step.model.parameters()])
            assert not all(torch.equal(a, b) for a, b in zip(first, second)), number
        first, second = gather_objects([p.detach().clone() for p in step.model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(first, second)), number

    alone = make_step(bn=False)
    for pair in ((0, 1), (2, 3)):
        seeds = [10 * r + number for number in pair for r in (0, 1)]
        for place, seed in enumerate(seeds):
            alone(*batch(seed=seed), group_size=4, update=place == 3)
    for a, b in zip(alone.model.parameters(), first):
        torch.testing.assert_close(a.detach(), b)
    if is_main():
        print("fine")
"""


def test_ranks_add_up_their_gradients_once_an_update(tmp_path):
    assert_fine_on_two_ranks(tmp_path, ACCUMULATE)
