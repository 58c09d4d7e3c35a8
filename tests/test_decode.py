import math

import pytest
import torch

from nets.decode import YOLOV4_ANCHORS, decode, read_anchors
from utils.errors import UserError

ANCHORS = (
    *((12, 16), (19, 36), (40, 28)),
    *((36, 75), (76, 55), (72, 146)),
    *((142, 110), (192, 243), (459, 401)),
)
DARKNET_SCALE = (1.2, 1.1, 1.05)


def raw_maps(batch, num_classes, input_shape, spread=1.0):
    generator = torch.Generator().manual_seed(0)
    channels = 3 * (5 + num_classes)
    shapes = [(batch, channels, input_shape[0] // s, input_shape[1] // s) for s in (8, 16, 32)]
    return [torch.randn(shape, generator=generator) * spread for shape in shapes]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def decode_slowly(outputs, input_shape, scale_xy):
    """One cell after the other, by the formulas of darknet."""
    images = []
    for image in range(len(outputs[0])):
        rows = []
        for level, raw in enumerate(outputs):
            channels, grid_h, grid_w = raw.shape[1:]
            for j in range(grid_h):
                for i in range(grid_w):
                    for a in range(3):
                        step = channels // 3
                        cell = raw[image, a * step : (a + 1) * step, j, i].tolist()
                        s = scale_xy[level]
                        x = (i + s * sigmoid(cell[0]) - (s - 1) / 2) / grid_w * input_shape[1]
                        y = (j + s * sigmoid(cell[1]) - (s - 1) / 2) / grid_h * input_shape[0]
                        w = math.exp(min(max(cell[2], -10), 10)) * ANCHORS[3 * level + a][0]
                        h = math.exp(min(max(cell[3], -10), 10)) * ANCHORS[3 * level + a][1]
                        box = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
                        rows.append(box + [sigmoid(value) for value in cell[4:]])
        images.append(rows)
    return torch.tensor(images)


@pytest.mark.parametrize("scale_xy", [(1.0, 1.0, 1.0), DARKNET_SCALE])
@pytest.mark.parametrize(("input_shape", "num_classes"), [((64, 96), 3), ((96, 32), 1)])
def test_decode_equals_a_loop_over_cells(input_shape, num_classes, scale_xy):
    outputs = raw_maps(2, num_classes, input_shape)
    expected = decode_slowly(outputs, input_shape, scale_xy)
    found = decode(outputs, ANCHORS, input_shape, scale_xy)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


def test_without_scale_xy_the_offsets_are_plain_sigmoids():
    outputs = raw_maps(1, 1, (64, 64))
    plain = decode(outputs, ANCHORS, (64, 64), (1.0, 1.0, 1.0))
    assert torch.equal(decode(outputs, ANCHORS, (64, 64)), plain)
    assert not torch.equal(decode(outputs, ANCHORS, (64, 64), DARKNET_SCALE), plain)


def test_sizes_are_clamped_at_exp_10_either_way():
    outputs = raw_maps(1, 1, (32, 32))
    for raw in outputs:
        raw.view(1, 3, 6, -1)[:, :, 2] = 1e4
        raw.view(1, 3, 6, -1)[:, :, 3] = -1e4
    found = decode(outputs, ANCHORS, (32, 32))
    widths, heights = (found[..., 2:4] - found[..., :2]).unbind(-1)
    levels = [ANCHORS[:3] * 16, ANCHORS[3:6] * 4, ANCHORS[6:]]
    anchor_w, anchor_h = torch.tensor([anchor for level in levels for anchor in level]).T
    torch.testing.assert_close(widths[0], anchor_w * math.exp(10))
    torch.testing.assert_close(heights[0], anchor_h * math.exp(-10), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("size", "cells"), [(32, 63), (416, 10_647), (608, 22_743)])
def test_number_of_cells(size, cells):
    outputs = raw_maps(1, 1, (size, size))
    assert decode(outputs, ANCHORS, (size, size)).shape == (1, cells, 6)


def test_cells_are_in_the_memory_order_of_a_channels_last_map():
    outputs = [
        raw.contiguous(memory_format=torch.channels_last) for raw in raw_maps(2, 3, (64, 96))
    ]
    views = [raw.permute(0, 2, 3, 1).view(2, -1, 8) for raw in outputs]  # view() never copies
    found = decode(outputs, ANCHORS, (64, 96))
    assert torch.equal(found[..., 4:], torch.cat(views, dim=1)[..., 4:].sigmoid())


def test_both_memory_formats_and_half_precision_give_float32_boxes():
    outputs = raw_maps(1, 2, (64, 64))
    plain = decode(outputs, ANCHORS, (64, 64))
    last = [raw.contiguous(memory_format=torch.channels_last) for raw in outputs]
    torch.testing.assert_close(decode(last, ANCHORS, (64, 64)), plain)
    half = decode([raw.bfloat16() for raw in outputs], ANCHORS, (64, 64))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, plain, rtol=0.05, atol=8.0)


def test_an_empty_batch_decodes_to_no_images():
    assert decode(raw_maps(0, 2, (32, 64)), ANCHORS, (32, 64)).shape == (0, 126, 7)


def test_the_anchors_that_ship_are_yolov4s():
    assert read_anchors("model_data/yolo_anchors.txt") == YOLOV4_ANCHORS == ANCHORS


def test_anchors_may_be_separated_by_spaces_commas_or_lines(tmp_path):
    path = tmp_path / "anchors.txt"
    path.write_text("\n".join(f"{w} , {h}" for w, h in ANCHORS))
    assert read_anchors(str(path)) == ANCHORS


@pytest.mark.parametrize(
    "text", ["", "1,2 3,4", "a b", "0 " * 18, "-1 " * 18, "nan " * 18, "inf " * 18, "5 " * 19]
)
def test_a_file_without_nine_positive_pairs_is_refused_by_its_path(tmp_path, text):
    path = tmp_path / "anchors.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=r"anchors\.txt"):
        read_anchors(str(path))


def test_a_missing_or_binary_anchor_file_is_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x80")
    for name in ("nowhere", "binary", "."):
        with pytest.raises(UserError, match="cannot read anchors"):
            read_anchors(str(tmp_path / name))
