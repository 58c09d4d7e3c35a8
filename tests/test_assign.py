"""Which anchor cells are positive, and which the ignore test finds: hand-made cases and loops."""

import pytest
import torch
from torchvision.ops import box_iou

from losses import assign as assign_module
from losses.assign import anchor_overlap, choose_positives, overlaps_truth, place_candidates
from tests.reference_loss import ANCHORS

GRIDS = ((8, 12), (4, 6), (2, 3))  # an input of 64 x 96 pixels
INPUT_H, INPUT_W = 64, 96
CELLS = 3 * (8 * 12 + 4 * 6 + 2 * 3)
BOTH = pytest.mark.parametrize("assigner", ["best_anchor", "iou_threshold"])
STATIC = pytest.mark.parametrize("assigner", ["best_anchor", "iou_threshold", "neighbours"])


def truth(image=0, class_id=0, centre=(0.4, 0.3), size=ANCHORS[0]):
    """centre as a fraction, size in pixels."""
    return [image, class_id, *centre, size[0] / INPUT_W, size[1] / INPUT_H]


def place(rows, assigner="best_anchor", threshold=0.213, num_classes=3, scale_xy=(2, 2, 2)):
    targets = torch.tensor(rows).view(-1, 6)
    return place_candidates(
        targets,
        torch.tensor(ANCHORS).float(),
        grids=GRIDS,
        num_classes=num_classes,
        assigner=assigner,
        threshold=threshold,
        scale_xy=scale_xy,
    )


def run(rows, assigner="best_anchor", threshold=0.213, quality=None):
    return choose_positives(
        place(rows, assigner, threshold),
        torch.tensor(rows).view(-1, 6)[:, 1],
        num_classes=3,
        shape=(2, CELLS),
        quality=quality,
    )


def suits(assigner, size, anchor, overlap, threshold):
    """Whether an anchor suits a box of (w, h) pixels, by the definition."""
    if assigner == "aligned" or overlap[anchor] == max(overlap):
        return True
    ratios = [side / own for side, own in zip(size, ANCHORS[anchor], strict=True)]
    near = max(*ratios, *(1 / ratio for ratio in ratios)) < 4
    return {"best_anchor": False, "iou_threshold": overlap[anchor] > threshold}.get(assigner, near)


def cells_around(assigner, x, y, grid_hw):
    """(row, column) of the centre's cell and of those beside it that the assigner takes."""
    height, width = grid_hw
    row, column = min(int(y), height - 1), min(int(x), width - 1)
    found = [(row, column)]
    if assigner in ("neighbours", "aligned"):
        beside_row = row + (-1 if y - row < 0.5 else 1)
        beside_column = column + (-1 if x - column < 0.5 else 1)
        found += [(row, beside_column), (beside_row, column)]
        found += [(beside_row, beside_column)] if assigner == "aligned" else []
    return [(r, c) for r, c in found if 0 <= r < height and 0 <= c < width]


def candidates_by_loops(row, assigner, threshold=0.213):
    """Cells of its image that may be a truth's, by the definition."""
    _, class_id, cx, cy, w, h = row
    size = (w * INPUT_W, h * INPUT_H)
    overlap = anchor_overlap(torch.tensor([size]), torch.tensor(ANCHORS).float())[0].tolist()
    found, start = [], 0
    for scale, (height, width) in enumerate(GRIDS):
        for r, c in cells_around(assigner, cx * width, cy * height, (height, width)):
            anchors = [
                a for a in range(3) if suits(assigner, size, 3 * scale + a, overlap, threshold)
            ]
            found += [start + 3 * (r * width + c) + a for a in anchors]
        start += 3 * height * width
    return found if class_id >= 0 else []


def by_loops(rows, assigner, threshold):
    """{(image, cell): (last truth, classes)}, by the definition."""
    found = {}
    for index, row in enumerate(rows):
        for cell in candidates_by_loops(row, assigner, threshold):
            _, classes = found.get((row[0], cell), (index, set()))
            found[row[0], cell] = (index, classes | {row[1]})
    return found


def as_dict(positives):
    found = {}
    for scale, index, anchor in positives.chosen.nonzero().tolist():
        image, cell = divmod(positives.cells[scale, index, anchor].item(), CELLS)
        classes = positives.classes[scale, index, anchor].nonzero().flatten().tolist()
        found[image, cell] = (index, set(classes))
    return found


@STATIC
def test_no_ground_truth_gives_no_positives(assigner):
    positives = run([], assigner)
    assert positives.chosen.shape[:2] == (3, 0)
    assert positives.mask.shape == (2, CELLS)
    assert not positives.mask.any()


@pytest.mark.parametrize("anchor", range(9))
def test_a_box_of_an_anchors_size_is_that_anchors_at_the_cell_of_its_centre(anchor):
    positives = run([truth(image=1, class_id=2, centre=(0.4, 0.3), size=ANCHORS[anchor])])
    scale, (height, width) = anchor // 3, GRIDS[anchor // 3]
    row, column = int(0.3 * height), int(0.4 * width)
    before = sum(3 * h * w for h, w in GRIDS[:scale])
    cell = before + 3 * (row * width + column) + anchor % 3
    assert as_dict(positives) == {(1, cell): (0, {2})}
    assert positives.mask.nonzero().tolist() == [[1, cell]]
    candidates = place([truth(image=1, class_id=2, centre=(0.4, 0.3), size=ANCHORS[anchor])])
    assert (candidates.rows[scale, 0] == row).all()
    assert (candidates.columns[scale, 0] == column).all()
    expected = torch.tensor([0.4 * width, 0.3 * height, 0, 0])
    expected[2:] = torch.tensor(ANCHORS[anchor]) / (8, 16, 32)[scale]
    torch.testing.assert_close(candidates.boxes_grid[scale, 0], expected)


@BOTH
def test_a_centre_on_the_right_or_bottom_border_is_in_the_last_cell(assigner):
    rows = [truth(centre=(1.0, 1.0)), truth(centre=(0.0, 0.0), image=1)]
    candidates, positives = place(rows, assigner), run(rows, assigner)
    assert candidates.rows[:, 0, 0].tolist() == [h - 1 for h, _ in GRIDS]
    assert candidates.columns[:, 0, 0].tolist() == [w - 1 for _, w in GRIDS]
    assert positives.mask[0, 3 * (8 * 12 - 1)]
    assert positives.mask[1, 0]


@pytest.mark.parametrize("classes", [(0, 2), (2, 0), (1, 1)])
def test_in_one_cell_the_last_truth_wins_and_all_classes_count(classes):
    first = truth(class_id=classes[0], centre=(0.4, 0.3))
    last = truth(class_id=classes[1], centre=(0.4, 0.35))
    positives = run([first, truth(image=1, class_id=1), last])
    assert positives.chosen[0, :, 0].tolist() == [False, True, True]
    assert positives.classes[0, 2, 0].nonzero().flatten().tolist() == sorted(set(classes))
    assert positives.classes[0, 1, 0].tolist() == [0, 1, 0]
    assert positives.mask.sum() == 2


@STATIC
def test_an_ignore_region_is_no_positive_and_takes_no_cell(assigner):
    only = run([truth(class_id=-1)], assigner)
    assert not only.mask.any()
    assert not only.chosen.any()
    beside = run([truth(class_id=1), truth(class_id=-1)], assigner)
    assert as_dict(beside) == as_dict(run([truth(class_id=1)], assigner))


@STATIC
@pytest.mark.parametrize("seed", range(5))
def test_crowded_images_equal_plain_loops(assigner, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(200, 6, generator=generator)
    rows[:, 0] = torch.randint(0, 2, (200,), generator=generator)
    rows[:, 1] = torch.randint(-1, 3, (200,), generator=generator)
    positives = run(rows.tolist(), assigner)
    expected = by_loops(rows.tolist(), assigner, 0.213)
    assert any(len(classes) > 1 for _, classes in expected.values())
    assert as_dict(positives) == expected
    mask = torch.zeros(2, CELLS, dtype=torch.bool)
    for image, cell in expected:
        mask[int(image), cell] = True
    assert torch.equal(positives.mask, mask)


def test_every_candidate_that_is_not_chosen_points_behind_the_last_cell():
    positives = run([truth(), truth(), truth(class_id=-1)], "iou_threshold")
    assert (positives.cells[~positives.chosen] == 2 * CELLS).all()
    assert (positives.cells[positives.chosen] < 2 * CELLS).all()


def test_a_cell_beside_the_centres_is_a_candidate_only_where_it_reaches_the_centre():
    row = truth(centre=(0.4, 0.3))  # x 4.8, y 2.4 in the finest grid, 2.4 and 1.2 in the next
    wide, own = (place([row], "neighbours", scale_xy=(reach,) * 3) for reach in (2.0, 1.0))
    assert wide.wanted[0].sum() == 3 * own.wanted[0].sum() > 0
    some = place([row], "neighbours", scale_xy=(1.5, 1.5, 1.5))  # x reaches .25 beyond, y .4
    assert some.wanted[0].sum() == 2 * own.wanted[0].sum()


def random_rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(count, 6, generator=generator)
    rows[:, 0] = torch.randint(0, 2, (count,), generator=generator)
    rows[:, 1] = torch.randint(-1, 3, (count,), generator=generator)
    return rows.tolist(), generator


@pytest.mark.parametrize("seed", range(5))
def test_aligned_takes_each_truths_best_candidates_and_each_cells_best_truth(seed):
    rows, generator = random_rows(30, seed)
    shape = place(rows, "aligned").wanted.shape
    alignment, iou = torch.rand(2, *shape, generator=generator)
    positives = run(rows, "aligned", quality=(alignment, iou))
    candidates = place(rows, "aligned")
    claims = {}
    for index, row in enumerate(rows):
        found = candidates.wanted[:, index].nonzero().tolist()
        assert len(found) == len(candidates_by_loops(row, "aligned"))
        best = sorted(found, key=lambda at: -alignment[at[0], index, at[1]])[:10]
        for scale, slot in best:
            cell = candidates.cells[scale, index, slot].item()
            score = alignment[scale, index, slot].item()
            claims.setdefault(cell, []).append((score, index, scale, slot))
    expected = {max(own)[1:] for own in claims.values()}
    chosen = {(i, scale, slot) for scale, i, slot in positives.chosen.nonzero().tolist()}
    assert chosen == expected
    assert positives.mask.sum() == len(expected)
    for index in {own[0] for own in expected}:
        own = positives.chosen[:, index]
        best = alignment[:, index][own].argmax()
        target = positives.quality[:, index][own]
        torch.testing.assert_close(target.max(), iou[:, index][own].max())
        assert target.argmax() == best


def test_aligned_without_any_overlap_has_no_positives():
    rows = [truth()]
    nothing = torch.zeros(place(rows, "aligned").wanted.shape)
    positives = run(rows, "aligned", quality=(nothing, nothing))
    assert not positives.mask.any()
    assert positives.quality.isfinite().all()


def test_iou_threshold_adds_exactly_the_anchors_above_it():
    size = (30, 40)
    overlap = anchor_overlap(torch.tensor([size]).float(), torch.tensor(ANCHORS).float())[0]
    for threshold in (0.0, 0.213, 0.5, 1.0):
        chosen = run([truth(size=size)], "iou_threshold", threshold).chosen[:, 0].flatten()
        expected = (overlap > threshold) | (overlap == overlap.max())
        assert torch.equal(chosen, expected)


def test_anchor_overlap_is_the_iou_of_boxes_on_one_centre():
    overlap = anchor_overlap(torch.tensor([[2.0, 4.0]]), torch.tensor([[4.0, 2.0], [2, 4], [1, 1]]))
    torch.testing.assert_close(overlap, torch.tensor([[4 / 12, 1.0, 1 / 8]]))


def random_corners(count, generator):
    low = torch.rand(count, 2, generator=generator) * 50
    return torch.cat((low, low + torch.rand(count, 2, generator=generator) * 40), dim=1)


@pytest.mark.parametrize("pairs", [1, 2000, 2**18])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.7])
def test_ignored_cells_are_those_of_pairwise_iou_in_chunks_of_any_size(
    threshold, pairs, monkeypatch
):
    monkeypatch.setitem(assign_module.PAIRS_AT_ONCE, "cpu", pairs)
    generator = torch.Generator().manual_seed(0)
    boxes = random_corners(3 * 400, generator).view(3, 400, 4)
    truths = random_corners(25, generator)
    images = torch.randint(0, 2, (25,), generator=generator)  # the last image has none
    found = overlaps_truth(boxes.permute(2, 0, 1), truths, images, threshold=threshold)
    for image in range(3):
        iou = box_iou(boxes[image], truths[images == image])
        assert torch.equal(found[image], (iou > threshold).any(dim=1))
    assert found[:2].any()


def test_an_iou_of_exactly_the_threshold_is_not_ignored():
    corners = torch.tensor([[0.0, 0, 8, 4], [0, 0, 8, 4.5]]).T[:, None]
    truths = torch.tensor([[0.0, 0, 8, 8]])
    found = overlaps_truth(corners, truths, torch.tensor([0]), threshold=0.5)
    assert found.tolist() == [[False, True]]


def test_boxes_without_area_or_truths_are_not_ignored():
    corners = torch.tensor([3.0, 3, 3, 3]).view(4, 1, 1).expand(4, 2, 5)
    truths = torch.tensor([[3.0, 3, 3, 3]])
    assert not overlaps_truth(corners, truths, torch.tensor([1]), threshold=0.5).any()
    assert not overlaps_truth(corners, truths[:0], torch.tensor([0])[:0], threshold=0.5).any()
