"""What confidence losses measure is one for all ranks."""

import pytest
import torch
import torch.distributed as dist

from losses.conf import build_conf_loss
from utils.distributed import sum_over_ranks

SPECS = ("ghm(bins=6)", 'focal(alpha="auto")')


def batches():
    """Two steps of logits, targets and mask, (6, 40) each; the last rows have no positive."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        logits = torch.randn(6, 40, generator=generator) * 3
        targets = (torch.rand(6, 40, generator=generator) < 0.2).float()
        targets[4:] = 0
        yield logits, targets, torch.rand(6, 40, generator=generator) < 0.8


def train(spec, rows):
    """The state after two steps over these rows of the batch, and the last losses."""
    loss = build_conf_loss(spec)
    for batch in batches():
        losses = loss(*(part[rows] for part in batch))
    return {"losses": losses, "eval": loss.eval()(*batch), **loss.state_dict()}


def one_rank(rank, folder):
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    rows = slice(0, 4) if rank == 0 else slice(4, 6)
    found = {spec: train(spec, rows) for spec in SPECS}
    found["sum"] = sum_over_ranks(torch.tensor([1.0, rank]))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_a_single_process_sums_to_itself():
    assert sum_over_ranks(torch.tensor([1.0, 2.0])).tolist() == [1, 2]


def test_two_ranks_have_the_state_and_the_losses_of_the_joint_batch(tmp_path):
    torch.multiprocessing.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert [rank["sum"].tolist() for rank in ranks] == [[2, 1], [2, 1]]
    for spec in SPECS:
        joint = train(spec, slice(None))
        parts = [rank[spec] for rank in ranks]
        losses = torch.cat([part.pop("losses") for part in parts])
        torch.testing.assert_close(losses, joint.pop("losses"))
        for part in parts:
            torch.testing.assert_close(part, joint)


@pytest.mark.parametrize("spec", SPECS)
def test_a_rank_alone_would_measure_something_else(spec):
    ours, joint = train(spec, slice(0, 4)), train(spec, slice(None))
    assert not torch.equal(ours["eval"], joint["eval"])
