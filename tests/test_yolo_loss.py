"""YOLOLoss against the fork's plain definition, and its promises about numbers and machines."""

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from data.loader import NOTHING
from losses.assign import ASSIGNERS
from losses.box_loss import BOX_LOSSES
from losses.yolo_loss import YOLOLoss
from tests.reference_loss import ANCHORS, reference_loss

SHAPE = (64, 96)
ALL = pytest.mark.parametrize("assigner", sorted(ASSIGNERS))


def make_outputs(num_classes=3, shape=SHAPE, batch=2, dtype=torch.float32, scale=1.5):
    generator = torch.Generator().manual_seed(1)
    sizes = [(batch, 3 * (5 + num_classes), shape[0] // s, shape[1] // s) for s in (8, 16, 32)]
    maps = [torch.randn(size, generator=generator) * scale for size in sizes]
    return [raw.to(dtype).requires_grad_() for raw in maps]


def make_targets(count=12, num_classes=3, batch=2, ignore=0):
    """Of all sizes; as many as `ignore` are ignore regions."""
    generator = torch.Generator().manual_seed(2)
    targets = torch.rand(count, 6, generator=generator)
    targets[:, 0] = torch.randint(0, batch, (count,), generator=generator)
    targets[:, 1] = torch.randint(0, num_classes, (count,), generator=generator)
    targets[:, 4:] = targets[:, 4:] ** 2 * 0.9 + 0.05
    targets[:ignore, 1] = -1
    return targets


def make_loss(num_classes=3, **knobs):
    return YOLOLoss(ANCHORS, num_classes, SHAPE, **knobs)


def values(terms, names=("total", "loc", "conf", "cls")):
    return {name: terms[name].item() for name in names}


def gradients(terms, outputs):
    return torch.autograd.grad(terms["total"], outputs, allow_unused=True)


def assert_equals_reference(
    outputs, targets, num_classes=3, *, shape=SHAPE, smoothing=0.0, **knobs
):
    loss = YOLOLoss(ANCHORS, num_classes, shape, label_smoothing=smoothing, **knobs)
    ours = loss(outputs, targets)
    names = {"focal_alpha": "alpha", "focal_gamma": "gamma"}
    theirs = reference_loss(
        outputs,
        targets,
        num_classes,
        shape,
        label_smoothing=smoothing,
        **{names.get(key, key): value for key, value in knobs.items()},
    )
    assert values(ours) == pytest.approx(values(theirs), rel=1e-4)
    for mine, reference in zip(gradients(ours, outputs), gradients(theirs, outputs), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-4 * reference.abs().max())


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"focal_loss": True},
        {"focal_loss": True, "focal_alpha": 0.6, "focal_gamma": 1.5},
        {"smoothing": 0.1},
        {"ignore_threshold": 0.1},
    ],
)
def test_the_defaults_equal_the_original_fork(knobs):
    assert_equals_reference(make_outputs(), make_targets(), **knobs)


def test_many_truths_in_few_cells_equal_the_original_fork():
    targets = make_targets(300)
    assert make_loss()(make_outputs(), targets)["positives"] < 280
    assert_equals_reference(make_outputs(), targets)


@pytest.mark.parametrize("shape", [(64, 96), (96, 32), (64, 64)])
@pytest.mark.parametrize(("num_classes", "batch"), [(1, 1), (1, 3), (5, 1)])
def test_a_single_class_one_image_and_other_shapes_equal_the_fork(num_classes, batch, shape):
    outputs = make_outputs(num_classes, shape, batch)
    targets = make_targets(8, num_classes, batch)
    assert_equals_reference(outputs, targets, num_classes, shape=shape)


def test_images_without_objects_equal_the_original_fork():
    outputs, targets = make_outputs(batch=3), make_targets()
    targets[:, 0] = 1
    assert_equals_reference(outputs, targets)
    assert_equals_reference(outputs, targets[:0])


def test_ignore_regions_are_left_out_of_positives_and_negatives():
    targets = make_targets(ignore=6)
    assert_equals_reference(make_outputs(), targets, ignore_threshold=0.2)
    terms = make_loss(ignore_threshold=0.2)(make_outputs(), targets)
    without = make_loss(ignore_threshold=0.2)(make_outputs(), targets[6:])
    assert terms["positives"] == without["positives"]
    assert terms["ignored"] > without["ignored"]


def test_channels_last_maps_and_shuffled_truths_change_nothing():
    outputs, targets, loss = make_outputs(), make_targets(), make_loss()
    expected = loss(outputs, targets)
    last = [raw.detach().to(memory_format=torch.channels_last).requires_grad_() for raw in outputs]
    terms = loss(last, targets.flip(0))
    assert values(terms) == pytest.approx(values(expected))
    for mine, other in zip(gradients(terms, last), gradients(expected, outputs), strict=True):
        assert mine.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(mine, other)


@ALL
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("focal_loss", [False, True])
@pytest.mark.parametrize("size", [-1e4, 0.0, 1e4])
def test_any_finite_logits_give_a_finite_loss_and_gradient(assigner, dtype, focal_loss, size):
    outputs = [torch.full_like(raw, size) for raw in make_outputs(dtype=dtype)]
    outputs = [raw.requires_grad_() for raw in outputs]
    loss = make_loss(focal_loss=focal_loss, focal_gamma=0.5, assigner=assigner)
    terms = loss(outputs, make_targets(ignore=2))
    assert all(value.isfinite() and value.dtype == torch.float32 for value in terms.values())
    assert all(gradient.isfinite().all() for gradient in gradients(terms, outputs))


@pytest.mark.parametrize("box_loss", sorted(BOX_LOSSES))
def test_boxes_equal_to_the_truth_give_a_finite_gradient(box_loss):
    outputs = [torch.zeros_like(raw).requires_grad_() for raw in make_outputs()]
    rows = [
        [0, 0, (2 + 0.5) * s / SHAPE[1], (1 + 0.5) * s / SHAPE[0], w / SHAPE[1], h / SHAPE[0]]
        for (w, h), s in zip(ANCHORS, (8, 8, 8, 16, 16, 16, 32, 32, 32), strict=True)
    ]
    terms = make_loss(box_loss=box_loss)(outputs, torch.tensor(rows))
    assert terms["loc"].item() == pytest.approx(0, abs=1e-6)
    assert terms["positives"] == 9
    assert all(gradient.isfinite().all() for gradient in gradients(terms, outputs))


@ALL
def test_no_targets_give_a_finite_differentiable_loss(assigner):
    outputs = make_outputs()
    terms = make_loss(assigner=assigner)(outputs, torch.zeros(0, 6))
    assert values(terms, ("loc", "cls", "positives", "ignored")) == dict.fromkeys(
        ("loc", "cls", "positives", "ignored"), 0
    )
    assert terms["conf"] == terms["total"] > 0
    for gradient in gradients(terms, outputs):
        cells = gradient.unflatten(1, (3, -1))
        assert cells[:, :, 4].isfinite().all()
        assert not cells[:, :, :4].any()
        assert not cells[:, :, 5:].any()


def test_total_is_the_sum_and_stays_float32_under_autocast():
    outputs = make_outputs(dtype=torch.bfloat16)
    plain = make_loss()(outputs, make_targets())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = make_loss()(outputs, make_targets())
        loss = make_loss(conf_loss="tests.test_yolo_loss_knobs:Recorder")
        loss(outputs, make_targets())
    assert not loss.conf_loss.autocast
    assert terms["total"].item() == pytest.approx(
        sum(terms[name].item() for name in ("loc", "conf", "cls"))
    )
    assert values(terms) == values(plain)
    assert all(value.dtype == torch.float32 for value in terms.values())


@ALL
def test_the_same_batch_gives_the_same_bits(assigner):
    loss, targets = make_loss(assigner=assigner), make_targets(100)
    runs = []
    for _ in range(2):
        outputs = make_outputs()
        runs.append(gradients(loss(outputs, targets), outputs))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@ALL
@pytest.mark.parametrize(
    "conf_loss",
    ["focal", "focal(alpha='auto')", "tests.test_yolo_loss_knobs:Recorder(wants_mask=True)"],
)
def test_no_shape_or_branch_depends_on_the_data(assigner, conf_loss):
    # Fake tensors have shapes and no values: whatever asks the device for one raises.
    loss = make_loss(assigner=assigner, conf_loss=conf_loss)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        outputs = [mode.from_tensor(raw.detach()).requires_grad_() for raw in make_outputs()]
        terms = loss(outputs, mode.from_tensor(make_targets()), cells=True)
        assert [g.shape for g in gradients(terms, outputs)] == [raw.shape for raw in outputs]


def rank_step(rank, folder):
    """One of two ranks: images 0 and 1, or image 2, which has no object."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    images, targets = ((0, 2), make_targets()) if rank == 0 else ((2, 3), torch.zeros(0, 6))
    outputs = [raw.detach()[slice(*images)].requires_grad_() for raw in make_outputs(batch=3)]
    for normalizer in ("mean", "positives"):
        spec = f"tests.test_yolo_loss_knobs:Recorder(normalizer={normalizer!r})"
        terms = make_loss(conf_loss=spec)(outputs, targets)
        step = {"terms": values(terms), "gradients": gradients(terms, outputs)}
        torch.save(step, f"{folder}/{normalizer}-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_mean_is_the_loss_of_the_joint_batch(tmp_path):
    torch.multiprocessing.spawn(rank_step, args=(str(tmp_path),), nprocs=2)
    for normalizer in ("mean", "positives"):
        outputs = make_outputs(batch=3)
        spec = f"tests.test_yolo_loss_knobs:Recorder(normalizer={normalizer!r})"
        joint = make_loss(conf_loss=spec)(outputs, make_targets())
        ranks = [torch.load(tmp_path / f"{normalizer}-{rank}.pt") for rank in (0, 1)]
        mean = {key: (ranks[0]["terms"][key] + ranks[1]["terms"][key]) / 2 for key in values(joint)}
        assert mean == pytest.approx(values(joint), rel=1e-5)
        for scale, whole in enumerate(gradients(joint, outputs)):
            parts = torch.cat([rank["gradients"][scale] for rank in ranks])
            torch.testing.assert_close(parts / 2, whole)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@ALL
def test_on_a_gpu_nothing_waits_for_the_device_and_the_numbers_are_the_same(assigner):
    loss, targets = make_loss(assigner=assigner, focal_loss=True), make_targets(60, ignore=5)
    expected = loss(make_outputs(), targets)
    loss, targets = loss.cuda(), targets.cuda()
    outputs = [raw.detach().cuda().requires_grad_() for raw in make_outputs()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        terms = loss(outputs, targets)
        terms["total"].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert values(terms) == pytest.approx(values(expected), rel=1e-4)


@ALL
@pytest.mark.parametrize("box_loss", sorted(BOX_LOSSES))
def test_rows_that_pad_the_targets_change_nothing(assigner, box_loss):
    outputs, targets = make_outputs(), make_targets(ignore=2)
    padding = torch.tensor([NOTHING]).expand(52, 6)
    loss = make_loss(assigner=assigner, box_loss=box_loss, iou_target=1.0)
    plain, padded = loss(outputs, targets), loss(outputs, torch.cat((targets, padding)))
    assert values(padded) == pytest.approx(values(plain), rel=2.4e-7)
    assert padded["ignored"] == plain["ignored"]
    for found, expected in zip(gradients(padded, outputs), gradients(plain, outputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
