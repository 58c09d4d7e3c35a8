import copy

import pytest
import torch

from nets.recompute import keep_statistics
from nets.yolo import YoloV4


def networks():
    torch.manual_seed(0)
    plain = YoloV4(2, width=0.1, depth=0.34)
    frugal = copy.deepcopy(plain)
    frugal.backbone.recompute = True
    return plain, frugal


def step(network, images):
    sum(output.square().mean() for output in network(images)).backward()


def test_a_recomputed_step_has_the_gradients_and_statistics_of_a_plain_one():
    plain, frugal = networks()
    images = torch.rand(2, 3, 64, 64)
    for _ in range(2):
        step(plain, images)
        step(frugal, images)
    pairs = zip(plain.named_parameters(), frugal.parameters(), strict=True)
    for (name, expected), found in pairs:
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-7, msg=name)
    for (name, expected), found in zip(plain.named_buffers(), frugal.buffers(), strict=True):
        assert torch.equal(found, expected), name


def kept_bytes(network, images):
    kept = {}

    def note(tensor):
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        network(images)
    return sum(kept.values())


def test_a_recomputed_step_keeps_less():
    plain, frugal = networks()
    images = torch.rand(2, 3, 128, 128)
    assert kept_bytes(frugal, images) < 0.6 * kept_bytes(plain, images)


@pytest.mark.parametrize("training", [False, True])
def test_without_gradients_nothing_is_different(training):
    plain, frugal = networks()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for expected, found in zip(
            plain.train(training)(images), frugal.train(training)(images), strict=True
        ):
            assert torch.equal(found, expected)


def test_an_error_leaves_the_statistics_running():
    network = YoloV4(2, width=0.1, depth=0.1)
    with pytest.raises(ZeroDivisionError), keep_statistics(network):
        raise ZeroDivisionError
    network(torch.rand(1, 3, 64, 64))
    assert network.backbone.stem.bn.running_mean.any()
    assert network.backbone.stem.bn.momentum == 0.1
