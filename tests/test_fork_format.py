import pytest
import torch

from tests.weight_files import (
    assert_refused,
    copy_of,
    darknet_shapes,
    full_model,
    same,
    small_model,
    structure,
)
from weights.fork import fork_names
from weights.loading import load_weights
from weights.reading import read_weights

BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
DEEPER = {"depth": 0.25}  # 1, 1, 2, 2, 1 residuals


def units(*blocks):
    """The fork's convolutions in its order, with `blocks` residuals in its five stages."""
    names = ["backbone.conv1"]
    for stage, count in enumerate(blocks):
        start = f"backbone.stages.{stage}"
        names += [f"{start}.{part}" for part in ("downsample_conv", "split_conv0", "split_conv1")]
        names += [f"{start}.blocks_conv.{r}.block.{i}" for r in range(count) for i in (0, 1)]
        names += [f"{start}.blocks_conv.{count}", f"{start}.concat_conv"]
    names += [f"conv{n}.{i}" for n in (1, 2) for i in range(3)]
    names += ["upsample1.upsample.0", "conv_for_P4", *five(1)]
    names += ["upsample2.upsample.0", "conv_for_P3", *five(2), "yolo_head3.0", "yolo_head3.1"]
    names += ["down_sample1", *five(3), "yolo_head2.0", "yolo_head2.1"]
    return [*names, "down_sample2", *five(4), "yolo_head1.0", "yolo_head1.1"]


def five(number):
    return [f"make_five_conv{number}.{index}" for index in range(5)]


def fork_list(*blocks):
    """Names of the fork's whole file."""
    names = []
    for unit in units(*blocks):
        if unit in ("yolo_head3.1", "yolo_head2.1", "yolo_head1.1"):
            names += [f"{unit}.weight", f"{unit}.bias"]
        else:
            names += [f"{unit}.conv.weight", *(f"{unit}.bn.{part}" for part in BN)]
    return names


def full_state(num_classes):
    """A whole file of full size whose n-th tensor holds n everywhere, in 4 bytes of its own."""
    state = {}
    for unit, (shape, bn) in zip(units(1, 2, 8, 8, 4), darknet_shapes(num_classes), strict=True):
        shapes = {f"{unit}.weight": shape, f"{unit}.bias": shape[:1]}
        if bn:
            shapes = {f"{unit}.conv.weight": shape, **{f"{unit}.bn.{p}": shape[:1] for p in BN}}
            shapes[f"{unit}.bn.num_batches_tracked"] = ()
        for name, size in shapes.items():
            state[name] = torch.tensor(float(len(state))).expand(size)
    return state


def small_state(donor):
    """A small network's tensors under the fork's names, in its order."""
    names = fork_list(1, 1, 2, 2, 1)
    return dict(zip(names, donor.state_dict().values(), strict=True))


def save(path, state):
    torch.save(state, path)
    return path


def test_names_are_the_forks_in_its_order():
    assert list(fork_names(structure().state_dict()).values()) == fork_list(1, 2, 8, 8, 4)
    small = structure(2, width=0.05, depth=0.25).state_dict()
    assert fork_names(small) == dict(zip(small, fork_list(1, 1, 2, 2, 1), strict=True))


@pytest.mark.parametrize(("num_classes", "parameters"), [(80, 64_363_101), (20, 64_040_001)])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_whole_files_of_full_size_load_tensor_by_tensor(tmp_path, num_classes, parameters, prefix):
    state = full_state(num_classes)
    assert list(state) == fork_list(1, 2, 8, 8, 4)
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert len(state) == 648
    assert sum(t.numel() for n, t in state.items() if not n.endswith(buffers)) == parameters
    path = save(tmp_path / "w.pth", {f"{prefix}{name}": state[name] for name in state})
    network = structure(num_classes)
    weights = read_weights(path, network)
    for position, (name, expected) in enumerate(network.state_dict().items()):
        assert weights.tensors[name].shape == expected.shape
        assert weights.tensors[name].flatten()[0] == position
    assert (len(weights.tensors), weights.num_classes) == (648, num_classes)
    assert (weights.scale_xy, weights.class_names, weights.header) == ((1.0, 1.0, 1.0), None, None)
    assert weights.source == f"{path} (original fork)"


def test_a_full_backbone_alone_loads_into_a_full_network(tmp_path):
    state = full_state(80)
    backbone = {name[9:]: state[name] for name in state if name.startswith("backbone.")}
    model = full_model(20)
    report = load_weights(model, save(tmp_path / "w.pth", backbone))
    names = [name for name in model.state_dict() if name.startswith("backbone.")]
    assert report.loaded == names
    assert [tensor.flatten()[0].item() for tensor in model.backbone.state_dict().values()] == list(
        range(len(names))
    )
    assert set(report.skipped.values()) == {"not in the file"}
    assert (report.heads_loaded, report.scale_xy) == (False, None)
    assert report.source.endswith("(original fork, backbone)")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_whole_file_loads_in_full(tmp_path, prefix, zipped):
    donor, model = small_model(**DEEPER), small_model(seed=1, **DEEPER)
    state = {f"{prefix}{name}": tensor for name, tensor in small_state(donor).items()}
    torch.save(state, tmp_path / "x", _use_new_zipfile_serialization=zipped)
    report = load_weights(model, tmp_path / "x")
    assert same(model, donor.state_dict())
    assert (report.skipped, report.heads_loaded, report.scale_xy) == ({}, True, (1.0, 1.0, 1.0))


def test_heads_of_another_class_count_are_a_note_and_stay_as_they_are(tmp_path):
    donor, model = small_model(20, **DEEPER), small_model(3, seed=1, **DEEPER)
    before = copy_of(model)
    report = load_weights(model, save(tmp_path / "w.pth", small_state(donor)))
    assert set(report.skipped) == {name for name in before if ".output." in name}
    assert set(report.skipped.values()) == {"output for 20 classes in the file, 3 in the model"}
    assert same(model, before, report.skipped)
    assert same(model, donor.state_dict(), report.loaded)


def test_a_file_of_half_precision_loads_as_float32(tmp_path):
    donor, model = small_model(**DEEPER).half(), small_model(seed=1, **DEEPER)
    load_weights(model, save(tmp_path / "w.pth", small_state(donor)))
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert same(model, donor.float().state_dict())


def test_missing_counters_of_batches_are_not_reported(tmp_path):
    donor, model = small_model(**DEEPER), small_model(seed=1, **DEEPER)
    state = small_state(donor)
    old = {name: tensor for name, tensor in state.items() if "num_batches" not in name}
    report = load_weights(model, save(tmp_path / "w.pth", old))
    assert report.skipped == {}
    assert len(report.loaded) == len(old) < len(state)


def test_tensors_that_are_no_part_of_the_network_are_reported_by_the_files_name(tmp_path):
    state = small_state(small_model(**DEEPER)) | {"yolo_head4.0.conv.weight": torch.ones(1)}
    report = load_weights(small_model(**DEEPER), save(tmp_path / "w.pth", state))
    assert report.skipped == {"yolo_head4.0.conv.weight": "not in the model"}


def test_a_file_without_a_part_of_the_neck_leaves_that_part_and_says_so(tmp_path):
    donor, model = small_model(**DEEPER), small_model(seed=1, **DEEPER)
    before, state = copy_of(model), small_state(donor)
    del state["conv_for_P4.conv.weight"]
    state["conv_for_P3.bn.bias"] = torch.ones(3)
    report = load_weights(model, save(tmp_path / "w.pth", state))
    assert report.skipped == {
        "top_down_p4.lateral.conv.weight": "not in the file",
        "top_down_p3.lateral.bn.bias": "shape (3,) in the file, (8,) in the model",
    }
    assert same(model, before, report.skipped)


@pytest.mark.parametrize("other", [{"depth": 1.0}, {"width": 0.2, **DEEPER}])
def test_a_backbone_of_another_width_or_depth_is_refused(tmp_path, other):
    path = save(tmp_path / "w.pth", small_state(small_model(**DEEPER)))
    assert_refused(path, r"\(original fork\): its backbone does not fit", small_model(**other))


def test_a_part_of_a_backbone_is_refused(tmp_path):
    state = small_state(small_model(**DEEPER))
    del state["backbone.stages.4.concat_conv.bn.weight"]
    match = r"does not fit this model, 1 tensors differ: backbone\.stages\.4\.merge\.bn\.weight"
    assert_refused(save(tmp_path / "w.pth", state), match, small_model(**DEEPER))
    del state["backbone.conv1.conv.weight"]
    path = save(tmp_path / "w.pth", state)
    assert_refused(path, "not weights of this network, but a dict with", small_model(**DEEPER))
