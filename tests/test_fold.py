import pytest
import torch
from torch import nn

from nets.fold import fold_batch_norm
from nets.yolo import YoloV4
from utils.errors import UserError
from weights.darknet import save_darknet_weights


def random_network():
    torch.manual_seed(0)
    network = YoloV4(3, width=0.1, depth=0.1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


def test_a_folded_network_computes_the_same():
    network, images = random_network(), torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected = network(images)
        kept = images.clone()
        fold_batch_norm(network)
        for found, wanted in zip(network(images), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert torch.equal(images, kept)


def test_folding_twice_changes_nothing():
    network = random_network()
    fold_batch_norm(network)
    folded = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    fold_batch_norm(network)
    assert all(torch.equal(folded[name], tensor) for name, tensor in network.state_dict().items())


def test_a_folded_network_is_not_written_as_a_darknet_file(tmp_path):
    network = random_network()
    fold_batch_norm(network)
    with pytest.raises(UserError, match="BN folded in"):
        save_darknet_weights(network, tmp_path / "a.weights")
    assert list(tmp_path.iterdir()) == []


def test_a_network_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="eval"):
        fold_batch_norm(random_network().train())
