import sys

import pytest

from lab.runs import Laboratory
from lab.sources import check_source, record_source, settings_difference, source_hash
from losses.conf import build_conf_loss
from tests.test_compare_plan import plan
from utils.errors import UserError

MINE = "edited_losses:Mine(scale=1)"
FORMULA = """
from torch import nn
from torch.nn import functional as F

class Mine(nn.Module):
    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = scale

    def forward(self, logits, targets):
        bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return self.scale * bce
"""


@pytest.fixture
def file(tmp_path_factory, monkeypatch):
    """edited_losses.py, imported from the working directory as the tool does."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "edited_losses.py").write_text(FORMULA)
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, "edited_losses", raising=False)
    build_conf_loss(MINE)
    return folder / "edited_losses.py"


def has_learnt(run):
    run.folder.mkdir(parents=True)
    (run.folder / "last.pt").write_bytes(b"")


def test_a_file_s_hash_follows_its_content_and_registered_losses_have_none(file):
    before = source_hash(MINE)
    assert source_hash("edited_losses : Mine") == before
    file.write_text(FORMULA.replace("scale *", "2 *"))
    assert source_hash(MINE) != before
    file.write_text(FORMULA)
    assert source_hash(MINE) == before
    assert len(before) == 64
    assert source_hash("bce") == source_hash("focal(gamma=1)") == source_hash("") == ""
    file.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        source_hash(MINE)


def test_runs_of_an_edited_formula_are_not_mixed_with_older_ones(file, tmp_path):
    both = plan(["bce", MINE], [0])
    bce, mine = both.runs(tmp_path)
    for run in (bce, mine):
        record_source(run, source_hash(run.loss))
        has_learnt(run)
    Laboratory(both, tmp_path, jobs=1)
    file.write_text(FORMULA + "# another one\n")
    with pytest.raises(UserError, match="has changed since") as error:
        Laboratory(both, tmp_path, jobs=1)
    assert f"delete {mine.folder.parent}" in str(error.value)
    Laboratory(plan(["bce"], [0]), tmp_path, jobs=1)  # its runs do not depend on the file


def test_a_finished_run_counts_even_without_its_checkpoints(file, tmp_path):
    run = plan([MINE], [0]).runs(tmp_path)[0]
    run.test_folder.mkdir(parents=True)
    (run.test_folder / "evaluation.json").write_text("{}")
    with pytest.raises(UserError, match="has changed since"):  # nothing recorded
        check_source(run, source_hash(MINE))


def test_a_run_that_begins_anew_may_have_a_new_formula(file, tmp_path):
    run = plan([MINE], [0]).runs(tmp_path)[0]
    record_source(run, "of a formula that raised in the first step")
    run.folder.mkdir()
    check_source(run, source_hash(MINE))
    (run.folder / "last.pt").touch()  # now there is something to go on with
    with pytest.raises(UserError, match="has changed since"):
        check_source(run, source_hash(MINE))


def test_an_edit_while_the_comparison_runs_stops_it(file, tmp_path):
    laboratory = Laboratory(plan([MINE], [0]), tmp_path, jobs=1)
    file.write_text(FORMULA + "# another one\n")
    with pytest.raises(UserError, match="has changed while"):
        laboratory.work()
    assert not (tmp_path / "runs").exists()


def test_only_settings_that_differ_are_told():
    old, new = {"gain": 0.1, "prior_pi": None}, {"gain": 1.0, "prior_pi": None}
    assert settings_difference({}) == ""
    assert settings_difference({"seed 0": old}) == ""
    assert settings_difference({"seed 0": old, "seed 1": dict(old)}) == ""
    assert settings_difference({"seed 0": None, "seed 1": None}) == ""
    assert settings_difference({"seed 0": old, "seed 1": new}) == "gain 0.1 (seed 0), 1.0 (seed 1)"
    assert settings_difference({"a": old, "b": None}) == "not recorded (b)"
    later = {**new, "prior_pi": 0.01}
    assert settings_difference({"a": old, "b": later, "c": None}) == (
        "gain 0.1 (a), 1.0 (b); prior_pi None (a), 0.01 (b); not recorded (c)"
    )
