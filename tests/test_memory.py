"""Out of memory: recognized in all its forms, and batches that shrink until they fit."""

import json

import numpy as np
import pytest
import torch

import engine.predictor
import evaluate
from tests.factory import add_image, write_split
from tests.test_predict import read_records, run_main, write_image
from tests.test_predictor import CLASS_NAMES, write_checkpoint
from utils.errors import UserError
from utils.memory import FittingBatch, is_out_of_memory
from weights.checkpoint import build_model


def allocate_too_much():
    """A real failure of the CPU's allocator."""
    torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize("allocate", [allocate_too_much, lambda: np.empty(2**60, np.uint8)])
def test_a_failed_allocation_of_the_cpu_is_recognized(allocate):
    with pytest.raises((RuntimeError, MemoryError)) as failure:
        allocate()
    assert is_out_of_memory(failure.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        torch.AcceleratorError("CUDA error: out of memory", 2),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] data. DefaultCPUAllocator: not enough "
            "memory: you tried to allocate 400 bytes."
        ),
    ],
    ids=lambda error: str(error)[:40],
)
def test_every_form_is_recognized(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700),
        RuntimeError("CUDA error: no kernel image is available for execution on the device"),
        UserError("out of memory"),
        KeyError("out of memory"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_other_errors_are_not(error):
    assert not is_out_of_memory(error)


def fits(limit, sizes):
    """Work that runs out of memory above a batch size, and the sizes that it was given."""

    def work(size):
        sizes.append(size)
        if size > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return

    return work


def test_the_batch_is_halved_until_it_fits_and_stays_so(capsys):
    sizes, batch = [], FittingBatch(8)
    for _ in range(2):
        assert batch.run(fits(3, sizes)) is None
    assert sizes == [8, 4, 2, 2]
    assert capsys.readouterr().out.splitlines() == [
        "out of memory at batch 8: going on with 4",
        "out of memory at batch 4: going on with 2",
    ]


def test_out_of_memory_at_one_image_is_an_error_of_the_user():
    with pytest.raises(UserError, match=r"single image.*CUDA out of memory\."):
        FittingBatch(3).run(fits(0, []))


def test_other_errors_pass_at_once():
    sizes = []

    def fail(size):
        sizes.append(size)
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        FittingBatch(8).run(fail)
    assert sizes == [8]


@pytest.fixture
def two_at_a_time(monkeypatch):
    """Networks that run out of memory, in a real allocation, with more than two images."""

    def build(*arguments):
        def check(_, inputs):
            if len(inputs[0]) > 2:
                allocate_too_much()

        model = build_model(*arguments)
        model.register_forward_pre_hook(check)
        return model

    monkeypatch.setattr(evaluate, "build_model", build)
    monkeypatch.setattr(engine.predictor, "build_model", build)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "tiny.pt")


def results_of(evaluation):
    timed = ("config", "seconds", "images_per_second")
    return {key: value for key, value in evaluation.items() if key not in timed}


def test_evaluate_goes_on_with_half_the_batch(
    weights, tmp_path, two_at_a_time, monkeypatch, capsys
):
    noise = np.random.default_rng(0)
    for name in "abcde":
        image = noise.integers(0, 255, (70, 90, 3), dtype=np.uint8)
        add_image(tmp_path / "voc", name, image, [(CLASS_NAMES[0], (10, 10, 60, 50))])
    write_split(tmp_path / "voc", "test", "abcde")
    found = {}
    for size in ("2", "8"):
        folder = tmp_path / size
        flags = ["--weights", str(weights), "--data", f"{tmp_path / 'voc'}:test"]
        flags += ["--save_dir", str(folder), "--device", "cpu", "--num_workers", "0"]
        monkeypatch.setattr("sys.argv", ["evaluate.py", *flags, "--batch_size", size])
        evaluate.main()
        found[size] = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert results_of(found["8"]) == results_of(found["2"])
    assert found["8"]["counts"]["images"] == 5
    output = capsys.readouterr().out
    assert output.count("out of memory at batch 8: going on with 4") == 1
    assert output.count("out of memory at batch 4: going on with 2") == 1
    assert output.count("out of memory") == 2


def test_predict_goes_on_with_half_the_batch(weights, tmp_path, two_at_a_time, monkeypatch, capsys):
    (tmp_path / "images").mkdir()
    for number in range(9):
        write_image(tmp_path / "images" / f"{number}.png", seed=number)
    for size in (2, 8):
        flags = {"weights": weights, "source": tmp_path / "images", "batch_size": size}
        run_main(monkeypatch, **flags, save_dir=tmp_path / str(size))
    assert read_records(tmp_path / "8") == read_records(tmp_path / "2")
    assert len(read_records(tmp_path / "8")) == 9
    output = capsys.readouterr().out
    assert output.count("out of memory") == 2  # from 8 to 4 to 2, once for all batches
