import json

import pytest

from lab.results import Result, read_results
from lab.tables import all_tables, state
from tests.test_compare_plan import plan

FIGURES = ("AP50", "AP", "best F1", "at score", "ECE", "ms a step", "minutes")
METRICS = "epoch,step,seconds\n1,10,5\n2,20,7\n"


def finish(run, ap50, ece=0.1, classes=("a", "b")):
    """Leave what a finished run leaves of figures."""
    run.folder.mkdir(parents=True)
    run.test_folder.mkdir()
    (run.folder / "metrics.csv").write_text(METRICS)
    evaluation = {"AP50": ap50, "AP": ap50 / 2, "f1": 0.7, "conf_threshold": 0.3, "ece": ece}
    evaluation["at_checkpoint_threshold"] = {"conf_threshold": 0.25, "f1": 0.65}
    evaluation["per_class"] = dict.fromkeys(classes, ap50)
    (run.test_folder / "evaluation.json").write_text(json.dumps(evaluation))


def tables(own, save_dir):
    return all_tables(own, save_dir, read_results(own, save_dir))


def test_the_first_table_holds_what_matters_and_the_second_the_classes(tmp_path):
    own = plan(["bce", "focal"], [0, 1])
    for index, run in enumerate(own.runs(tmp_path)):
        finish(run, 0.5 + index / 100)  # bce .50 and .52, focal .51 and .53
    main, rest, difference, others = tables(own, tmp_path)
    assert main.header == ["loss", "runs", *FIGURES, "AP50 against bce", "exceeds the noise"]
    assert rest.header == ["loss", "F1 as stored", "stored score", "AP50 a", "AP50 b"]
    assert difference.header == ["loss", *FIGURES]
    assert others.header == rest.header
    bce, focal = main.rows
    assert bce[:3] == ["bce", "2 of 2", "0.510 ± 0.014"]
    assert bce[-2:] == ["reference", ""]
    assert focal[-2:] == ["+0.010\n[+0.010, +0.010]\n2 pairs", "yes"]
    assert difference.rows[0][:2] == ["focal", "+0.010\n[+0.010, +0.010]\n2 pairs: yes"]
    assert len(difference.rows) == len(others.rows) == 1


def test_every_row_is_as_long_as_its_header(tmp_path):
    for losses in (["bce"], ["bce", "focal"]):
        own = plan(losses, [0])
        for table in tables(own, tmp_path / "empty"):
            assert all(len(row) == len(table.header) for row in table.rows)
        finish(own.runs(tmp_path)[-1], 0.5)
        for table in tables(own, tmp_path):
            assert all(len(row) == len(table.header) for row in table.rows)


def test_unequal_seeds_are_counted_and_paired_where_both_are(tmp_path):
    own = plan(["bce", "focal"], [0, 1, 2])
    for run in own.runs(tmp_path):
        if run.loss == "bce" or run.seed == 2:
            finish(run, 0.5 + run.seed / 10 + (run.loss == "focal") / 100)
    main = tables(own, tmp_path)[0]
    assert [row[1] for row in main.rows] == ["3 of 3", "1 of 3"]
    assert main.rows[1][0] == "focal\nseed 0 missing\nseed 1 missing"
    assert main.rows[1][-2:] == ["+0.010\n1 pair", "unknown"]


def test_a_loss_whose_reference_has_no_run_is_shown_without_a_difference(tmp_path):
    own = plan(["bce", "focal"], [0])
    finish(own.runs(tmp_path)[1], 0.5)
    main = tables(own, tmp_path)[0]
    assert main.rows[0][:3] == ["bce\nseed 0 missing", "0 of 1", "-"]
    assert main.rows[1][-2:] == ["-", "-"]


def test_a_failed_run_says_so_and_where_its_log_is(tmp_path):
    run = plan(["focal(gamma=1)"], [3]).runs(tmp_path)[0]
    run.folder.mkdir(parents=True)
    run.failure.write_text("was killed by signal 9")
    own = plan(["focal(gamma=1)"], [3])
    log = run.log.relative_to(tmp_path)
    failed = f"seed 3 failed (was killed by signal 9), see {log}"
    assert tables(own, tmp_path)[0].rows[0][:2] == [f"focal(gamma=1)\n{failed}", "0 of 1"]
    run.failure.unlink()
    (run.folder / "metrics.csv").write_text(METRICS)
    assert tables(own, tmp_path)[0].rows[0][0] == "focal(gamma=1)\nseed 3: 2 of 3 epochs"
    (run.folder / "metrics.csv").unlink()
    run.folder.rmdir()
    finish(run, 0.5)
    run.failure.write_text("an attempt before")
    assert tables(own, tmp_path)[0].rows[0][0] == "focal(gamma=1)"


def test_an_error_of_calibration_without_boxes_is_no_number(tmp_path):
    own = plan(["bce", "focal"], [0, 1])
    for run in own.runs(tmp_path):
        finish(run, 0.5, ece=None if run.loss == "focal" or run.seed else 0.1)
    main = tables(own, tmp_path)[0]
    place = main.header.index("ECE")
    assert [row[place] for row in main.rows] == ["0.100\n1 of 2 runs", "-"]
    assert not any(
        "nan" in cell for table in tables(own, tmp_path) for row in table.rows for cell in row
    )


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_that_is_finished_needs_no_word(tmp_path, finished):
    own = plan(["bce"], [0])
    result = Result(own.runs(tmp_path)[0], finished, "", {}, [], None, None)
    assert state(result, own, tmp_path) == ("" if finished else "seed 0 missing")
