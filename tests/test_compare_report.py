import base64
import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
import torch

from lab.compare import report
from lab.plan import Plan, write_plan
from lab.report import html_cell
from lab.results import STEP_TIME, read_results
from nets.yolo import YoloV4
from tests.factory import add_image, write_split
from utils.errors import UserError
from weights.checkpoint import save_checkpoint

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
    """A test split of six images of different sizes, one without objects."""
    root = tmp_path_factory.mktemp("voc") / "Tree"
    names = [f"{number}" for number in range(6)]
    for number, name in enumerate(names):
        image = np.full((300 + 40 * number, 500, 3), 60 + 30 * number, np.uint8)
        boxes = [(CLASSES[1], (50, 60, 200, 180))] if number else []
        add_image(root, name, image, boxes, ".jpg")
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
            "minutes": 18 / 60,
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


def test_results_md_holds_its_tables_and_names_its_images(lab):
    text = (lab[0] / "results.md").read_text(encoding="utf-8")
    assert "5 of 6 runs are finished" in text
    assert "version v1-2" in text
    assert "| bce | 2 of 2 | 0.510 ± 0.014 | 0.255 ± 0.007 |" in text
    # .10 and .12: mean .11, deviation .01414, t(1) = 12.706
    ours = LOSSES[1].replace("<", "&lt;").replace(">", "&gt;")
    assert f"| {ours} | +0.110<br>[-0.017, +0.237]<br>2 pairs: no |" in text
    assert "| focal | -0.100<br>1 pair: unknown |" in text
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


def test_cells_of_the_page_are_narrow_and_what_exceeds_the_noise_is_bold():
    assert html_cell("0.510 ± 0.014") == '<td>0.510<span class="small">± 0.014</span></td>'
    assert html_cell("a<b\nseed 0 missing").startswith('<td>a&lt;b<span class="small">seed 0')
    bold = [html_cell(text).startswith('<td class="yes">') for text in ("yes", "+1\n2 pairs: yes")]
    assert bold == [True, True]
    assert "class" not in html_cell("no") + html_cell("yesterday")


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


def test_a_checkpoint_that_has_gone_costs_its_own_row_only(lab, tmp_path):
    save_dir = tmp_path / "lab"
    shutil.copytree(lab[0], save_dir)
    (save_dir / "runs" / "bce" / "seed-0" / "best.pt").unlink()
    report(save_dir)
    text = (save_dir / "report.html").read_text(encoding="utf-8")
    assert len(Page(text).images) == 3 + 4 * len(LOSSES)
    assert re.search(r"<h3>bce, seed 0</h3>\n<p>[^<]*best\.pt", text)


def test_seeds_of_a_loss_that_were_not_trained_alike_are_told(lab, tmp_path, capsys):
    save_dir = tmp_path / "lab"
    shutil.copytree(lab[0], save_dir, ignore=shutil.ignore_patterns("*.pt"))
    for seed, gain in ((0, 0.1), (1, 1.0)):
        path = save_dir / "runs" / "bce" / f"seed-{seed}" / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "conf_settings": {"gain": gain, "prior_pi": None}}))
    report(save_dir)
    said = "Settings differ between the seeds of bce: gain 0.1 (seed 0), 1.0 (seed 1)."
    assert f"note: {said}" in capsys.readouterr().out
    for name in ("results.md", "report.html"):
        assert (save_dir / name).read_text(encoding="utf-8").count(said) == 1
    assert "Settings differ" not in (lab[0] / "results.md").read_text(encoding="utf-8")


def test_data_that_has_moved_since_costs_the_images_only(lab, tmp_path):
    save_dir = tmp_path / "lab"
    shutil.copytree(lab[0], save_dir)
    for path in save_dir.glob("runs/*/*/config.json"):
        path.write_text(json.dumps({"classes_path": "gone.txt", "skip_bad": False}))
    report(save_dir)
    text = (save_dir / "report.html").read_text(encoding="utf-8")
    assert len(Page(text).images) == 3
    assert "No images: " in text
    assert "gone.txt" in text


def test_a_browser_without_network_shows_the_page(lab, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium or Chrome on PATH")
    screenshot = tmp_path / "page.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--disable-quic", "--proxy-server=127.0.0.1:9", f"--user-data-dir={tmp_path / 'u'}"]
    command += [f"--screenshot={screenshot}", "--window-size=1000,2600"]
    page = (lab[0] / "report.html").as_uri()
    subprocess.run([*command, page], check=True, capture_output=True, timeout=120)
    image = cv2.imread(str(screenshot))
    assert image.shape[:2] == (2600, 1000)
    bands = np.array_split(image.reshape(2600, -1).std(axis=1) > 3, 8)
    assert all(band.mean() > 0.1 for band in bands)  # text or an image in each part of the page
