import sys

import pytest
import torch

from nets.yolo import YoloV4
from tools.summary import convolution_flops, main, meta_model, trace_layers
from utils.errors import run_script

BFLOPS = {320: 35.56, 416: 60.10, 512: 91.05, 608: 128.39}


@pytest.fixture(scope="module")
def full_model():
    return meta_model(80)


@pytest.mark.parametrize("size", sorted(BFLOPS))
def test_convolution_work_of_yolov4(full_model, size):
    work = convolution_flops(trace_layers(full_model, (size, size)))
    assert work / 1e9 == pytest.approx(BFLOPS[size], abs=0.005)


def test_layers_cover_all_parameters_and_run_in_the_order_of_registration(full_model):
    layers = trace_layers(full_model, (64, 32))
    assert sum(layer.parameters for layer in layers) == 64_363_101
    names = [layer.name for layer in layers if layer.kind.startswith("conv")]
    registered = [name for name, _ in full_model.named_modules() if name in set(names)]
    assert len(names) == 110
    assert names == registered
    assert layers[0].output_shape == (32, 64, 32)
    assert layers[-1].output_shape == (255, 2, 1)


def test_the_activation_estimate_is_close_to_what_autograd_keeps():
    model = YoloV4(2, width=0.1, depth=0.5).train()
    kept = {}

    def keep(tensor):
        if tensor.is_floating_point() and not tensor.is_leaf:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(torch.rand(2, 3, 128, 128))
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 2
    layers = trace_layers(meta_model(2, width=0.1, depth=0.5), (128, 128))
    assert len(outputs) == 3
    assert sum(layer.activation_bytes for layer in layers) == pytest.approx(measured, rel=0.02)


def run_summary(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["summary", *flags])
    run_script(main)


def test_the_command_prints_layers_parameters_work_and_memory(monkeypatch, capsys):
    run_summary(monkeypatch, "--num_classes", "80", "--input-shape", "608", "608")
    output = capsys.readouterr().out
    for promise in ("backbone.stem", "32 x 608 x 608", "64,363,101", "128.39 BFLOPs", "246 MiB"):
        assert promise in output


def test_a_bad_shape_is_one_line_and_exit_status_2(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run_summary(monkeypatch, "--width", "0.25", "--input_shape", "100", "416")
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: input of 100 x 416")
