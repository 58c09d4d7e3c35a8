"""Detection in half precision: what it changes, and that nothing is lost in silence."""

import numpy as np
import pytest
import torch

from engine.predictor import Predictor
from engine.settings import detection_dtype
from nets.decode import decode
from tests.test_predictor import (
    ANCHORS,
    INPUT_SHAPE,
    THRESHOLD,
    random_image,
    write_checkpoint,
)
from utils.errors import UserError
from weights.checkpoint import build_model, read_checkpoint


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "tiny.pt")


def test_detection_takes_fp16_on_a_gpu_and_float32_on_a_cpu_unless_told_otherwise():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    kinds = {"auto": torch.float16, "bf16": torch.bfloat16, "off": torch.float32}
    kinds |= {"fp16": torch.float16}
    assert {name: detection_dtype(name, gpu) for name in kinds} == kinds
    assert detection_dtype("auto", cpu) == detection_dtype("off", cpu) == torch.float32
    assert detection_dtype("bf16", cpu) == torch.bfloat16


def partners(one, other, *, pixels, score, clear):
    """Of the boxes of `one` that are clear of the threshold, which have a partner in `other`.

    A partner is of the same class, its edges and its score differ by no more than these.
    """
    found = []
    for row in np.flatnonzero(one.scores > THRESHOLD + clear):
        near = np.abs(other.boxes_xyxy - one.boxes_xyxy[row]).max(axis=1) < pixels
        near &= np.abs(other.scores - one.scores[row]) < score
        found.append((near & (other.class_ids == one.class_ids[row])).any())
    return np.array(found)


def test_in_bf16_the_boxes_are_the_same_within_2_pixels_and_their_scores_within_2_percent(weights):
    """Before NMS, which lets one of these random boxes win over its neighbours by a hair.

    In a few cells two classes are as likely.
    """
    image = random_image(64, 96)
    keep_all = {"device": "cpu", "nms_iou": 1.0}
    exact, rough = (Predictor(weights, **keep_all, amp=amp)(image) for amp in ("off", "bf16"))
    for one, other in ((exact, rough), (rough, exact)):
        found = partners(one, other, pixels=2, score=0.02, clear=0.02)
        assert len(found) > 80
        assert found.mean() > 0.9
    assert exact.boxes_xyxy.dtype == rough.boxes_xyxy.dtype == np.float32


def decoded_in(dtype, weights):
    checkpoint = read_checkpoint(weights)
    images = torch.from_numpy(random_image(64, 96)).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        outputs = build_model(checkpoint, "cpu", dtype)(images.to(dtype))
    assert {raw.dtype for raw in outputs} == {dtype}
    return decode(outputs, ANCHORS, INPUT_SHAPE, checkpoint["scale_xy"])


def test_fp16_rounds_several_times_finer_than_bf16(weights):
    """Why detection on a GPU takes it, where training takes bf16."""
    exact = decoded_in(torch.float32, weights)
    errors = {}
    for dtype in (torch.float16, torch.bfloat16):
        decoded = decoded_in(dtype, weights)
        assert decoded.dtype == torch.float32
        errors[dtype] = (decoded - exact).abs()
    assert errors[torch.float16][..., :4].mean() < 0.05  # pixels
    assert errors[torch.bfloat16][..., :4].mean() < 0.3
    ratio = errors[torch.bfloat16].mean() / errors[torch.float16].mean()
    assert 4 < ratio < 16


def test_on_a_cpu_the_default_is_float32_to_the_last_bit(weights):
    image = random_image(77, 130)
    default, off = (Predictor(weights, device="cpu", **k) for k in ({}, {"amp": "off"}))
    assert {p.dtype for p in default.model.parameters()} == {torch.float32}
    for name in ("boxes_xyxy", "scores", "class_ids"):
        assert np.array_equal(getattr(default(image), name), getattr(off(image), name))


def test_weights_or_activations_beyond_float16_are_told_not_dropped(weights):
    checkpoint = read_checkpoint(weights)
    checkpoint["model"]["backbone.stem.bn.weight"].fill_(1e7)
    with pytest.raises(UserError, match=r"range of float16\. Use amp bf16 or off"):
        build_model(checkpoint, "cpu", torch.float16)
    build_model(checkpoint, "cpu", torch.bfloat16)
    predictor = Predictor(weights, device="cpu")
    predictor.dtype = torch.float16
    predictor.model = build_model(read_checkpoint(weights), "cpu", torch.float16)
    assert len(predictor(random_image(64, 96))) > 5
    predictor.model.head_p4.output.bias[4] = float("inf")
    with pytest.raises(UserError, match="exceed the range of float16 on this image"):
        predictor(random_image(64, 96))


@pytest.mark.cuda
def test_on_a_gpu_the_default_is_fp16_and_finds_what_float32_finds(weights):
    image = random_image(64, 96)
    half = Predictor(weights, device="cuda", nms_iou=1.0)
    full = Predictor(weights, device="cuda", nms_iou=1.0, amp="off")
    assert {p.dtype for p in half.model.parameters()} == {torch.float16}
    found = partners(full(image), half(image), pixels=0.5, score=0.01, clear=0.01)
    assert len(found) > 80
    assert found.mean() > 0.9
