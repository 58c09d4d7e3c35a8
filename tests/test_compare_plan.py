from dataclasses import replace
from pathlib import Path

import pytest

from lab.plan import (
    Plan,
    as_arguments,
    as_spelled,
    check_distinct,
    join_plans,
    join_versions,
    normal_spec,
    parse_flags,
    read_plan,
    slug,
    write_plan,
)
from utils.errors import UserError

MINE = "my_losses:Mine(scale=1)"


def plan(losses=("bce", "focal"), seeds=(0, 1), **flags):
    typed = {"train": ["R:train"], "val": ["R:val"], "epochs": ["3"], **flags}
    return Plan(losses=tuple(losses), seeds=tuple(seeds), test="R:test", flags=typed)


@pytest.mark.parametrize(
    ("typed", "flags"),
    [
        ([], {}),
        (["--lr", "1"], {"lr": ["1"]}),
        (["--lr=1", "--cache"], {"lr": ["1"], "cache": []}),
        (["--classes-path", "a b", "--no-ema"], {"classes_path": ["a b"], "no_ema": []}),
        (["--balance", "-1", "2", "3"], {"balance": ["-1", "2", "3"]}),
        (["--lr", "1", "--lr", "2"], {"lr": ["2"]}),
    ],
)
def test_flags_for_training_are_taken_as_typed(typed, flags):
    assert parse_flags(typed) == flags
    assert parse_flags(as_arguments(flags)) == flags


@pytest.mark.parametrize(
    "flag", ["conf_loss", "focal-loss", "no-focal-loss", "focal_gamma", "seed", "resume"]
)
def test_flags_that_the_plan_sets_itself_are_refused(flag):
    with pytest.raises(UserError, match=r"--losses.*--seeds"):
        parse_flags(["--lr", "1", f"--{flag}", "1"])


def test_a_value_without_a_flag_is_an_error():
    with pytest.raises(UserError, match="'bce' belongs to no flag"):
        parse_flags(["bce", "--lr", "1"])


def test_a_loss_has_a_readable_folder_of_its_own():
    losses = ["bce", "focal(gamma=1)", "focal(gamma=10)", "focal(gamma= 1)", "../x:Y(k='/a b')"]
    slugs = [slug(loss) for loss in [*losses, "m:" + "L" * 300]]
    assert slugs[0] == "bce"
    assert slugs[1].startswith("focal-gamma-1-")
    assert len(set(slugs)) == len(slugs)
    for name in slugs:
        assert Path(name).name == name
        assert len(name) <= 60
        assert not name.startswith(".")
        assert set(name) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._")


@pytest.mark.parametrize(
    ("losses", "seeds", "said"),
    [
        (["bce", "focal", "bce"], [0], "'bce' twice"),
        (["focal(gamma=1)", "focal( gamma = 1 )"], [0], "twice"),
        (["focal(alpha=1, gamma=2)", "focal(gamma=2,alpha=1)"], [0], "twice"),
        (["bce"], [0, 1, 0], "0 twice"),
        ([], [0], "--losses is empty"),
        (["bce"], [], "--seeds is empty"),
        (["bce"], [0, -1], "--seeds -1"),
    ],
)
def test_losses_and_seeds_that_make_no_plan_are_errors(losses, seeds, said):
    with pytest.raises(UserError, match=said):
        check_distinct(plan(losses, seeds))


def test_all_losses_of_a_seed_come_before_the_next_seed(tmp_path):
    runs = plan(["bce", "focal"], [5, 3]).runs(tmp_path)
    order = [(run.loss, run.seed) for run in runs]
    assert order == [("bce", 5), ("focal", 5), ("bce", 3), ("focal", 3)]
    assert runs[0].folder == tmp_path / "runs" / "bce" / "seed-5"
    assert runs[0].log == tmp_path / "runs" / "bce" / "seed-5.log"
    assert runs[0].test_folder == tmp_path / "runs" / "bce" / "seed-5-test"


def test_a_plan_comes_back_from_its_file(tmp_path):
    assert read_plan(tmp_path) is None
    written = plan(["bce", MINE], input_shape=["64", "96"])
    write_plan(tmp_path, written)
    assert read_plan(tmp_path) == written
    (tmp_path / "plan.json").write_text('{"losses": ["bce"], "seeds": [0], "colour": 3}')
    with pytest.raises(UserError, match="no plan of this version"):
        read_plan(tmp_path)


def test_the_plan_s_command_gives_the_plan_again(tmp_path):
    written = plan(["bce", MINE], [3], classes_path=["a b"], cache=[])
    text = written.command(tmp_path)
    assert f"--losses bce '{MINE}' --seeds 3 --test R:test --train R:train" in text
    assert "--classes_path 'a b' --cache --save_dir" in text


def test_a_plan_grows_by_losses_and_seeds_and_changes_in_nothing_else(tmp_path):
    old = plan(["bce", "focal"], [0, 1], lr=["1"])
    joined = join_plans(old, plan(["poly1", "bce"], [2, 0], lr=["1"]), tmp_path)
    assert joined.losses == ("bce", "focal", "poly1")
    assert joined.seeds == (0, 1, 2)
    for other, said in [
        (plan(lr=["2"]), "--lr 1, now there is --lr 2"),
        (plan(), "--lr 1, now there is no --lr"),
        (plan(lr=["1"], cache=[]), "no --cache, now there is --cache"),
        (plan(lr=["1"], train=["S:train"]), "--train R:train, now there is --train S:train"),
    ]:
        with pytest.raises(UserError, match=said):
            join_plans(old, other, tmp_path)


@pytest.mark.parametrize(
    ("spelled", "normal"),
    [
        ("bce", "bce"),
        (" focal ( ) ", "focal"),
        ("focal( gamma = 1 ,alpha=.5 )", "focal(alpha=0.5, gamma=1)"),
        ('focal(normalizer="mean")', "focal(normalizer='mean')"),
        ("mine : Loss(k='a b')", "mine:Loss(k='a b')"),
        ("focal(1)", "focal(1)"),
        ("focal(gamma=", "focal(gamma="),
        ("focal(a)+(b)", "focal(a)+(b)"),
        ("", ""),
    ],
)
def test_spellings_of_a_loss_that_mean_the_same_have_one_normal_form(spelled, normal):
    assert normal_spec(spelled) == normal
    assert normal_spec(normal) == normal


def test_a_plan_keeps_its_own_spelling_of_a_loss(tmp_path):
    """The runs' folders hang on it."""
    old = plan(["bce", "focal( gamma=1 )"])
    new = plan(["focal(gamma = 1)", "poly1"])
    assert as_spelled(new.losses, old.losses) == ("focal( gamma=1 )", "poly1")
    assert join_plans(old, new, tmp_path).losses == ("bce", "focal( gamma=1 )", "poly1")


def test_all_versions_that_had_a_part_are_named_once():
    assert join_versions("v1", "v1") == "v1"
    assert join_versions("", "") == ""
    assert join_versions("v1", "v2") == "v1 and v2"
    assert join_versions("v1 and v2", "v1") == "v1 and v2"
    assert join_versions("v1 and v2", "v10") == "v1 and v2 and v10"
    assert join_versions("", "v1") == "unknown and v1"
    assert join_versions("unknown and v1", "") == "unknown and v1"


def test_a_joined_plan_says_both_versions(tmp_path):
    old, new = (replace(plan(), version=version) for version in ("v1", "v2-dirty"))
    assert join_plans(old, new, tmp_path).version == "v1 and v2-dirty"
