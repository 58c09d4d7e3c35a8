import dataclasses
import sys

import pytest
import torch
import tyro

from benchmarks import detect, loss, step
from benchmarks.all import Config, number, run, table_lines
from benchmarks.processes import flags_of, run_variant
from benchmarks.rows import CPU_ROWS, CUDA_ROWS, Machine, network_flops
from nets.yolo import YoloV4
from utils.errors import UserError

MACHINE = Machine(flops=1e11, copied_bytes=1e10, number_type="float32")


def test_a_row_runs_its_script_and_reads_ratio_limit_and_share():
    row = CPU_ROWS[0]
    output = run(row, Config(small=True))
    (line,) = table_lines(row, output, MACHINE, with_limit=True)
    _, what, script, aim, measured, limit, share, _ = (cell.strip() for cell in line.split("|"))
    assert (what, script, aim) == (row.figures[0].what, "`benchmarks.loss`", "8 x")
    assert f"ratio {float(measured):.2f}" in output
    assert limit.endswith("ms")
    assert "% of" in share


def test_a_row_for_a_gpu_runs_small_without_one():
    output = run(CUDA_ROWS[0], Config(device="cuda", small=True))
    assert table_lines(CUDA_ROWS[0], output, MACHINE, with_limit=False)


def test_a_script_that_fails_is_shown():
    row = dataclasses.replace(CPU_ROWS[0], small="--rounds none")
    with pytest.raises(UserError, match=r"(?s)benchmarks\.loss --rounds none failed.*rounds"):
        run(row, Config(small=True))


def test_an_output_without_the_figure_is_an_error():
    assert number(r"took ([\d,]+) ms", "it took 1,234 ms") == 1234
    with pytest.raises(UserError, match="no line like"):
        number(r"took ([\d,]+) ms", "it took long")


def test_the_work_of_the_network_is_darknets():
    assert network_flops() / 1e9 == pytest.approx(59.6, abs=0.6)


def test_a_config_comes_through_its_flags():
    config = step.Config(input_shape=(64, 96), network=True, tf32=False, variant="ours")
    assert flags_of(step.Config()) == []
    assert tyro.cli(step.Config, args=flags_of(config), use_underscores=True) == config
    engines = detect.Config(engines=("onnxruntime", "openvino"), seed=3)
    assert tyro.cli(detect.Config, args=flags_of(engines), use_underscores=True) == engines


def test_a_variant_of_the_loss_gives_its_total_alone():
    config = loss.Config(batch_size=1, input_shape=(64, 64), rounds=1)
    totals = [
        run_variant("benchmarks.loss", dataclasses.replace(config, variant=variant))["total"]
        for variant in ("ours", "reference")
    ]
    assert totals[0] == pytest.approx(totals[1], rel=1e-4)


def test_both_ways_of_detection_keep_the_boxes_asked_for():
    config = detect.Config(input_shape=(96, 96), boxes=20, images=1)
    for variant in ("fork", "ours"):
        assert detect.measure(dataclasses.replace(config, variant=variant))["boxes"] == 20


def test_more_boxes_than_ours_keeps_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["detect", "--boxes", "301"])
    with pytest.raises(UserError, match="--boxes 301: give 1 to 300"):
        detect.main()


def test_the_network_alone_gets_gradients_and_is_not_trained(monkeypatch):
    model = YoloV4(3, width=0.1, depth=0.1)
    before = [parameter.clone() for parameter in model.parameters()]
    monkeypatch.setattr(step, "our_network", lambda config: model)
    config = step.Config(batch_size=2, input_shape=(64, 64), variant="ours")
    step.network_step(config, *step.make_batch(config))()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    assert all(map(torch.equal, before, model.parameters()))


def test_a_step_does_three_times_the_work_of_the_forward_pass():
    assert step.work(step.Config(batch_size=4)) == pytest.approx(12 * network_flops())
