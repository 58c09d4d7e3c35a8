"""A training step never waits for the device: on a GPU that would cost the overlap of the two.

On a CPU every operation of a step is looked at: one that gives a number to the host, or whose
shape depends on values, or that copies a list of numbers to the device, would wait on a GPU. Whole
tensors that go to the host (cpu, numpy, tolist) show with CUDA's own check alone, the last test.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data.loader import to_input
from engine.optimizer import Ema, build_optimizer
from engine.trainer import TrainStep
from losses.yolo_loss import YOLOLoss
from nets.yolo import YoloV4
from tests.reference_loss import ANCHORS

WAITING = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select"),
    *("unique_dim", "_unique2", "repeat_interleave", "lift_fresh", "bincount"),
}


class Watch(TorchDispatchMode):
    """Collects the operations of the block that would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.waiting, self.count = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.count += 1
        if name in WAITING or (name.startswith("index") and has_mask(args)):
            self.waiting.append(name)
        return func(*args, **(kwargs or {}))


def has_mask(args):
    """Whether a list of indices holds one of booleans: how many it takes is asked for."""
    lists = [arg for arg in args if isinstance(arg, list | tuple)]
    tensors = [index for found in lists for index in found if isinstance(index, torch.Tensor)]
    return any(index.dtype in (torch.bool, torch.uint8) for index in tensors)


def make_step(device, *, amp_dtype=torch.bfloat16, optimizer="sgd", conf_loss="bce"):
    """A step of a small network; in half precision, as there it has no way of its own on a CPU."""
    torch.manual_seed(0)
    model = YoloV4(3, width=0.05, depth=0.1).to(device, memory_format=torch.channels_last)
    loss = YOLOLoss(ANCHORS, 3, (64, 96), conf_loss=conf_loss).to(device)
    return TrainStep(
        model=model,
        loss=loss,
        optimizer=build_optimizer(optimizer, model),
        ema=Ema(model, 0.99),
        device=device,
        amp_dtype=amp_dtype,
        clip_norm=10.0,
    )


def batch():
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.4, 0.3], [1, -1, 0.2, 0.3, 0.1, 0.1]])
    return images, targets


@pytest.mark.parametrize("operation", ["item", "mask", "mask_write", "list", "if", "nonzero"])
def test_the_watch_sees_what_waits(operation):
    x, mask = torch.rand(4), torch.tensor([True, False, True, True])
    with Watch() as watch:
        if operation == "item":
            x.sum().item()
        elif operation == "mask":
            x[mask]
        elif operation == "mask_write":
            x[mask] = torch.rand(3)
        elif operation == "list":
            x.new_tensor([1.0, 2.0])
        elif operation == "if":
            bool(x.sum() > 0)
        else:
            mask.nonzero()
    assert watch.waiting


@pytest.mark.parametrize(
    ("optimizer", "conf_loss"),
    [
        ("sgd", "bce"),
        ("adam", "focal(alpha='auto')"),
        ("adamw", "ghm"),
        ("sgd", "ohem"),
        ("sgd", "varifocal"),
    ],
)
def test_no_operation_of_a_step_waits_for_the_device(optimizer, conf_loss):
    step = make_step(torch.device("cpu"), optimizer=optimizer, conf_loss=conf_loss)
    step(*batch())  # the optimizer's first step makes its state
    images, targets = batch()
    with Watch() as watch:
        figures = step(images, targets, cells=True, size_hw=(96, 128))
    assert watch.waiting == []
    assert watch.count > 1000
    assert figures.read()[0]["finite"] == 1


@pytest.mark.cuda
@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_on_a_gpu_does_not_wait(amp_dtype, optimizer):
    step = make_step(torch.device("cuda"), amp_dtype=amp_dtype, optimizer=optimizer)
    images, targets = (tensor.pin_memory() for tensor in batch())
    for size_hw in (None, (96, 128)):  # cuDNN chooses its algorithms in the first of each
        step(images, targets, size_hw=size_hw)
    torch.cuda.set_sync_debug_mode("error")
    try:
        figures = step(images, targets, cells=True, size_hw=(96, 128))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert figures.read()[0]["finite"] == 1


@pytest.mark.cuda
def test_images_are_resized_on_a_gpu_as_on_a_cpu_up_to_rounding():
    images, _ = batch()
    for size_hw in ((64, 96), (32, 64), (96, 128)):
        found = to_input(images, torch.device("cuda"), size_hw)
        assert found.is_contiguous(memory_format=torch.channels_last)
        expected = to_input(images, torch.device("cpu"), size_hw)
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=2 / 255)
