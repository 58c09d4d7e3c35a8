import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from metrics.nms import non_max_suppression

ROOT = Path(__file__).resolve().parent.parent


def plain_nms(cells, conf_threshold, nms_iou, max_candidates=3000, max_detections=300):
    """One image, by the definition: float64, loops, no tricks. Returns (n, 6)."""
    probability, class_id = cells[:, 5:].max(dim=1)
    score = cells[:, 4] * probability
    order = sorted(range(len(cells)), key=lambda k: (-score[k].item(), k))
    order = [k for k in order if score[k] >= conf_threshold and cells[k, :4].isfinite().all()]
    kept = []
    for k in order[:max_candidates]:
        rivals = [j for j in kept if class_id[j] == class_id[k]]
        iou = box_iou(cells[k : k + 1, :4].double(), cells[rivals, :4].double())
        if not (iou > nms_iou).any():
            kept.append(k)
    rows = [[*cells[k, :4].tolist(), score[k].item(), class_id[k].item()] for k in kept]
    return torch.tensor(rows).reshape(-1, 6)[:max_detections]


def random_cells(count, classes, seed, spread=60.0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * spread
    size = torch.rand(count, 2, generator=generator) * 30 + 1
    probabilities = torch.rand(count, 1 + classes, generator=generator)
    return torch.cat((corner, corner + size, probabilities), dim=1)


def cell(box_xyxy, objectness, *class_probabilities):
    return torch.tensor([[*box_xyxy, objectness, *class_probabilities]])


@pytest.mark.parametrize("shape", [(0, 10, 7), (2, 0, 7), (2, 10, 7)])
def test_nothing_in_or_above_the_threshold_gives_empty_rows(shape):
    detections = non_max_suppression(torch.zeros(shape), 0.5, 0.45)
    assert [tuple(rows.shape) for rows in detections] == [(0, 6)] * shape[0]
    assert all(rows.dtype == torch.float32 for rows in detections)


@pytest.mark.parametrize("classes", [1, 2, 20])
@pytest.mark.parametrize("threshold", [0.0, 0.001, 0.3])
@pytest.mark.parametrize("iou", [0.0, 0.3, 0.45, 1.0])
def test_equals_plain_nms(classes, threshold, iou):
    decoded = torch.stack([random_cells(120, classes, seed) for seed in (1, 2)])
    for cells, rows in zip(decoded, non_max_suppression(decoded, threshold, iou), strict=True):
        assert torch.equal(rows, plain_nms(cells, threshold, iou))


@pytest.mark.parametrize(("max_candidates", "max_detections"), [(10, 300), (3000, 5), (7, 3)])
def test_limits_keep_the_best(max_candidates, max_detections):
    cells = random_cells(100, 2, seed=3, spread=2000.0)
    limits = {"max_candidates": max_candidates, "max_detections": max_detections}
    (rows,) = non_max_suppression(cells[None], 0.001, 0.45, **limits)
    assert len(rows) == min(max_candidates, max_detections)
    assert torch.equal(rows, plain_nms(cells, 0.001, 0.45, **limits))


def test_a_score_at_the_threshold_is_kept_and_one_below_it_is_not():
    cells = torch.cat((cell((0, 0, 9, 9), 0.5, 0.5), cell((50, 0, 59, 9), 0.49, 0.5)))
    (rows,) = non_max_suppression(cells[None], 0.25, 0.45)
    assert rows[:, 4].tolist() == [0.25]


def test_iou_at_the_limit_is_kept_and_above_it_is_suppressed():
    cells = torch.cat((cell((0, 0, 10, 10), 0.9, 1.0), cell((0, 0, 10, 5), 0.8, 1.0)))
    assert len(non_max_suppression(cells[None], 0.1, 0.5)[0]) == 2
    assert len(non_max_suppression(cells[None], 0.1, 0.4999)[0]) == 1


def test_other_classes_do_not_suppress_and_a_box_has_one_label():
    cells = torch.cat((cell((0, 0, 9, 9), 0.9, 0.6, 0.5), cell((0, 0, 9, 9), 0.9, 0.5, 0.7)))
    (rows,) = non_max_suppression(cells[None], 0.1, 0.45)
    assert rows[:, 5].tolist() == [1.0, 0.0]


def test_a_huge_box_does_not_blur_the_others():
    """A shift by 80 huge widths in float32 would round small boxes to the same corners."""
    huge = cell((-1e7, -1e7, 1e7, 1e7), 0.9, *[0.0] * 79, 1.0)
    near = cell((10.0, 10, 20, 20), 0.8, *[0.0] * 78, 1.0, 0.0)
    far = cell((16.0, 10, 26, 20), 0.7, *[0.0] * 78, 1.0, 0.0)  # IoU 0.25 with `near`
    (rows,) = non_max_suppression(torch.cat((huge, near, far))[None], 0.1, 0.251)
    assert len(rows) == 3
    (rows,) = non_max_suppression(torch.cat((huge, near, far))[None], 0.1, 0.249)
    assert len(rows) == 2


@pytest.mark.parametrize("column", range(6))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_cell_that_is_not_finite_is_dropped_alone(column, value):
    bad = cell((0, 0, 9, 9), 0.9, 0.9)
    bad[0, column] = value
    good = cell((2, 2, 9, 9), 0.5, 0.9)
    (rows,) = non_max_suppression(torch.cat((bad, good))[None], 0.1, 0.45)
    assert torch.equal(rows[:, :4], good[:, :4])


def test_of_equal_scores_the_earlier_cell_wins():
    boxes = [(x, 0, x + 10, 10) for x in range(200)]
    cells = torch.cat([cell(box, 0.5, 0.5) for box in boxes])
    (rows,) = non_max_suppression(cells[None], 0.1, 0.45)
    assert torch.equal(rows, plain_nms(cells, 0.1, 0.45))
    assert rows[0, 0] == 0


def test_boxes_without_area_do_not_disturb():
    points = torch.cat([cell((5, 5, 5, 5), 0.9, 0.9), cell((5, 5, 5, 5), 0.8, 0.9)])
    (rows,) = non_max_suppression(points[None], 0.1, 0.45)
    assert len(rows) == 2


def test_half_precision_and_gradients_are_accepted():
    cells = random_cells(50, 3, seed=4)
    (expected,) = non_max_suppression(cells.half().float()[None], 0.1, 0.45)
    (rows,) = non_max_suppression(cells.half()[None].requires_grad_(), 0.1, 0.45)
    assert torch.equal(rows, expected)
    assert rows.dtype == torch.float32
    assert not rows.requires_grad


@pytest.mark.cuda
def test_cuda_equals_cpu():
    decoded = torch.stack([random_cells(5000, 20, seed, spread=600.0) for seed in (5, 6)])
    expected = non_max_suppression(decoded, 0.001, 0.45)
    for rows, reference in zip(
        non_max_suppression(decoded.cuda(), 0.001, 0.45), expected, strict=True
    ):
        np.testing.assert_allclose(rows.cpu(), reference, rtol=1e-6)


def test_a_torchvision_of_another_torch_is_named_with_its_cure(tmp_path):
    failure = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(failure)
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        "import torch\n"
        "from utils.errors import run_script\n"
        "from metrics.nms import non_max_suppression\n"
        "run_script(lambda: non_max_suppression(torch.ones(1, 2, 6), 0.5, 0.5))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert f"torch {torch.__version__} and torchvision 0." in result.stderr
    assert "pip install" in result.stderr
    assert "Traceback" not in result.stderr
