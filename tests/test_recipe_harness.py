"""benchmarks.recipe: real trainings of two recipes, a table, and nothing done twice."""

import pytest

from benchmarks.recipe import RECIPES
from lab.plan import Plan
from lab.runs import train_command


def command(voc, save_dir, *more):
    return [
        *("-m", "benchmarks.recipe", "--recipes", "default", "fork", "--seeds", "0"),
        *("--train", f"{voc}:train", "--val", f"{voc}:val", "--test", f"{voc}:val"),
        *("--classes_path", voc / "classes.txt", "--epochs", "1", "--save_dir", save_dir),
        *("--width", "0.01", "--depth", "0.01", "--input_shape", "64", "96", *more),
    ]


def test_two_recipes_give_a_table_and_the_same_command_trains_nothing_more(
    tiny_voc, tmp_path, run_script
):
    first = run_script(*command(tiny_voc, tmp_path / "runs"))
    assert first.returncode == 0, first.stderr
    table = (tmp_path / "runs" / "results.md").read_text()
    assert table.count("\n| default | - | 1 |") == 1
    assert table.count("\n| fork | --recipe fork | 1 |") == 1
    assert "minutes" in table
    assert (tmp_path / "runs" / "learning_curves.png").stat().st_size > 1000
    config = (tmp_path / "runs" / "runs" / "fork" / "seed-0" / "config.json").read_text()
    assert '"recipe": "fork"' in config
    again = run_script(*command(tiny_voc, tmp_path / "runs"))
    assert again.returncode == 0
    assert "2 runs of 1 epochs, 2 finished" in again.stdout
    assert table.split("\n\n![")[0] in again.stdout


def test_an_unknown_recipe_is_refused(run_script, tmp_path):
    done = run_script(
        "-m", "benchmarks.recipe", "--recipes", "yolov9", "--save_dir", tmp_path / "r"
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: recipe 'yolov9' is unknown. Allowed: default, fork")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_trains_with_its_own_flags(name, tmp_path):
    flags = RECIPES[name].split()
    plan = Plan((name,), (3,), "R:test", {"epochs": ["1"]}, variants={name: flags})
    assert train_command(plan.runs(tmp_path)[0], plan)[1:] == [
        *(*flags, "--seed", "3", "--save_dir", str(tmp_path / "runs" / name / "seed-3")),
        *("--epochs", "1"),
    ]
