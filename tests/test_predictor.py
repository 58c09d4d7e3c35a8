import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from data.letterbox import letterbox, letterbox_to_image
from engine.predictor import Detections, Predictor, to_rgb
from metrics.nms import non_max_suppression
from nets.decode import decode
from nets.yolo import YoloV4
from utils.errors import UserError
from weights.checkpoint import build_model, read_checkpoint, save_checkpoint

CLASS_NAMES = ["disc", "Möhre", "猫"]
ANCHORS = [(8, 9), (12, 16), (19, 13), (25, 30), (40, 28), (33, 50), (60, 55), (72, 40), (80, 64)]
INPUT_SHAPE = (64, 96)
THRESHOLD = 0.28
HEAD_STD = 3.0  # spreads the scores from .2 to .6


def write_checkpoint(path, **changes):
    """A real checkpoint of a tiny untrained network, which finds some ten boxes or more.

    The weights are drawn here, so that the trainer's choice of initial values does not matter.
    """
    torch.manual_seed(0)
    model = YoloV4(len(CLASS_NAMES), width=0.1, depth=0.1)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    for head in (model.head_p3, model.head_p4, model.head_p5):
        torch.nn.init.normal_(head.output.weight, std=HEAD_STD)
        torch.nn.init.zeros_(head.output.bias)
    checkpoint = {
        "model": model.state_dict(),
        "class_names": CLASS_NAMES,
        "anchors": ANCHORS,
        "input_shape": INPUT_SHAPE,
        "width": 0.1,
        "depth": 0.1,
        "scale_xy": (1.2, 1.1, 1.05),
        "conf_loss": "bce",
        "conf_threshold": THRESHOLD,
        "config": {},
        "epoch": 0,
        "metrics": {},
    }
    save_checkpoint(path, {**checkpoint, **changes})
    return path


def random_image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def assert_same(one, other):
    assert one.class_names == other.class_names
    np.testing.assert_array_equal(one.class_ids, other.class_ids)
    np.testing.assert_allclose(one.scores, other.scores, rtol=1e-4)
    np.testing.assert_allclose(one.boxes_xyxy, other.boxes_xyxy, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "tiny.pt")


@pytest.fixture(scope="module")
def predictor(weights):
    return Predictor(weights, device="cpu")


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 500), (64, 96), (300, 40), (77, 130)])
def test_equals_letterbox_network_decode_and_nms_by_hand(weights, size_hw):
    image = random_image(*size_hw)
    checkpoint = read_checkpoint(weights)
    model = build_model(checkpoint, "cpu")
    pixels = torch.from_numpy(letterbox(image, INPUT_SHAPE)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        decoded = decode(model(pixels), ANCHORS, INPUT_SHAPE, checkpoint["scale_xy"])
    (rows,) = non_max_suppression(decoded, 0.25, 0.45)
    boxes = letterbox_to_image(rows[:, :4], INPUT_SHAPE, size_hw)
    expected = Detections(
        boxes.numpy(), rows[:, 4].numpy(), rows[:, 5].long().numpy(), tuple(CLASS_NAMES)
    )
    predictor = Predictor(weights, device="cpu", conf_threshold=0.25)
    detections = predictor(image)
    assert len(detections) > 5
    assert_same(detections, expected)
    assert predictor.max_score == pytest.approx(rows[0, 4].item(), rel=1e-4)


def test_types_shapes_order_and_limits_of_the_result(predictor):
    detections = predictor(random_image(77, 130))
    count = len(detections)
    assert [field.name for field in dataclasses.fields(detections)] == [
        *("boxes_xyxy", "scores", "class_ids", "class_names")
    ]
    assert (detections.boxes_xyxy.dtype, detections.boxes_xyxy.shape) == (np.float32, (count, 4))
    assert (detections.scores.dtype, detections.scores.shape) == (np.float32, (count,))
    assert (detections.class_ids.dtype, detections.class_ids.shape) == (np.int64, (count,))
    assert detections.class_names == tuple(CLASS_NAMES)
    assert (np.diff(detections.scores) <= 0).all()
    assert (detections.boxes_xyxy >= 0).all()
    assert (detections.boxes_xyxy <= (130, 77, 130, 77)).all()


def test_nothing_found_gives_empty_arrays_of_the_same_kind_and_the_highest_score(weights):
    predictor = Predictor(weights, device="cpu", conf_threshold=1.0)
    detections = predictor(random_image(20, 30))
    assert detections.boxes_xyxy.shape == (0, 4)
    assert (detections.boxes_xyxy.dtype, detections.class_ids.dtype) == (np.float32, np.int64)
    assert THRESHOLD < predictor.max_score < 1


def test_a_list_in_gives_a_list_out_whatever_the_batch_size(predictor):
    images = [random_image(40 + 9 * index, 70, index) for index in range(5)]
    singles = [predictor(image) for image in images]
    for batch_size in (1, 2, 8):
        together = predictor(images, batch_size=batch_size)
        assert isinstance(together, list)
        for one, other in zip(singles, together, strict=True):
            assert len(one) == len(other)
            np.testing.assert_allclose(one.scores, other.scores, rtol=1e-4)
    assert isinstance(predictor(tuple(images[:1])), list)


def test_an_empty_list_gives_an_empty_list(predictor):
    assert predictor([]) == []
    assert predictor.max_score is None


def test_the_highest_score_is_that_of_all_images_of_the_call(predictor):
    images = [random_image(64, 96, seed) for seed in range(3)]
    highest = []
    for image in images:
        predictor(image)
        highest.append(predictor.max_score)
    assert len(set(highest)) == 3
    predictor(images, batch_size=1)
    assert predictor.max_score == pytest.approx(max(highest), rel=1e-5)


def test_path_array_and_pil_image_of_one_image_agree(predictor, tmp_path):
    image = random_image(50, 80)
    path = tmp_path / "Bild ä.png"
    Image.fromarray(image).save(path)
    expected = predictor(image)
    strided = np.ascontiguousarray(image[..., ::-1])[..., ::-1]  # BGR, turned by a view
    for given in (path, str(path), Image.fromarray(image), Image.open(path), strided):
        assert_same(predictor(given), expected)


def test_the_checkpoints_threshold_is_the_default_and_a_given_one_replaces_it(weights):
    image = random_image(64, 96)
    assert Predictor(weights, device="cpu").conf_threshold == THRESHOLD
    assert Predictor(weights, device="cpu", conf_threshold=0.0).conf_threshold == 0.0
    assert Predictor(weights, device="cpu")(image).scores.min() >= THRESHOLD
    assert Predictor(weights, device="cpu", conf_threshold=0.1)(image).scores.min() < THRESHOLD


def with_class_thresholds(path, *thresholds):
    named = dict(zip(CLASS_NAMES, thresholds, strict=True))
    return write_checkpoint(path, metrics={"class_thresholds": named})


def test_class_thresholds_keep_of_each_class_what_its_own_threshold_keeps(tmp_path, weights):
    image = random_image(64, 96)
    every = Predictor(weights, device="cpu", conf_threshold=0.2)(image)
    own = [float(np.sort(every.scores[every.class_ids == id_])[10 * id_]) for id_ in range(3)]
    path = with_class_thresholds(tmp_path / "own.pt", *own)
    predictor = Predictor(path, device="cpu", class_thresholds=True)
    kept = every.scores >= np.float32(own)[every.class_ids]
    assert (~kept).sum() == 0 + 10 + 20
    expected = (every.boxes_xyxy[kept], every.scores[kept], every.class_ids[kept])
    assert_same(predictor(image), Detections(*expected, every.class_names))
    assert predictor.class_thresholds == dict(zip(CLASS_NAMES, own, strict=True))
    assert predictor.conf_threshold == min(own)


def test_boxes_below_their_class_threshold_take_no_place_from_others(tmp_path, weights):
    image = random_image(64, 96)
    full = Predictor(weights, device="cpu", conf_threshold=0.0)(image)
    path = with_class_thresholds(tmp_path / "own.pt", 1.0, 1.0, 0.0)
    found = Predictor(path, device="cpu", class_thresholds=True)(image)
    assert set(found.class_ids.tolist()) == {2}
    assert len(found) > (full.class_ids == 2).sum()


@pytest.mark.parametrize(
    ("metrics", "arguments", "message"),
    [
        ({}, {}, "holds no class_thresholds"),
        ({"class_thresholds": {"disc": 0.5}}, {}, "holds no class_thresholds"),
        (
            {"class_thresholds": dict.fromkeys(CLASS_NAMES, 0.5)},
            {"conf_threshold": 0.3},
            "conf_threshold 0.3 and class_thresholds are both given",
        ),
    ],
)
def test_class_thresholds_that_cannot_be_used_are_refused(tmp_path, metrics, arguments, message):
    path = write_checkpoint(tmp_path / "some.pt", metrics=metrics)
    with pytest.raises(UserError, match=message):
        Predictor(path, device="cpu", class_thresholds=True, **arguments)


def test_a_higher_nms_iou_keeps_more(weights):
    counts = [
        len(Predictor(weights, device="cpu", nms_iou=iou)(random_image(64, 96)))
        for iou in (0.1, 0.45, 0.9)
    ]
    assert counts == sorted(set(counts))


def test_an_exif_turned_pil_image_is_turned_upright():
    image = random_image(30, 50)
    turned = Image.fromarray(image)
    turned.getexif()[0x0112] = 6
    assert np.array_equal(to_rgb(turned), np.rot90(image, -1))


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA", "RGBA"])
def test_every_8_bit_pil_mode_becomes_rgb(mode):
    image = to_rgb(Image.new("RGB", (6, 5), (200, 200, 200)).convert(mode))
    assert (image.shape, image.dtype) == ((5, 6, 3), np.uint8)
    if mode not in ("1", "P"):
        assert abs(image.astype(int) - 200).max() <= 1


def test_grey_and_transparent_arrays_become_rgb_on_white():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert np.array_equal(to_rgb(grey), np.stack([grey] * 3, axis=2))
    alpha = np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], np.uint8)
    assert to_rgb(alpha).tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "must be uint8"),
        (np.zeros((4, 4, 3), bool), "must be uint8"),
        (np.zeros((3, 4, 5), np.uint8), r"\(H, W, 3\)"),
        (np.zeros(4, np.uint8), r"\(H, W, 3\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"\(H, W, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), "without pixels"),
        (np.zeros((4, 0), np.uint8), "without pixels"),
        (Image.new("I;16", (4, 4)), "8 bits"),
        (torch.zeros(3, 4, 4), "Tensor"),
        (None, "NoneType"),
        ("nowhere.jpg", "nowhere.jpg"),
    ],
)
def test_what_is_no_image_is_refused_with_what_is_allowed(predictor, image, message):
    with pytest.raises(UserError, match=message):
        predictor(image)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conf_threshold": 1.1}, "conf_threshold is 1.1"),
        ({"conf_threshold": float("nan")}, "conf_threshold is nan"),
        ({"nms_iou": -0.1}, "nms_iou is -0.1"),
        ({"device": "abacus"}, "abacus"),
        ({"amp": "fp8"}, "amp 'fp8' on cpu: use auto, bf16 or off"),
        ({"amp": "fp16"}, "amp 'fp16' on cpu"),
    ],
)
def test_bad_arguments_are_refused(weights, arguments, message):
    with pytest.raises(UserError, match=message):
        Predictor(weights, **{"device": "cpu", **arguments})


def test_missing_and_foreign_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.pt"):
        Predictor(tmp_path / "nowhere.pt", device="cpu")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match=r"text\.pt"):
        Predictor(tmp_path / "text.pt", device="cpu")


def test_an_image_far_larger_than_the_input_is_antialiased(predictor):
    """One-pixel stripes become an even grey; sampled, they would become all white or all black."""
    stripes = np.zeros((640, 960, 3), np.uint8)
    stripes[:, ::2] = 255
    highest = []
    for image in (stripes, np.full_like(stripes, 128), stripes[:, ::2]):
        predictor(image)
        highest.append(predictor.max_score)
    assert highest[0] == pytest.approx(highest[1], abs=0.01)
    assert highest[2] != pytest.approx(highest[1], abs=0.01)


def test_a_checkpoint_of_a_failed_training_is_refused(tmp_path):
    path = write_checkpoint(tmp_path / "best.pt")
    checkpoint = read_checkpoint(path)
    checkpoint["model"]["backbone.stem.conv.weight"].fill_(float("nan"))
    save_checkpoint(path, checkpoint)
    with pytest.raises(UserError, match=r"NaN or infinite values in backbone\.stem"):
        Predictor(path)
