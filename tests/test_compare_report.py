import base64
import csv
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
import torch

from engine.checkpoint import save_checkpoint
from nets.yolo import YoloV4
from tests.factory import add_picture, write_split
from tools.compare_losses import report
from tools.compare_plan import Plan, write_plan
from tools.compare_results import (
    STEP_TIME,
    T_QUANTILES,
    Difference,
    difference,
    difference_text,
    read_results,
    spread,
    spread_text,
    step_time,
)
from utils.errors import UserError

CLASSES = ("red", "<b>&'green'|x")
LOSSES = ("bce", 'mine:Loss(kind="<i>$x$")', "focal")
AP50 = {0: (0.50, 0.60, 0.40), 1: (0.52, 0.64, 0.55)}  # seed -> a value for each loss
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
VOID = {"meta", "img"}


def evaluation(ap50):
    return {
        "AP50": ap50,
        "AP": ap50 / 2,
        "f1": 0.7,
        "conf_threshold": 0.3,
        "ece": None,  # nan in JSON
        "at_checkpoint_threshold": {"conf_threshold": 0.25, "f1": 0.65},
        "per_class": {CLASSES[0]: 0.5, CLASSES[1]: None},
    }


def cells(hardness):
    loss = [1.0, hardness, hardness**2]
    groups = {name: {"cells": [900, 90, 10], "loss": loss} for name in ("positive", "negative")}
    return {"difficulty": [0.1, 0.5, 0.9], **groups}


def metrics(ap50):
    shares = "conf_grad_positive,conf_grad_easy,conf_grad_hard"
    lines = [f"epoch,step,seconds,val_ap50,{shares}"]
    lines += [f"1,10,5,{ap50 / 2},0.2,0.7,0.1", "2,20,7,,0.3,0.6,0.1", f"3,30,6,{ap50},.4,.5,.1"]
    return "\n".join(lines) + "\n4,4"  # a crash has cut the last one off


def checkpoint():
    """What an untrained network of the smallest size would have saved."""
    torch.manual_seed(0)
    model = YoloV4(len(CLASSES), width=0.01, depth=0.01)
    anchors = [[12, 16], [19, 36], [40, 28], [36, 75], [76, 55], [72, 146]]
    return {
        "model": model.state_dict(),
        "class_names": list(CLASSES),
        "anchors": [*anchors, [142, 110], [192, 243], [459, 401]],
        "input_shape": [64, 64],
        "width": 0.01,
        "depth": 0.01,
        "scale_xy": [1.2, 1.1, 1.05],
        "conf_loss": "bce",
        "conf_threshold": 0.001,
        "config": {},
        "epoch": 3,
        "metrics": {},
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A test split of six pictures of different sizes, one without objects."""
    root = tmp_path_factory.mktemp("voc") / "Tree"
    names = [f"{number}" for number in range(6)]
    for number, name in enumerate(names):
        image = np.full((300 + 40 * number, 500, 3), 60 + 30 * number, np.uint8)
        boxes = [(CLASSES[1], (50, 60, 200, 180))] if number else []
        add_picture(root, name, image, boxes, ".jpg")
    write_split(root, "test", names)
    (root / "classes.txt").write_text("\n".join(CLASSES), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def lab(tree, tmp_path_factory):
    """The folder of a comparison: the last of six runs has not begun; with its reports."""
    save_dir = tmp_path_factory.mktemp("lab")
    flags = {"train": ["R:train"], "val": ["R:val"], "epochs": ["3"]}
    plan = Plan(losses=LOSSES, seeds=(0, 1), test=f"{tree}:test", flags=flags, version="v1-2")
    write_plan(save_dir, plan)
    config = {"classes_path": str(tree / "classes.txt"), "skip_bad": False, "device": "cpu"}
    best = checkpoint()
    for run in plan.runs(save_dir)[:-1]:
        place = LOSSES.index(run.loss)
        ap50 = AP50[run.seed][place]
        run.folder.mkdir(parents=True)
        run.test_folder.mkdir()
        (run.folder / "metrics.csv").write_text(metrics(ap50))
        (run.folder / "conf_cells.json").write_text(json.dumps(cells(2 + place)))
        (run.folder / "config.json").write_text(json.dumps(config))
        (run.test_folder / "evaluation.json").write_text(json.dumps(evaluation(ap50)))
        save_checkpoint(run.folder / "best.pt", best)
    report(save_dir)
    return save_dir, plan


def test_student_quantiles_are_those_of_the_density():
    def upper_tail(quantile, degrees):  # 1 - CDF by the trapezoid rule on x = tan(u)
        u = np.linspace(math.atan(quantile), math.pi / 2 - 1e-9, 200_001)
        x = np.tan(u)
        scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
        density = math.exp(scale) / math.sqrt(degrees * math.pi)
        values = density * (1 + x**2 / degrees) ** (-(degrees + 1) / 2) * (1 + x**2)
        return np.sum((values[1:] + values[:-1]) / 2 * np.diff(u))

    assert len(T_QUANTILES) == 30
    for degrees, quantile in enumerate(T_QUANTILES, start=1):
        assert upper_tail(quantile, degrees) == pytest.approx(0.025, abs=4e-5), degrees


def test_mean_and_spread_equal_a_hand_calculation():
    assert spread([]) is None
    assert spread([0.5]).mean == 0.5
    assert math.isnan(spread([0.5]).deviation)
    assert spread([1.0, 2.0, 4.5]) == pytest.approx((2.5, math.sqrt((1.5**2 + 0.5**2 + 2**2) / 2)))


def test_the_paired_difference_equals_a_hand_calculation():
    first, own = {0: 0.50, 1: 0.60, 2: 0.70}, {2: 0.73, 0: 0.51, 1: 0.62, 7: 0.99}
    # Differences .03, .01, .02: mean .02, deviation .01, t(2) = 4.303: .02 +- 4.303 * .01 / sqrt 3
    found = difference(own, first)
    margin = 4.303 * 0.01 / math.sqrt(3)
    assert found == pytest.approx((0.02, 0.02 - margin, 0.02 + margin))
    assert found.verdict == "no"


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (Difference(0.2, 0.1, 0.3), "yes"),
        (Difference(-0.2, -0.3, -0.1), "yes"),
        (Difference(0.0, 0.0, 0.0), "no"),
        (Difference(0.1, -0.1, 0.3), "no"),
        (Difference(0.1, math.nan, math.nan), "one seed: unknown"),
    ],
)
def test_a_difference_exceeds_the_noise_only_if_zero_lies_outside(found, verdict):
    assert found.verdict == verdict


def test_one_common_seed_says_nothing_and_none_is_no_difference():
    assert difference({0: 0.7}, {0: 0.5, 1: 0.6}).verdict == "one seed: unknown"
    assert difference({0: 0.7}, {1: 0.6}) is None
    assert difference({}, {}) is None
    assert difference_text(None, "AP50") == "-"


def test_beyond_thirty_pairs_the_interval_is_that_of_thirty():
    own = {seed: float(seed % 2) for seed in range(100)}
    found = difference(own, dict.fromkeys(own, 0.0))
    deviation = math.sqrt(100 * 0.25 / 99)
    assert found.high - found.mean == pytest.approx(2.042 * deviation / 10)


def test_texts_have_the_digits_that_are_worth_it():
    assert spread_text(spread([0.5, 0.6]), "AP50") == "0.550 ± 0.071"
    assert spread_text(spread([0.5]), "AP50") == "0.500"
    assert spread_text(None, "AP50") == "-"
    assert spread_text(spread([582.84]), STEP_TIME) == "582.8"
    assert difference_text(Difference(-0.2, -0.3, -0.1), "AP") == "-0.200 [-0.300, -0.100] yes"
    assert difference_text(Difference(0.1, math.nan, math.nan), "AP") == "+0.100 one seed: unknown"


def test_the_step_time_is_the_median_over_epochs():
    rows = [(4, 2), (8, 6), (12, 2.8)]  # 500, 1500 and 700 ms a step
    assert step_time([{"step": str(s), "seconds": str(t)} for s, t in rows]) == pytest.approx(700)
    assert math.isnan(step_time([]))


def test_results_hold_what_the_runs_left_and_only_that(lab):
    save_dir, plan = lab
    results = read_results(plan, save_dir)
    assert [result.finished for result in results] == [True] * 5 + [False]
    assert dict(results[0].figures) == pytest.approx(
        {
            "AP50": 0.5,
            "AP": 0.25,
            "best F1": 0.7,
            "at score": 0.3,
            "F1 as stored": 0.65,
            "stored score": 0.25,
            "AP50 red": 0.5,
            STEP_TIME: 600,
        }
    )
    assert [row["epoch"] for row in results[0].rows] == ["1", "2", "3"]
    assert (results[5].figures, results[5].rows, results[5].cells) == ({}, [], None)


def test_results_csv_has_a_line_a_run(lab):
    with open(lab[0] / "results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    expected = [(loss, seed) for seed in "01" for loss in LOSSES]
    assert [(row["loss"], row["seed"]) for row in rows] == expected
    assert [row["AP50"] for row in rows] == ["0.5", "0.6", "0.4", "0.52", "0.64", ""]
    assert [row["finished"] for row in rows] == ["1"] * 5 + ["0"]


def test_results_md_holds_both_tables_and_names_its_pictures(lab):
    text = (lab[0] / "results.md").read_text(encoding="utf-8")
    assert "5 of 6 runs are finished" in text
    assert "version v1-2" in text
    assert "| bce | 2 | 0.510 ± 0.014 | 0.255 ± 0.007 |" in text
    # .10 and .12: mean .11, deviation .01414, t(1) = 12.706
    assert f"| {LOSSES[1]} | +0.110 [-0.017, +0.237] no |" in text
    assert "| focal | -0.100 one seed: unknown |" in text
    for name in re.findall(r"!\[.*\]\((.*)\)", text):
        assert cv2.imread(str(lab[0] / name)) is not None
    assert len(re.findall(r"!\[.*\]\((.*)\)", text)) == 3


class Page(HTMLParser):
    """Collects images and other references, and checks that tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.references, self.tags = [], [], [], set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for key, value in attributes:
            if tag == "img" and key == "src":
                self.images.append(value)
            elif key in ("src", "href", "srcset", "action", "background"):
                self.references.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_but_itself(lab):
    text = (lab[0] / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.references == []
    assert not re.search(r"https?://|url\(|@import", text)
    assert "script" not in page.tags
    assert len(page.images) == 3 + 4 * (1 + len(LOSSES))  # figures; truth and three losses
    for source in page.images:
        data = base64.b64decode(re.fullmatch(r"data:image/(?:png|jpeg);base64,(.*)", source)[1])
        assert cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) is not None
    assert len(text) < 2_000_000


def test_what_users_name_is_text_and_never_markup(lab):
    text = (lab[0] / "report.html").read_text(encoding="utf-8")
    assert not {"b", "i"} & Page(text).tags
    assert "mine:Loss(kind=&quot;&lt;i&gt;$x$&quot;)" in text


def test_a_plan_without_any_run_has_its_reports_too(tmp_path):
    flags = {"train": ["R:train"], "val": ["R:val"], "epochs": ["3"]}
    write_plan(tmp_path, Plan(losses=("bce",), seeds=(0,), test="R:test", flags=flags))
    report(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert Page(text).images == []
    assert "0 of 1 runs are finished" in text


def test_a_folder_that_is_no_comparison_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"plan\.json"):
        report(tmp_path)


def test_data_that_has_moved_since_costs_the_pictures_only(lab, tmp_path):
    save_dir = tmp_path / "lab"
    shutil.copytree(lab[0], save_dir)
    for path in save_dir.glob("runs/*/*/config.json"):
        path.write_text(json.dumps({"classes_path": "gone.txt", "skip_bad": False}))
    report(save_dir)
    text = (save_dir / "report.html").read_text(encoding="utf-8")
    assert len(Page(text).images) == 3
    assert "No pictures: " in text
    assert "gone.txt" in text


def test_a_browser_without_network_shows_the_page(lab, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium or Chrome on PATH")
    picture = tmp_path / "page.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--disable-quic", "--proxy-server=127.0.0.1:9", f"--user-data-dir={tmp_path / 'u'}"]
    command += [f"--screenshot={picture}", "--window-size=1000,2600"]
    page = (lab[0] / "report.html").as_uri()
    subprocess.run([*command, page], check=True, capture_output=True, timeout=120)
    image = cv2.imread(str(picture))
    assert image.shape[:2] == (2600, 1000)
    bands = np.array_split(image.reshape(2600, -1).std(axis=1) > 3, 8)
    assert all(band.mean() > 0.1 for band in bands)  # text or a picture in each part of the page
