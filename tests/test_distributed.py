import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.distributed import gather_objects, is_main, select_device, world_size
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
TWO_RANKS = """
import torch
from engine.distributed import *
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


def test_two_ranks_share_buffers_and_objects(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_RANKS)
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


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_told(name):
    with pytest.raises(UserError, match="cpu"):
        select_device(name)


def test_no_name_means_a_gpu_when_there_is_one():
    assert select_device("").type == ("cuda" if torch.cuda.is_available() else "cpu")
