import pytest
import torch

from tests.weight_files import assert_refused, copy_of, same, small_model
from weights.class_rows import carry_rows, describe_rows, shared_rows
from weights.loading import load_weights


@pytest.mark.parametrize(
    ("in_file", "wanted", "rows"),
    [
        (None, ["a"], None),
        (["a"], None, None),
        (["a", "b"], ("a", "b"), None),
        (["a", "b"], ["b", "a"], [(0, 1), (1, 0)]),
        (["a", "b", "c"], ["c", "x", "a"], [(0, 2), (2, 0)]),
        (["a", "b"], ["a"], [(0, 0)]),
        (["a"], ["a", "b"], [(0, 0)]),
        (["a", "b"], ["A", "c"], []),
    ],
)
def test_shared_classes_are_found_by_name(in_file, wanted, rows):
    assert shared_rows(in_file, wanted) == rows


@pytest.mark.parametrize("tail", [(), (4, 1, 1)], ids=["bias", "weight"])
def test_rows_are_carried_for_each_anchor(tail):
    """Of classes (a, b, c) to (c, new, a); the file's row holds 100 x anchor + channel."""
    theirs = torch.tensor([100.0 * anchor + row for anchor in range(3) for row in range(8)])
    own = -torch.ones(24, *tail)
    rows = [(0, 2), (2, 0)]
    merged = carry_rows(own, theirs.view(24, *[1 for _ in tail]).expand(24, *tail), rows)
    expected = []
    for start in (0, 100, 200):
        expected += [start + row for row in range(5)] + [start + 7, -1, start + 5]
    assert merged.shape == own.shape
    assert merged.reshape(24, -1).unique(dim=1).flatten().tolist() == expected
    assert (own == -1).all()


def test_rows_of_half_precision_become_the_networks_own_type():
    merged = carry_rows(torch.zeros(18), torch.ones(21).half(), [(0, 1)])
    assert (merged.dtype, merged.tolist()) == (torch.float32, [1.0] * 18)


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([(1, 0), (0, 1)], "2 of 2 classes carried over: cat, dog"),
        ([(1, 0)], "1 of 2 classes carried over: dog; new: cat"),
    ],
)
def test_what_was_carried_over_and_what_is_new_is_said(rows, text):
    assert describe_rows(rows, ["cat", "dog"]) == f"boxes, objectness and {text}"


def loaded_between(tmp_path, in_file, wanted):
    """A network, what it was before, and the one that it was loaded from, and the report."""
    donor, model = small_model(len(in_file)), small_model(len(wanted), seed=1)
    for network in (donor, model):
        for name, tensor in network.state_dict().items():
            if ".output.weight" in name:
                torch.nn.init.normal_(tensor)
    before = copy_of(model)
    torch.save(donor.state_dict(), tmp_path / "w.pt")
    report = load_weights(model, tmp_path / "w.pt", class_names=wanted, file_class_names=in_file)
    return model, before, donor, report


def test_a_network_of_other_classes_detects_the_shared_ones_as_its_source_does(tmp_path):
    model, before, donor, report = loaded_between(tmp_path, ["a", "b", "c"], ["c", "new", "a"])
    new = small_model(3)
    new.load_state_dict({**donor.state_dict(), **{n: before[n] for n in before if "output" in n}})
    image = torch.rand(1, 3, 64, 96)
    networks = [network.eval() for network in (model, donor, new)]
    for ours, theirs, fresh in zip(*(network(image) for network in networks), strict=True):
        ours, theirs, fresh = (x.view(3, 8, *x.shape[2:]) for x in (ours, theirs, fresh))
        torch.testing.assert_close(ours[:, :6], theirs[:, [0, 1, 2, 3, 4, 7]])
        torch.testing.assert_close(ours[:, 7], theirs[:, 5])
        torch.testing.assert_close(ours[:, 6], fresh[:, 6])
    outputs = {name for name in before if ".output." in name}
    assert set(report.partly) == outputs
    assert set(report.loaded) == set(before) - outputs
    assert (report.skipped, report.heads_loaded) == ({}, True)


def test_the_report_names_carried_and_new_classes(tmp_path):
    _, before, _, report = loaded_between(tmp_path, ["a", "b"], ["b", "x"])
    first, second = str(report).splitlines()
    assert first.endswith(f": {len(before) - 6} tensors loaded, 6 in part, 0 skipped")
    assert second.endswith("2 more: boxes, objectness and 1 of 2 classes carried over: b; new: x")


def test_outputs_stay_as_they_are_where_no_class_is_shared(tmp_path):
    model, before, _, report = loaded_between(tmp_path, ["a", "b"], ["x", "y"])
    assert set(report.skipped.values()) == {"output for other classes: a, b in the file, x, y here"}
    assert (report.partly, report.heads_loaded) == ({}, False)
    assert same(model, before, report.skipped)


def test_names_of_another_count_than_the_files_outputs_are_refused(tmp_path):
    torch.save(small_model(3).state_dict(), tmp_path / "w.pt")
    match = r"has outputs for 3 classes, but 2 names: a, b\. Give the class names"
    assert_refused(tmp_path / "w.pt", match, class_names=["a"], file_class_names=["a", "b"])


def test_names_for_a_file_that_names_other_ones_itself_are_refused(tmp_path):
    content = {"format_version": 1, "model": small_model().state_dict(), "class_names": ["a", "b"]}
    torch.save(content, tmp_path / "w.pt")
    match = "stores its own classes, a, b; b, a are other ones"
    assert_refused(tmp_path / "w.pt", match, file_class_names=["b", "a"])
    load_weights(small_model(), tmp_path / "w.pt", file_class_names=("a", "b"))


def test_a_checkpoint_whose_names_do_not_fit_its_outputs_is_refused(tmp_path):
    content = {"format_version": 1, "model": small_model().state_dict(), "class_names": ["a"]}
    torch.save(content, tmp_path / "w.pt")
    assert_refused(tmp_path / "w.pt", "has outputs for 2 classes, but 1 names", class_names=["b"])


def test_an_output_that_lacks_rows_of_its_file_is_not_carried_over(tmp_path):
    donor, model = small_model(3), small_model(2, seed=1)
    state, before = donor.state_dict(), copy_of(model)
    state["head_p4.output.bias"] = torch.ones(20)
    torch.save(state, tmp_path / "w.pt")
    names = {"class_names": ["b", "x"], "file_class_names": ["a", "b", "c"]}
    report = load_weights(model, tmp_path / "w.pt", **names)
    assert list(report.skipped) == ["head_p4.output.bias"]
    assert not report.heads_loaded
    assert same(model, before, report.skipped)
