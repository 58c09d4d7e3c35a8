import re
from itertools import pairwise

import pytest

from tests.weight_files import ANCHORS, SMALL, darknet_layers, sources, structure
from utils.errors import UserError
from weights.darknet_cfg import Cfg, read_cfg, write_cfg

YOLOV4 = Cfg(80, ANCHORS, (608, 416), (1.2, 1.1, 1.05))
# The author's own spelling: comments, blanks around =, routes by absolute index, what only
# training needs, and of size and stride only what is no default.
NET = """
[net]
batch=64
# Training
#width=512
width = 416
height=608   # of the input
channels=3
; cut
mosaic=1
"""
YOLO = """
[yolo]
mask = {mask}
anchors = 12, 16, 19, 36, 40, 28, 36, 75, 76, 55, 72, 146, 142, 110, 192, 243, 459, 401
classes={classes}
num=9
scale_x_y = {scale}
nms_kind=greedynms
"""


def cfg_of_the_list(classes=80):
    """A .cfg made from darknet's list of layers, not by the code under test."""
    text, yolos = NET, iter([("0,1,2", 1.2), ("3,4,5", 1.1), ("6, 7, 8", 1.05)])
    for layer in darknet_layers():
        kind, filters = layer["type"], layer["filters"]
        if kind == "yolo":
            mask, scale = next(yolos)
            text += YOLO.format(mask=mask, classes=classes, scale=scale)
            continue
        text += f"\n[{kind}]\n### {kind} ###\n"
        text += f"layers = {', '.join(layer['from'].split())}\n" if kind == "route" else ""
        text += "from=-3\nactivation=linear\n" if kind == "shortcut" else ""
        text += f"filters={3 * (5 + classes) if filters == '255' else filters}\n" if filters else ""
        options = ("size", "stride", "batch_normalize", "activation")
        text += "".join(f"{key}={layer[key]}\n" for key in options if layer[key] not in ("", "0"))
    return text


def sections_of(text):
    """[(kind, {key: value})], read in the plainest way."""
    blocks = re.findall(r"^\[(\w+)\]\n([^[]*)", text, flags=re.MULTILINE)
    return [(kind, dict(re.findall(r"(\w+)=(.*)", body))) for kind, body in blocks]


def write(path, text):
    path.write_text(text)
    return path


def test_a_written_cfg_is_darknets_list_layer_by_layer():
    (net, options), *layers = sections_of(write_cfg(structure(), YOLOV4))
    assert (net, options["width"], options["height"]) == ("net", "416", "608")
    assert len(layers) == 162
    for index, (expected, (kind, found)) in enumerate(zip(darknet_layers(), layers, strict=True)):
        assert kind == expected["type"], index
        for key in ("filters", "size", "stride", "activation"):
            assert found.get(key) == expected[key] or not expected[key], (index, key)
        if kind == "convolutional":
            assert found.get("batch_normalize", "0") == expected["batch_normalize"], index
            assert found["pad"] == "1", index
        if kind in ("route", "shortcut"):
            given = {"from": found.get("layers", found.get("from")).replace(",", " ")}
            assert sources(index, given) == sources(index, expected), index


def test_the_yolo_layers_hold_classes_anchors_masks_and_reach():
    cfg = Cfg(3, ((10.5, 13), *ANCHORS[1:]), (416, 416), (1.0, 1.5, 2.0))
    sections = sections_of(write_cfg(structure(3), cfg))
    outputs = [options for (_, options), (after, _) in pairwise(sections) if after == "yolo"]
    assert [options["filters"] for options in outputs] == ["24", "24", "24"]
    yolos = [options for kind, options in sections if kind == "yolo"]
    levels = zip(yolos, ("0,1,2", "3,4,5", "6,7,8"), ("1.0", "1.5", "2.0"), strict=True)
    anchors = "10.5,13,19,36,40,28,36,75,76,55,72,146,142,110,192,243,459,401"
    for yolo, mask, scale in levels:
        assert yolo["anchors"] == anchors
        assert (yolo["mask"], yolo["num"], yolo["classes"]) == (mask, "9", "3")
        assert yolo["scale_x_y"] == scale


@pytest.mark.parametrize(
    ("classes", "batches", "steps"),
    [(1, "6000", "4800,5400"), (3, "6000", "4800,5400"), (80, "160000", "128000,144000")],
)
def test_training_in_darknet_is_as_long_as_its_manual_says(classes, batches, steps):
    cfg = Cfg(classes, ANCHORS, (416, 416), (1.2, 1.1, 1.05))
    options = sections_of(write_cfg(structure(classes, **SMALL), cfg))[0][1]
    assert (options["max_batches"], options["steps"]) == (batches, steps)


@pytest.mark.parametrize("scaling", [{}, SMALL, {"width": 0.5, "depth": 0.4}])
def test_what_was_written_is_read_back(tmp_path, scaling):
    cfg = Cfg(7, ((1.5, 2.25), *ANCHORS[1:]), (320, 608), (1.0, 1.1, 2.0))
    path = write(tmp_path / "a.cfg", write_cfg(structure(7, **scaling), cfg))
    assert read_cfg(str(path), **scaling) == cfg


@pytest.mark.parametrize("classes", [80, 1])
def test_a_cfg_in_the_authors_spelling_is_read(tmp_path, classes):
    cfg = read_cfg(write(tmp_path / "a.cfg", cfg_of_the_list(classes)))
    assert cfg == Cfg(classes, ANCHORS, (608, 416), (1.2, 1.1, 1.05))


def test_without_scale_x_y_centres_reach_no_further_than_their_cell(tmp_path):
    text = re.sub("scale_x_y.*", "", cfg_of_the_list())
    assert read_cfg(write(tmp_path / "a.cfg", text)).scale_xy == (1.0, 1.0, 1.0)


def test_anchors_may_be_decimal_and_in_any_order(tmp_path):
    text = cfg_of_the_list().replace("12, 16, 19, 36", "19.50, 36.0, 012, 16.25")
    anchors = read_cfg(write(tmp_path / "a.cfg", text)).anchors
    assert anchors == ((19.5, 36), (12, 16.25), *ANCHORS[2:])


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("activation=mish", "activation=leaky", "layer 0 is .*activation=leaky, not .*=mish"),
        ("filters=64", "filters=48", "layer 1 is .*filters=48.*, not .*filters=64"),
        ("size=5", "size=7", "layer 108 is maxpool size=7, not maxpool size=5"),
        ("layers = 85", "layers = 84", "layer 119 is route layers=84, not route layers=85"),
        ("layers = -1, -28", "layers = -1, x", "layer 53 is route layers=-1,x, not"),
        ("filters=255", "filters=21", "layer 138 is .*filters=21.*, not .*filters=255"),
        ("scale_x_y = 1.2", "new_coords=1", "layer 139 is yolo .*new_coords=1, not yolo"),
        ("[upsample]", "[reorg]", "layer 118 is reorg stride=2, not upsample stride=2"),
        ("from=-3", "from=-4", "layer 7 is shortcut from=-4, not shortcut from=-3"),
    ],
)
def test_a_cfg_of_another_network_is_refused_at_its_first_difference(tmp_path, old, new, expected):
    text = cfg_of_the_list()
    assert old in text
    with pytest.raises(UserError, match=f"another network than YOLOv4 .*: {expected}"):
        read_cfg(write(tmp_path / "a.cfg", text.replace(old, new, 1)))


def test_heads_that_disagree_on_anchors_or_classes_are_refused(tmp_path):
    for pair in (("12, 16", "16, 12"), ("classes=80", "classes=79")):
        head, tail = cfg_of_the_list().rsplit(pair[0], 1)
        with pytest.raises(UserError, match="layer 161 is yolo"):
            read_cfg(write(tmp_path / "a.cfg", f"{head}{pair[1]}{tail}"))


def test_a_cfg_of_another_width_or_depth_is_refused(tmp_path):
    path = write(tmp_path / "a.cfg", cfg_of_the_list())
    with pytest.raises(UserError, match=r"width 0\.5, depth 1\.0: layer 0 is"):
        read_cfg(path, width=0.5)
    with pytest.raises(UserError, match=r"width 1\.0, depth 0\.5: layer 19 is"):
        read_cfg(path, depth=0.5)


def test_layers_too_few_or_too_many_are_counted(tmp_path):
    text = cfg_of_the_list() + "\n[dropout]\n"
    with pytest.raises(UserError, match="163 layers, not 162"):
        read_cfg(write(tmp_path / "a.cfg", text))


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        ("width = 416", "", "'width'"),
        ("height=608", "height=tall", "tall"),
        ("0,1,2", "6,7,8", r"masks \['6,7,8', '3,4,5', '6,7,8'\]"),
        ("mask = 0,1,2", "", "'mask'"),
        ("0,1,2", "0,1", r"masks \['0,1'"),
        ("12, 16,", "", "16 numbers in anchors"),
        ("12, 16,", "12, big,", "big"),
        ("12, 16,", "12, 0,", "anchors 12,0,19"),
        ("12, 16,", "12, nan,", "anchors 12,nan,19"),
        ("anchors =", "boxes =", "'anchors'"),
        ("classes=80", "", "'classes'"),
        ("classes=80", "classes=many", "many"),
        ("scale_x_y = 1.2", "scale_x_y = wide", "wide"),
    ],
)
def test_what_is_missing_or_no_number_is_said(tmp_path, old, new, cause):
    text = cfg_of_the_list()
    assert old in text
    with pytest.raises(
        UserError, match=f"a.cfg: no cfg of a YOLOv4: .*wrong or missing: .*{cause}"
    ):
        read_cfg(write(tmp_path / "a.cfg", text.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "no cfg of a YOLOv4"),
        (b"[net]\nwidth=416\nheight=416\n", "no cfg of a YOLOv4"),
        (b"<html>", "line 1 is neither"),
        (b"[net]\nwidth 416", r"line 2 is neither \[section\] nor key=value: 'width 416'"),
        (b"width=416", "line 1 is neither"),
        (b"\xff\xfe\x00", "cannot read a darknet cfg"),
    ],
)
def test_what_is_no_cfg_is_refused(tmp_path, content, expected):
    (tmp_path / "a.cfg").write_bytes(content)
    with pytest.raises(UserError, match=expected):
        read_cfg(tmp_path / "a.cfg")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\.cfg: cannot read a darknet cfg: .*No such file"):
        read_cfg(tmp_path / "a.cfg")
