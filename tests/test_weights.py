import os

import pytest
import torch

from nets.weights import FORMAT_VERSION, load_weights
from nets.yolo import YoloV4
from utils.errors import UserError

SMALL = {"width": 0.05, "depth": 0.1}
OUTPUTS = {
    f"head_{level}.output.{kind}" for level in ("p3", "p4", "p5") for kind in ("weight", "bias")
}


def small_model(num_classes=2, seed=0, **scaling):
    torch.manual_seed(seed)
    return YoloV4(num_classes, **{**SMALL, **scaling})


def save(path, content, **options):
    torch.save(content, path, **options)
    return path


def checkpoint(network, **facts):
    state = {"format_version": FORMAT_VERSION, "model": network.state_dict(), "epoch": 7, **SMALL}
    return {**state, **facts}


def same(model, state, names=None):
    found = model.state_dict()
    return all(torch.equal(found[name], state[name]) for name in names or state)


def copy_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_refused(path, match, model=None):
    model = model or small_model(seed=1)
    before = copy_of(model)
    with pytest.raises(UserError, match=match):
        load_weights(model, path)
    assert same(model, before)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [checkpoint, YoloV4.state_dict])
def test_a_file_of_the_same_network_loads_in_full_whatever_its_name(tmp_path, wrap, zipped):
    donor, model = small_model(), small_model(seed=1)
    path = save(tmp_path / "x.jpg", wrap(donor), _use_new_zipfile_serialization=zipped)
    assert not same(model, donor.state_dict())
    report = load_weights(model, str(path))
    assert same(model, donor.state_dict())
    assert report.loaded == list(donor.state_dict())
    assert (report.skipped, report.heads_loaded) == ({}, True)


def test_loading_keeps_the_file_and_later_training_apart(tmp_path):
    donor, model = small_model(), small_model(seed=1)
    path = save(tmp_path / "w.pt", donor.state_dict())
    load_weights(model, path)
    torch.nn.init.zeros_(model.head_p3.output.weight)
    load_weights(again := small_model(seed=2), path)
    assert same(again, donor.state_dict())


def test_a_head_for_another_class_count_is_skipped_with_both_counts(tmp_path):
    donor, model = small_model(20), small_model(3, seed=1)
    before = copy_of(model)
    report = load_weights(model, save(tmp_path / "w.pt", checkpoint(donor)))
    assert set(report.skipped) == OUTPUTS
    assert set(report.skipped.values()) == {"output for 20 classes in the file, 3 in the model"}
    assert not report.heads_loaded
    assert same(model, before, OUTPUTS)
    assert same(model, donor.state_dict(), set(before) - OUTPUTS)


@pytest.mark.parametrize(
    ("wanted", "loads"),
    [(None, True), (("cat", "dog"), True), (["cat", "dog"], True), (["dog", "cat"], False)],
)
def test_heads_load_unless_the_class_names_are_known_to_differ(tmp_path, wanted, loads):
    donor, model = small_model(), small_model(seed=1)
    path = save(tmp_path / "w.pt", checkpoint(donor, class_names=["cat", "dog"]))
    report = load_weights(model, path, class_names=wanted)
    assert report.heads_loaded is loads
    assert set(report.skipped) == (set() if loads else OUTPUTS)
    assert same(model, donor.state_dict(), OUTPUTS) is loads


def test_a_state_dict_knows_no_class_names_and_loads_its_heads(tmp_path):
    path = save(tmp_path / "w.pt", small_model().state_dict())
    assert load_weights(small_model(seed=1), path, class_names=["a", "b"]).heads_loaded


def test_tensors_that_are_missing_strange_or_left_over_are_reported(tmp_path):
    donor, model = small_model(), small_model(seed=1)
    state = dict(donor.state_dict())
    del state["spp.before.0.conv.weight"]
    state["spp.before.0.bn.weight"] = torch.ones(3)
    state["spp.before.0.bn.bias"] = "text"
    state["head_p3.output.bias"] = torch.tensor(1.0)
    state["extra"] = torch.ones(1)
    report = load_weights(model, save(tmp_path / "w.pt", state))
    assert report.skipped == {
        "spp.before.0.conv.weight": "not in the file",
        "spp.before.0.bn.weight": "shape (3,) in the file, (24,) in the model",
        "spp.before.0.bn.bias": "no tensor in the file, but str",
        "head_p3.output.bias": "shape () in the file, (21,) in the model",
        "extra": "not in the model",
    }
    assert len(report.loaded) == len(donor.state_dict()) - 4
    assert not report.heads_loaded


def test_the_report_reads_as_one_line_a_reason(tmp_path):
    path = save(tmp_path / "w.pt", checkpoint(small_model(20)))
    report = load_weights(small_model(3), path)
    assert str(report).splitlines() == [
        f"{path} (checkpoint, epoch 7, width 0.05, depth 0.1): "
        f"{len(report.loaded)} tensors loaded, 6 skipped",
        "  head_p3.output.weight, head_p3.output.bias, head_p4.output.weight, "
        "head_p4.output.bias, 2 more: output for 20 classes in the file, 3 in the model",
    ]


def test_half_precision_files_load_as_float32(tmp_path):
    path = save(tmp_path / "w.pt", small_model().half().state_dict())
    model = small_model(seed=1)
    assert load_weights(model, path).heads_loaded
    assert model.head_p3.output.weight.dtype == torch.float32


@pytest.mark.parametrize("scaling", [{"width": 0.2}, {"depth": 1.0}])
def test_a_backbone_of_another_width_or_depth_is_refused_either_way(tmp_path, scaling):
    other = small_model(**scaling)
    assert_refused(save(tmp_path / "w.pt", checkpoint(other)), "backbone does not fit")
    plain = save(tmp_path / "v.pt", checkpoint(small_model()))
    assert_refused(plain, "width 0.05, depth 0.1", small_model(**scaling))


def test_missing_files_and_folders_are_refused(tmp_path):
    assert_refused(tmp_path / "nowhere.pt", "No such file")
    assert_refused(tmp_path, "cannot read")


@pytest.mark.parametrize(
    "content", [b"", b"P", b"PK", b"\x80\x02", b"\x80\x02garbage", b"GIF89a" * 99]
)
def test_files_that_are_no_weights_are_refused(tmp_path, content):
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    assert_refused(path, r"w\.pt: (not a weights file|damaged)")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_file_that_was_cut_off_is_refused(tmp_path, zipped, share):
    path = tmp_path / "w.pt"
    save(path, checkpoint(small_model()), _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert_refused(path, "damaged or cut off")


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(save(tmp_path / "w.pt", {"format_version": 1, "model": Harmful()}), "damaged")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 1}, torch.ones(2), {3: torch.ones(1)}])
def test_torch_files_of_other_things_are_refused(tmp_path, content):
    assert_refused(save(tmp_path / "w.pt", content), "not weights of this network")


def test_a_checkpoint_of_a_newer_format_is_refused_with_both_versions(tmp_path):
    newer = checkpoint(small_model(), format_version=FORMAT_VERSION + 1)
    assert_refused(save(tmp_path / "w.pt", newer), f"format {FORMAT_VERSION + 1}.*up to")


@pytest.mark.parametrize("facts", [{"format_version": "x"}, {"format_version": 0}, {"model": None}])
def test_a_checkpoint_without_format_or_model_is_refused(tmp_path, facts):
    assert_refused(save(tmp_path / "w.pt", checkpoint(small_model(), **facts)), "damaged")


def test_weights_of_a_training_that_diverged_are_refused(tmp_path):
    donor = small_model()
    torch.nn.init.constant_(donor.head_p4.conv.bn.weight, float("nan"))
    path = save(tmp_path / "w.pt", checkpoint(donor))
    assert_refused(path, r"NaN or infinite values in head_p4\.conv\.bn\.weight")
