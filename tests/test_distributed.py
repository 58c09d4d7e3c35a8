import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.training import flags
from utils.distributed import (
    broadcast_object,
    first_of_machine_first,
    gather_objects,
    is_main,
    patient_group,
    select_device,
    world_size,
)
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
    with patient_group() as group:
        assert broadcast_object({"from": rank()}, group) == {"from": 0}
    if is_main():
        print("fine")
"""


def test_a_single_process_is_a_world_of_its_own():
    assert (world_size(), is_main(), gather_objects("a")) == (1, True, ["a"])
    with patient_group() as group, first_of_machine_first(group):
        assert broadcast_object("a", group) == "a"


def run_on_two_ranks(folder, text, *arguments):
    """Run a script under torchrun. Returns the finished process."""
    script = folder / "two.py"
    script.write_text(text)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    return subprocess.run(
        [*command, "--standalone", str(script), *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def assert_fine_on_two_ranks(folder, text, *arguments):
    """Run a script that says "fine" on the main of two ranks. Returns the finished process."""
    done = run_on_two_ranks(folder, text, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fine") == 1
    return done


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
    step.network = data_parallel(step.model)
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


ONE_FAILS = """
import sys, time
from pathlib import Path
import torch
from utils.distributed import process_group, rank, sum_over_ranks
from utils.errors import UserError, run_script

def main():
    with process_group(torch.device("cpu")):
        sum_over_ranks(torch.ones(1))
        if rank() == 1:
            print("about to fail")
            Path(sys.argv[1]).write_text(str(time.time()))
            raise UserError("lr is -1; give 0 or more.")
        sum_over_ranks(torch.ones(1))

run_script(main)
"""


def test_an_error_on_one_rank_ends_both_and_only_its_message_is_printed(tmp_path):
    done = run_on_two_ranks(tmp_path, ONE_FAILS, tmp_path / "failed")
    assert time.time() - float((tmp_path / "failed").read_text()) < 15
    assert done.returncode != 0
    assert done.stderr.count("error: lr is -1; give 0 or more.") == 1
    assert "exitcode  : 2" in done.stderr
    assert "RuntimeError" not in done.stderr  # of the collective that rank 0 waited in
    assert "about to fail" in done.stdout  # os._exit flushes nothing by itself


ALL_FAIL = """
import torch
from utils.distributed import process_group, rank
from utils.errors import run_script

def main():
    with process_group(torch.device("cpu")):
        1 / 0

run_script(main)
"""


def test_an_unexpected_error_of_all_ranks_has_one_traceback(tmp_path):
    done = run_on_two_ranks(tmp_path, ALL_FAIL)
    assert done.returncode != 0
    assert done.stderr.count("ZeroDivisionError: ") == 1
    assert done.stderr.count("an error on rank") == 1


SLOW_DATA = """
import os, sys, time
from pathlib import Path
import torch
import train
from utils.distributed import is_main, process_group, rank, sum_over_ranks
from datetime import timedelta

def slowed(work):
    def slow(*arguments, **options):
        time.sleep(4)
        return work(*arguments, **options)
    return slow

root, folder = map(Path, sys.argv[1:])
(folder / os.environ["RANK"]).touch()
while len(list(folder.glob("[01]"))) < 2:  # the timeout counts from here
    time.sleep(0.1)
train.read_splits, train.training_set = slowed(train.read_splits), slowed(train.training_set)
config = train.Config(train=f"{root}:train", val=f"{root}:val", classes_path=root / "classes.txt")
with process_group(torch.device("cpu"), timeout=timedelta(seconds=3)):
    train_set, val_samples = train.load_data(config, ("red", "green"), folder)
    assert (len(train_set), len(val_samples)) == (8, 4)
    sum_over_ranks(torch.ones(1))
    if is_main():
        print("fine", flush=True)
    if rank() == 1:
        time.sleep(4)
    sum_over_ranks(torch.ones(1))
"""


def test_only_reading_the_data_and_filling_the_cache_may_outlast_the_timeout(tiny_voc, tmp_path):
    """Rank 0 reads, then fills its cache, then waits while rank 1 fills its own: 4 s each."""
    done = run_on_two_ranks(tmp_path, SLOW_DATA, tiny_voc, tmp_path)
    assert done.stdout.count("fine") == 1, done.stderr
    assert done.returncode != 0  # the second collective waited for the usual 3 s
    assert "timed out" in done.stderr.lower(), done.stderr


MIXED = """
import os, sys
import train
from utils.errors import run_script

sys.argv += ["--amp", ("bf16", "off")[int(os.environ["RANK"])]]
run_script(train.main)
"""


def test_ranks_of_different_precision_train_in_that_of_the_least_capable(tiny_voc, tmp_path):
    arguments = flags(tiny_voc, tmp_path / "run", epochs=1)
    done = run_on_two_ranks(tmp_path, MIXED, *arguments)
    assert done.returncode == 0, done.stderr
    line = "precision: float32 on every rank, since the ranks have bfloat16, float32"
    assert done.stdout.count(line) == 1
    assert done.stdout.count("precision:") == 1


HUNGRY = """
import os
import torch
from torch import nn

class Hungry(nn.Module):
    def forward(self, logits, targets):
        if os.environ["RANK"] == "1" and logits.numel() > 1000:  # a batch, not the first check
            torch.empty(2**60, dtype=torch.uint8)
        return logits.square()
"""


def test_out_of_memory_on_one_rank_of_a_training_ends_it_with_one_message(tiny_voc, tmp_path):
    (tmp_path / "my_losses.py").write_text(HUNGRY)
    arguments = flags(tiny_voc, tmp_path / "run", conf_loss="my_losses:Hungry")
    done = run_on_two_ranks(tmp_path, (ROOT / "train.py").read_text(), *arguments)
    assert done.returncode != 0
    assert done.stderr.count("memory is not enough") == 1
    assert done.stderr.count("--batch_size") == 1
    assert "RuntimeError" not in done.stderr
