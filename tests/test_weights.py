import io
import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch

from nets.yolo import YoloV4
from tests.weight_files import (
    SMALL,
    assert_refused,
    copy_of,
    same,
    small_model,
    structure,
    write_darknet,
)
from utils.errors import UserError
from weights.darknet import Header
from weights.fork import fork_names
from weights.loading import load_weights
from weights.reading import FORMAT_VERSION, read_torch_file, read_weights

OUTPUTS = {
    f"head_{level}.output.{kind}" for level in ("p3", "p4", "p5") for kind in ("weight", "bias")
}


def save(path, content, **options):
    torch.save(content, path, **options)
    return path


def checkpoint(network, **metadata):
    state = {"format_version": FORMAT_VERSION, "model": network.state_dict(), "epoch": 7, **SMALL}
    return {**state, **metadata}


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


@pytest.mark.parametrize("wanted", [None, ("cat", "dog"), ["cat", "dog"]])
def test_heads_of_the_same_classes_or_of_unknown_ones_load_in_full(tmp_path, wanted):
    donor, model = small_model(), small_model(seed=1)
    path = save(tmp_path / "w.pt", checkpoint(donor, class_names=["cat", "dog"]))
    report = load_weights(model, path, class_names=wanted)
    assert (report.partly, report.skipped, report.heads_loaded) == ({}, {}, True)
    assert same(model, donor.state_dict())


def test_outputs_of_the_same_classes_in_another_order_are_carried_over_by_name(tmp_path):
    donor, model = small_model(), small_model(seed=1)
    path = save(tmp_path / "w.pt", checkpoint(donor, class_names=["cat", "dog"]))
    report = load_weights(model, path, class_names=["dog", "cat"])
    assert (set(report.partly), report.skipped, report.heads_loaded) == (OUTPUTS, {}, True)
    order = torch.tensor([0, 1, 2, 3, 4, 6, 5])
    for name in OUTPUTS:
        theirs = donor.state_dict()[name].unflatten(0, (3, 7))[:, order].flatten(0, 1)
        assert torch.equal(model.state_dict()[name], theirs)


def test_what_the_weights_were_trained_with_is_reported(tmp_path):
    donor = small_model()
    metadata = {"scale_xy": [1.0, 1.5, 2.0], "anchors": [[1.0, 2.0]] * 9}
    report = load_weights(donor, save(tmp_path / "w.pt", checkpoint(donor, **metadata)))
    assert (report.scale_xy, report.anchors) == ((1.0, 1.5, 2.0), metadata["anchors"])
    report = load_weights(donor, save(tmp_path / "w.pt", donor.state_dict()))
    assert (report.scale_xy, report.anchors) == (None, None)


def test_a_checkpoint_that_was_a_darknet_file_keeps_its_header(tmp_path):
    header = {"version": [0, 2, 5], "seen": 640}
    path = save(tmp_path / "w.pt", checkpoint(small_model(), darknet=header))
    assert read_weights(path, structure(1, **SMALL)).header == Header((0, 2, 5), 640)


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
    ("content", "match"),
    [
        (b"", "not a weights file"),
        (b"P", "not a weights file"),
        (b"GIF89a" * 99, "not a weights file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "not a weights file"),
        (b"<!DOCTYPE html>\n<html>sign in</html>", "a web page, not weights"),
        (b"\n  <html>", "a web page, not weights"),
        (b"PK", "damaged"),
        (b"\x80\x02", "damaged"),
        (b"\x80\x02garbage", "damaged"),
        (pickle.dumps({"a": 1}, protocol=2), "damaged or cut off, or not of torch.save"),
        (pickle.dumps({"a": 1}, protocol=4), "not a weights file"),
    ],
)
def test_files_that_are_no_weights_are_refused(tmp_path, content, match):
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    assert_refused(path, rf"w\.pth: {match}")


def test_a_zip_file_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as file:
        file.writestr("folder/a.txt", "text")
    assert_refused(tmp_path / "w.pt", "damaged or cut off, or not of torch.save")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999])
def test_a_file_that_was_cut_off_is_refused(tmp_path, zipped, share):
    path = tmp_path / "w.pt"
    save(path, checkpoint(small_model()), _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert_refused(path, "damaged or cut off")


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


class Harmless:
    pass


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "dump",
    [saved, lambda c: saved(c, _use_new_zipfile_serialization=False), lambda c: pickle.dumps(c, 2)],
    ids=["zip", "before zip", "plain pickle"],
)
@pytest.mark.parametrize("content", [Harmful(), Harmless(), {"model": Harmful()}])
def test_a_pickle_of_objects_is_refused_and_nothing_of_it_runs(
    tmp_path, monkeypatch, dump, content
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pt").write_bytes(dump(content))
    assert_refused("w.pt", r"w\.pt: holds Python objects, .* save the state_dict")
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


def test_no_message_advises_to_load_a_file_that_may_run_code(tmp_path):
    for number, content in enumerate([saved(Harmful()), b"\x80\x02garbage"]):
        path = tmp_path / f"{number}.pt"
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_torch_file(path)
        assert "weights_only" not in str(caught.value)


def test_a_darknet_file_holds_no_checkpoint(tmp_path):
    write_darknet(tmp_path / "w", 9)
    with pytest.raises(UserError, match="a darknet file, which holds weights and nothing else"):
        read_torch_file(tmp_path / "w")


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 1}, torch.ones(2), {3: torch.ones(1)}])
def test_torch_files_of_other_things_are_refused(tmp_path, content):
    assert_refused(save(tmp_path / "w.pt", content), "not weights of this network")


def test_a_checkpoint_of_a_newer_format_is_refused_with_both_versions(tmp_path):
    newer = checkpoint(small_model(), format_version=FORMAT_VERSION + 1)
    assert_refused(save(tmp_path / "w.pt", newer), f"format {FORMAT_VERSION + 1}.*up to")


@pytest.mark.parametrize(
    "metadata", [{"format_version": "x"}, {"format_version": 0}, {"model": None}]
)
def test_a_checkpoint_without_format_or_model_is_refused(tmp_path, metadata):
    assert_refused(save(tmp_path / "w.pt", checkpoint(small_model(), **metadata)), "damaged")


def test_weights_of_a_training_that_diverged_are_refused(tmp_path):
    donor = small_model()
    torch.nn.init.constant_(donor.head_p4.conv.bn.weight, float("nan"))
    path = save(tmp_path / "w.pt", checkpoint(donor))
    assert_refused(path, r"NaN or infinite values in head_p4\.conv\.bn\.weight")


@pytest.mark.parametrize(
    "metadata",
    [
        *({"scale_xy": value} for value in (None, 5, [1.0], [1.0, float("nan"), 1.0], ["a"] * 3)),
        *({"darknet": value} for value in (3, [1], {"version": [0, 2, 5]})),
    ],
)
def test_a_checkpoint_with_strange_metadata_is_refused(tmp_path, metadata):
    path = save(tmp_path / "w.pt", checkpoint(small_model(), **metadata))
    assert_refused(path, "strange metadata: damaged")


@pytest.mark.parametrize("metadata", [{"scale_xy": 5}, {"scale_xy": ["a"] * 3}, {"darknet": [1]}])
def test_a_pth_with_strange_metadata_is_refused(tmp_path, metadata):
    state = small_model().state_dict()
    names = fork_names(state)
    fork = OrderedDict((names[name], tensor) for name, tensor in state.items())
    fork._metadata = metadata
    assert_refused(save(tmp_path / "w.pth", fork), "strange metadata: damaged")


@pytest.mark.parametrize(
    "change",
    [
        torch.Tensor.bool,
        torch.Tensor.int,
        torch.Tensor.to_sparse,
        lambda tensor: tensor.to(torch.complex64),
    ],
)
def test_a_tensor_of_no_plain_numbers_is_not_loaded(tmp_path, change):
    state = small_model().state_dict()
    for name in ("spp.before.0.conv.weight", "head_p3.output.weight"):
        state[name] = change(state[name])
    path = save(tmp_path / "w.pt", checkpoint(small_model(), model=state, class_names=["a", "b"]))
    model = small_model(seed=1)
    before = copy_of(model)
    report = load_weights(model, path, class_names=["b", "c"])
    for name in ("spp.before.0.conv.weight", "head_p3.output.weight"):
        assert "no plain numbers" in report.skipped[name]
        assert torch.equal(model.state_dict()[name], before[name])


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.jit goes, its files stay
def test_a_torchscript_archive_is_named_without_advice_to_run_it(tmp_path):
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Conv2d(3, 3, 1), torch.zeros(1, 3, 4, 4)), path)
    with pytest.raises(UserError, match="holds Python objects") as error:
        load_weights(small_model(), path)
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("rows", [1, 15, 20])
def test_an_impossible_number_of_outputs_is_named(tmp_path, rows):
    state = small_model().state_dict()
    state["head_p3.output.bias"] = torch.zeros(rows)
    assert_refused(save(tmp_path / "w.pt", state), f"{rows} outputs a cell")


@pytest.mark.parametrize(("names", "told"), [(None, False), (["a", "b"], True)])
def test_outputs_of_unknown_classes_are_told_to_be_loaded_by_position(tmp_path, names, told):
    path = save(tmp_path / "w.pt", small_model().state_dict())
    report = load_weights(small_model(seed=1), path, class_names=names)
    assert report.by_position is told
    assert ("by position" in str(report)) is told
