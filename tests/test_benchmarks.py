import dataclasses
import re
import sys
import time

import pytest
import torch
import tyro

from benchmarks import detect, gpu_check, loss, step
from benchmarks.processes import flags_of, run_variant
from nets.yolo import YoloV4
from utils.errors import UserError


def test_the_check_runs_small_on_a_cpu_and_goes_on_after_a_failure(tmp_path):
    def broken(bench):
        raise KeyError("nothing")

    bench = gpu_check.Bench("cpu", tmp_path, time.monotonic() + 300, "")
    assert gpu_check.judge(broken, bench).startswith("failed | KeyError: 'nothing'")
    assert re.match(r"passed \| [\d.]+ ms, ratio", gpu_check.judge(gpu_check.loss, bench))
    assert re.match(r"passed \| [\d.]+ of a plain step", gpu_check.judge(gpu_check.cells, bench))
    assert gpu_check.judge(gpu_check.detection, bench).startswith("failed | evaluate.py --weights")
    late = dataclasses.replace(bench, deadline=time.monotonic() - 1)
    assert gpu_check.judge(gpu_check.loss, late) == "skipped | out of time"


def test_a_check_that_takes_too_long_is_ended(tmp_path):
    bench = gpu_check.Bench("cpu", tmp_path, time.monotonic() + 1, "")
    with pytest.raises(gpu_check.CheckError, match="out of time: -c"):
        bench.run("-c", "import time; time.sleep(60)")


def test_the_work_of_the_network_is_darknets():
    assert step.work(step.Config(batch_size=1)) / 3e9 == pytest.approx(59.6, abs=0.6)


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
