import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nets.blocks import scale_channels, scale_repeats
from nets.neck import SpatialPyramidPooling
from nets.yolo import YoloV4
from utils.errors import UserError


def csp_layers(filters, split, inner, repeats):
    residual = f"c{inner}.1.1.mish c{split}.3.1.mish s-3 "
    return (
        f"c{filters}.3.2.mish c{split}.1.1.mish r-2 c{split}.1.1.mish {repeats * residual}"
        f"c{split}.1.1.mish r-1,-{3 * repeats + 4} c{filters}.1.1.mish "
    )


# Darknet's layers 0..161 of YOLOv4: c filters.size.stride.activation, r route from, s shortcut
# from, p max pool, u upsample, y detection.
DARKNET_LAYERS = (
    "c32.3.1.mish "
    + csp_layers(64, 64, 32, 1)
    + csp_layers(128, 64, 64, 2)
    + csp_layers(256, 128, 128, 8)
    + csp_layers(512, 256, 256, 8)
    + csp_layers(1024, 512, 512, 4)
    + "c512.1.1.leaky c1024.3.1.leaky c512.1.1.leaky p5 r-2 p9 r-4 p13 r-1,-3,-5,-6 "
    "c512.1.1.leaky c1024.3.1.leaky c512.1.1.leaky c256.1.1.leaky u2 r85 c256.1.1.leaky r-1,-3 "
    "c256.1.1.leaky c512.3.1.leaky c256.1.1.leaky c512.3.1.leaky c256.1.1.leaky "
    "c128.1.1.leaky u2 r54 c128.1.1.leaky r-1,-3 "
    "c128.1.1.leaky c256.3.1.leaky c128.1.1.leaky c256.3.1.leaky c128.1.1.leaky "
    "c256.3.1.leaky c255.1.1.linear y r-4 c256.3.2.leaky r-1,-16 "
    "c256.1.1.leaky c512.3.1.leaky c256.1.1.leaky c512.3.1.leaky c256.1.1.leaky "
    "c512.3.1.leaky c255.1.1.linear y r-4 c512.3.2.leaky r-1,-37 "
    "c512.1.1.leaky c1024.3.1.leaky c512.1.1.leaky c1024.3.1.leaky c512.1.1.leaky "
    "c1024.3.1.leaky c255.1.1.linear y"
).split()


def darknet_convolutions():
    """(filters, size, stride) of darknet's convolutions, in its order."""
    fields = (layer[1:].split(".") for layer in DARKNET_LAYERS if layer[0] == "c")
    return [tuple(map(int, field[:3])) for field in fields]


def run_darknet(images, convs, norms):
    """Follow darknet's layer list with the given convolutions and BNs, taken in turn."""
    outputs, maps, convs, norms = [], [], iter(convs), iter(norms)
    for index, layer in enumerate(DARKNET_LAYERS):
        x = outputs[-1] if outputs else images
        kind, rest = layer[0], layer[1:]
        if kind == "c":
            x = next(convs)(x)
            x = x if rest.endswith("linear") else next(norms)(x)
            if rest.endswith("mish"):
                x = x * torch.tanh(F.softplus(x))
            elif rest.endswith("leaky"):
                x = torch.where(x > 0, x, 0.1 * x)
        elif kind == "r":
            steps = [int(step) for step in rest.split(",")]
            x = torch.cat([outputs[index + s if s < 0 else s] for s in steps], dim=1)
        elif kind == "s":
            x = x + outputs[index + int(rest)]
        elif kind == "p":
            x = F.max_pool2d(x, int(rest), 1, int(rest) // 2)
        elif kind == "u":
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        else:
            maps.append(x)
        outputs.append(x)
    return maps


def modules_of(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


def small_model(num_classes=2, width=0.1, depth=1.0):
    torch.manual_seed(0)
    return YoloV4(num_classes, width=width, depth=depth)


@pytest.fixture(scope="module")
def full_model():
    with torch.device("meta"):
        return YoloV4(80)


def test_the_full_network_has_yolov4s_parameters_and_state(full_model):
    assert sum(p.numel() for p in full_model.parameters()) == 64_363_101
    assert len(full_model.state_dict()) == 648
    convs = modules_of(full_model, nn.Conv2d)
    assert len(convs) == 110
    assert sum(conv.bias is not None for conv in convs) == 3
    backbone = modules_of(full_model.backbone, nn.Conv2d)
    assert backbone == convs[:72]


def test_convolutions_are_registered_in_darknets_order(full_model):
    assert len(DARKNET_LAYERS) == 162
    convs = modules_of(full_model, nn.Conv2d)
    found = [(conv.out_channels, conv.kernel_size[0], conv.stride[0]) for conv in convs]
    assert found == darknet_convolutions()
    weights = [name for name, value in full_model.state_dict().items() if value.ndim == 4]
    names = [name for name, module in full_model.named_modules() if isinstance(module, nn.Conv2d)]
    assert weights == [f"{name}.weight" for name in names]


def test_bn_settings(full_model):
    assert {(bn.eps, bn.momentum) for bn in modules_of(full_model, nn.BatchNorm2d)} == {(1e-5, 0.1)}


def test_forward_equals_following_darknets_layer_list():
    model = small_model().double().eval()
    for bn in modules_of(model, nn.BatchNorm2d):
        for tensor, low in ((bn.weight, 0.5), (bn.bias, -1), (bn.running_mean, -1)):
            nn.init.uniform_(tensor, low, 1)
        nn.init.uniform_(bn.running_var, 1, 3)
    images = torch.rand(2, 3, 96, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = run_darknet(
            images, modules_of(model, nn.Conv2d), modules_of(model, nn.BatchNorm2d)
        )
        for found, wanted in zip(model(images), expected, strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("width", [0.13, 0.25, 1 / 3, 0.5, 1.5])
def test_width_scales_every_channel_count_of_darknet_but_the_outputs(width):
    with torch.device("meta"):
        model = YoloV4(4, width=width)
    expected = [
        (27 if filters == 255 else max(8, 8 * math.floor(filters * width / 8 + 0.5)), size, stride)
        for filters, size, stride in darknet_convolutions()
    ]
    convs = modules_of(model, nn.Conv2d)
    assert [(c.out_channels, c.kernel_size[0], c.stride[0]) for c in convs] == expected
    shapes = [tuple(output.shape) for output in model(torch.empty(2, 3, 64, 32, device="meta"))]
    assert shapes == [(2, 27, 8, 4), (2, 27, 4, 2), (2, 27, 2, 1)]


@pytest.mark.parametrize(
    ("depth", "repeats"),
    [
        (0.01, [1, 1, 1, 1, 1]),
        (0.33, [1, 1, 3, 3, 1]),
        (1, [1, 2, 8, 8, 4]),
        (2, [2, 4, 16, 16, 8]),
    ],
)
def test_depth_scales_the_residuals_of_each_stage(depth, repeats):
    with torch.device("meta"):
        model = YoloV4(1, width=0.1, depth=depth)
    assert [len(stage.residuals) for stage in model.backbone.stages] == repeats


def test_scaling_rounds_half_up_and_has_a_floor():
    assert [scale_channels(32, w) for w in (1e-9, 0.25, 0.37, 0.375, 1)] == [8, 8, 8, 16, 32]
    assert [scale_repeats(n, 0.5) for n in (1, 3, 5)] == [1, 2, 3]


def test_a_single_class_and_non_square_inputs():
    model = small_model(num_classes=1).eval()
    for height, width in ((32, 32), (32, 160), (128, 64)):
        with torch.no_grad():
            outputs = model(torch.rand(1, 3, height, width))
        expected = [(1, 18, height // s, width // s) for s in (8, 16, 32)]
        assert [tuple(output.shape) for output in outputs] == expected


def test_channels_last_gives_the_same_maps_in_that_format():
    model = small_model().eval()
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(images)
        model = model.to(memory_format=torch.channels_last)
        found = model(images.to(memory_format=torch.channels_last))
    for one, other in zip(found, expected, strict=True):
        assert one.is_contiguous(memory_format=torch.channels_last)
        scale = other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("size", [(1, 1), (3, 20), (19, 19)])
def test_cascaded_pools_equal_parallel_pools_in_darknets_order(size):
    spp = SpatialPyramidPooling(8, 8, 16)
    spp.before, spp.after = nn.Identity(), nn.Identity()
    x = torch.randn(2, 8, *size) - 5
    pools = [F.max_pool2d(x, k, stride=1, padding=k // 2) for k in (13, 9, 5)]
    assert torch.equal(spp(x), torch.cat([*pools, x], dim=1))


def test_the_prior_is_the_objectness_of_zero_features():
    model = small_model(num_classes=3)
    model.set_objectness_prior(0.03)
    for head in (model.head_p3, model.head_p4, model.head_p5):
        logits = head.output(torch.zeros(1, head.output.in_channels, 2, 2)).view(1, 3, 8, 2, 2)
        probability = logits[:, :, 4].sigmoid()
        torch.testing.assert_close(probability, torch.full_like(probability, 0.03))
        assert not logits[:, :, [0, 1, 2, 3, 5, 6, 7]].any()


def test_gradients_reach_every_parameter():
    model = small_model(depth=0.5).train()
    outputs = model(torch.rand(2, 3, 64, 64))
    sum(output.square().sum() for output in outputs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_every_filter_starts_with_the_same_norm_and_outputs_near_zero():
    model = small_model(width=0.25)
    for conv in modules_of(model, nn.Conv2d):
        if conv.bias is None:
            norm = conv.weight.detach().flatten(1).norm(dim=1).square().mean().sqrt()
            assert norm == pytest.approx(math.sqrt(2), rel=0.3)
    outputs = model.train()(torch.rand(4, 3, 64, 64))
    for output in outputs:
        assert output.std(dim=(0, 2, 3)).max() < 0.5
        assert output.unflatten(1, (3, -1))[:, :, 4].sigmoid().mean().item() == pytest.approx(
            0.01, rel=0.3
        )


@pytest.mark.parametrize("arguments", [{"num_classes": 0}, {"num_classes": -3}])
@pytest.mark.parametrize("scaling", [{}, {"width": 0.1}])
def test_a_detector_without_classes_is_refused(arguments, scaling):
    with pytest.raises(UserError, match="classes"):
        YoloV4(**arguments, **scaling)


@pytest.mark.parametrize("name", ["width", "depth"])
@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
def test_multipliers_that_are_not_positive_are_refused(name, value):
    with pytest.raises(UserError, match=name):
        YoloV4(1, **{name: value})


@pytest.mark.parametrize("shape", [(1, 3, 100, 96), (1, 3, 96, 33), (1, 3, 0, 32), (1, 3, 16, 16)])
def test_sizes_that_are_no_multiples_of_32_are_refused(full_model, shape):
    with pytest.raises(UserError, match="multiples of 32"):
        full_model(torch.empty(shape, device="meta"))


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64)])
def test_inputs_that_are_no_rgb_batch_are_refused(full_model, shape):
    with pytest.raises(UserError, match=r"\(B, 3, H, W\)"):
        full_model(torch.empty(shape, device="meta"))


@pytest.mark.parametrize("pi", [0, 1, -0.1, 2, math.nan])
def test_priors_that_are_no_probabilities_are_refused(pi):
    with pytest.raises(UserError, match="prior"):
        small_model(depth=0.1).set_objectness_prior(pi)
