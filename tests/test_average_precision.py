import math

import numpy as np
import pytest

from metrics.voc import (
    area_under_curve,
    match_classes,
    match_detections,
    precision_recall,
)

BOX, FAR = [10, 10, 29, 29], [100, 100, 119, 119]


def voc_average_precision(*arguments, eleven_point=False, **options):
    """One class's AP from arguments of `match_detections`; nan when no object counts."""
    matches = match_detections(*arguments, **options)
    if matches.num_ground_truth == 0:
        return math.nan
    return area_under_curve(*precision_recall(matches), eleven_point=eleven_point)


def plain_voc_ap(image_ids, scores, boxes, gt_boxes, gt_difficult, threshold, eleven_point):
    """The devkit's VOCevaldet and VOCap, loops and all."""
    taken = {name: [False] * len(rows) for name, rows in gt_boxes.items()}
    objects = sum(not flag for flags in gt_difficult.values() for flag in flags)
    hits = []
    for index in sorted(range(len(scores)), key=lambda i: -scores[i]):
        name, box = image_ids[index], boxes[index]
        best, chosen = -math.inf, None
        for j, other in enumerate(gt_boxes.get(name, ())):
            width = min(box[2], other[2]) - max(box[0], other[0]) + 1
            height = min(box[3], other[3]) - max(box[1], other[1]) + 1
            if width > 0 and height > 0:
                area = (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
                area += (other[2] - other[0] + 1) * (other[3] - other[1] + 1)
                overlap = width * height / (area - width * height)
                if overlap > best:
                    best, chosen = overlap, j
        if best >= threshold:
            if gt_difficult[name][chosen]:
                continue
            hits.append(not taken[name][chosen])
            taken[name][chosen] = True
        else:
            hits.append(False)
    precision, recall, found = [], [], 0
    for rank, hit in enumerate(hits, start=1):
        found += hit
        precision.append(found / rank)
        recall.append(found / objects)
    if eleven_point:
        levels = [
            max((p for p, r in zip(precision, recall, strict=True) if r >= t), default=0)
            for t in np.linspace(0, 1, 11)
        ]
        return sum(levels) / 11
    recall, precision = [0, *recall, 1], [0, *precision, 0]
    for i in range(len(precision) - 2, -1, -1):
        precision[i] = max(precision[i], precision[i + 1])
    steps = range(1, len(recall))
    return sum((recall[i] - recall[i - 1]) * precision[i] for i in steps)


def random_split(seed, images=12, classes=3, per_image=25):
    """Detections and truth with jittered, doubled, stray and difficult boxes, and equal scores."""
    rng = np.random.default_rng(seed)
    detections, truth = [], []
    for _ in range(images):
        m = int(rng.integers(0, 6))
        corners = rng.integers(0, 60, (m, 2))
        boxes = np.hstack((corners, corners + rng.integers(5, 40, (m, 2)))).astype(np.float32)
        class_ids = rng.integers(0, classes, m)
        truth.append((class_ids, boxes, rng.random(m) < 0.25))
        n = int(rng.integers(0, per_image)) if m else 3
        corners = rng.uniform(0, 60, (n, 2))
        rows = np.hstack((corners, corners + rng.uniform(5, 40, (n, 2)), rng.random((n, 2))))
        rows[:, 4] = rng.integers(1, 14, n) / 20
        rows[:, 5] = rng.integers(0, classes, n)
        if m and n:
            near = rng.integers(0, m, n // 2)
            rows[: n // 2, :4] = boxes[near] + rng.normal(0, 2, (n // 2, 4))
            rows[: n // 2, 5] = class_ids[near]
            rows[: n // 2, 4] += 0.3
        rows[:, 2:4] = np.maximum(rows[:, 2:4], rows[:, :2] + 1)  # no box is inside out
        detections.append(rows.astype(np.float32))
    return detections, truth


def of_class(detections, truth, class_id):
    """The five arguments of voc_average_precision for one class of a split."""
    rows = [(i, row) for i, part in enumerate(detections) for row in part if row[5] == class_id]
    names = [f"image {i}" for i, _ in rows]
    boxes = {f"image {i}": box[ids == class_id] for i, (ids, box, _) in enumerate(truth)}
    flags = {f"image {i}": flag[ids == class_id] for i, (ids, _, flag) in enumerate(truth)}
    return names, [float(row[4]) for _, row in rows], [row[:4] for _, row in rows], boxes, flags


@pytest.mark.parametrize("eleven_point", [False, True])
def test_no_detection_of_an_object_gives_zero(eleven_point):
    ap = voc_average_precision([], [], [], {"a": [BOX]}, {"a": [False]}, eleven_point=eleven_point)
    assert ap == 0


@pytest.mark.parametrize("eleven_point", [False, True])
@pytest.mark.parametrize("truth", [({}, {}), ({"a": []}, {"a": []}), ({"a": [BOX]}, {"a": [True]})])
def test_without_an_object_that_counts_the_average_is_nan(truth, eleven_point):
    assert math.isnan(voc_average_precision([], [], [], *truth, eleven_point=eleven_point))
    with_box = voc_average_precision(["a"], [0.5], [BOX], *truth, eleven_point=eleven_point)
    assert math.isnan(with_box)


@pytest.mark.parametrize("eleven_point", [False, True])
def test_perfect_detections_give_one(eleven_point):
    gt = {"a": [BOX, FAR], 7: [BOX]}
    difficult = {"a": [False, False], 7: [False]}
    found = ["a", 7, "a"], [0.9, 0.5, 0.1], [FAR, BOX, BOX]
    assert voc_average_precision(*found, gt, difficult, eleven_point=eleven_point) == 1


def test_half_of_the_objects_found_gives_a_half_and_six_elevenths():
    arguments = ["a"], [0.9], [BOX], {"a": [BOX, FAR]}, {"a": [False, False]}
    assert voc_average_precision(*arguments) == 0.5
    assert voc_average_precision(*arguments, eleven_point=True) == pytest.approx(6 / 11)


def test_a_second_box_on_one_object_is_false():
    matches = match_detections(["a"] * 2, [0.3, 0.8], [BOX, BOX], {"a": [BOX]}, {"a": [False]})
    assert matches.scores.tolist() == [0.8, 0.3]
    assert matches.true_positive.tolist() == [True, False]
    assert not matches.ignored.any()


def test_a_box_goes_to_the_object_it_overlaps_most_even_when_that_is_taken():
    objects = [[0, 0, 9, 9], [0, 0, 9, 13]]
    found = [objects[0], objects[0]]  # the second would also pass on the free object: IoU 10 / 14
    matches = match_detections(["a"] * 2, [0.9, 0.8], found, {"a": objects}, {"a": [False] * 2})
    assert matches.true_positive.tolist() == [True, False]


def test_boxes_on_a_difficult_object_are_neither_counted_nor_punished():
    gt, difficult = {"a": [BOX, FAR]}, {"a": [True, False]}
    found = ["a"] * 3, [0.9, 0.8, 0.7], [BOX, BOX, FAR]
    matches = match_detections(*found, gt, difficult)
    assert matches.ignored.tolist() == [True, True, False]
    assert matches.num_ground_truth == 1
    assert voc_average_precision(*found, gt, difficult) == 1


def test_the_first_of_equal_scores_is_the_first_given():
    found = ["a"] * 2, [0.5, 0.5]
    gt, difficult = {"a": [BOX]}, {"a": [False]}
    assert voc_average_precision(*found, [BOX, FAR], gt, difficult) == 1
    assert voc_average_precision(*found, [FAR, BOX], gt, difficult) == 0.5


def test_overlap_is_inclusive_of_the_edges_and_of_the_threshold():
    gt, difficult = {"a": [[0, 0, 9, 9]]}, {"a": [False]}
    half, less = [[0, 0, 9, 4]], [[0, 0, 9, 3]]  # 50 and 40 of 100 pixels; without + 1: .44
    assert voc_average_precision(["a"], [1.0], half, gt, difficult) == 1
    assert voc_average_precision(["a"], [1.0], less, gt, difficult) == 0
    assert voc_average_precision(["a"], [1.0], less, gt, difficult, iou_threshold=0.4) == 1


def test_a_box_in_an_image_without_objects_is_false():
    found = ["elsewhere", "a"], [0.9, 0.8], [BOX, BOX]
    assert voc_average_precision(*found, {"a": [BOX]}, {"a": [False]}) == 0.5


def test_a_hand_made_curve_gives_the_devkits_areas():
    precision, recall = np.array([1, 0.5, 2 / 3, 0.5]), np.array([0.25, 0.25, 0.5, 0.5])
    assert area_under_curve(precision, recall) == pytest.approx(0.25 + 0.25 * 2 / 3)
    eleven = area_under_curve(precision, recall, eleven_point=True)
    assert eleven == pytest.approx((3 * 1 + 3 * 2 / 3) / 11)


def test_precision_and_recall_skip_ignored_boxes():
    gt, difficult = {"a": [BOX, FAR]}, {"a": [True, False]}
    matches = match_detections(["a"] * 3, [0.9, 0.8, 0.7], [BOX, [0, 0, 1, 1], FAR], gt, difficult)
    precision, recall = precision_recall(matches)
    assert precision.tolist() == [0, 0.5]
    assert recall.tolist() == [0, 1]


@pytest.mark.parametrize("seed", range(7))
@pytest.mark.parametrize("eleven_point", [False, True])
def test_random_splits_agree_with_the_plain_devkit(seed, eleven_point):
    detections, truth = random_split(seed)
    for class_id, threshold in [(0, 0.5), (1, 0.5), (2, 0.6)]:
        arguments = of_class(detections, truth, class_id)
        expected = plain_voc_ap(*arguments, threshold, eleven_point)
        ap = voc_average_precision(*arguments, iou_threshold=threshold, eleven_point=eleven_point)
        assert 0.05 < expected < 1  # a case that says something
        assert ap == pytest.approx(expected, abs=1e-12)


def test_all_classes_at_once_equal_one_after_another():
    detections, truth = random_split(0)
    for class_id, matches in enumerate(match_classes(detections, truth, 3)):
        alone = match_detections(*of_class(detections, truth, class_id))
        assert matches.true_positive.tolist() == alone.true_positive.tolist()
        assert matches.ignored.tolist() == alone.ignored.tolist()


def test_arrays_as_image_ids_are_told_by_value():
    gt, difficult = {3: [BOX]}, {3: [False]}
    assert (
        voc_average_precision(np.array([3]), np.array([1.0]), np.array([BOX]), gt, difficult) == 1
    )


def test_lengths_that_disagree_are_an_error():
    gt, difficult = {"a": [BOX]}, {"a": [False]}
    with pytest.raises(ValueError, match="2 scores"):
        voc_average_precision(["a"], [0.5, 0.4], [BOX], gt, difficult)
    with pytest.raises(ValueError, match="same images"):
        voc_average_precision([], [], [], gt, {})
    with pytest.raises(ValueError, match="one flag a box"):
        voc_average_precision([], [], [], gt, {"a": []})
