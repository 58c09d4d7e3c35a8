"""VOC annotations: what is read, what is refused, and by which words."""

import pytest

from data.voc_annotation import read_annotation
from utils.errors import UserError


def box(low=1, high=9):
    corners = f"<xmin>{low}</xmin><ymin>{low}</ymin><xmax>{high}</xmax><ymax>{high}</ymax>"
    return f"<bndbox>{corners}</bndbox>"


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "a b ü.xml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def cat(inside):
    return f"<annotation><object><name>cat</name>{inside}</object></annotation>"


def test_an_annotation_may_hold_nothing(write):
    annotation = read_annotation(write("<annotation/>"))
    assert annotation.boxes_xyxy.shape == (0, 4)
    assert annotation.difficult.shape == (0,)
    assert annotation.names == ()
    assert annotation.file_name == ""
    assert annotation.size_hw is None


def test_names_sizes_and_file_names_are_read_whatever_the_encoding(write):
    xml = (
        '<?xml version="1.0" encoding="{}"?><annotation><filename>C:\\x\\a.jpg</filename>'
        "<size><width>50</width><height>30</height></size>"
        f"<object><name> Küche </name>{box()}</object></annotation>"
    )
    for encoding in ("utf-8", "latin-1", "utf-16"):
        annotation = read_annotation(write(xml.format(encoding).encode(encoding)))
        assert annotation.names == ("Küche",)
        assert annotation.size_hw == (30, 50)
        assert annotation.file_name == "a.jpg"


@pytest.mark.parametrize("tag", ["", "<difficult/>", "<difficult>0</difficult>"])
def test_a_missing_or_empty_difficult_tag_means_not_difficult(write, tag):
    assert read_annotation(write(cat(tag + box()))).difficult.tolist() == [False]


@pytest.mark.parametrize("value", [" 1 ", "True"])
def test_a_difficult_object_is_known_as_such(write, value):
    tag = f"<difficult>{value}</difficult>"
    assert read_annotation(write(cat(tag + box()))).difficult.tolist() == [True]


def test_parts_inside_an_object_are_no_objects(write):
    part = f"<part><name>head</name><difficult>1</difficult>{box(5, 6)}</part>"
    xml = f"<annotation><object>{part}<name>person</name>{box(1, 30)}</object></annotation>"
    annotation = read_annotation(write(xml))
    assert annotation.names == ("person",)
    assert annotation.boxes_xyxy.tolist() == [[1, 1, 30, 30]]
    assert annotation.difficult.tolist() == [False]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "broken XML"),
        (cat(box())[:-5], "broken XML"),
        (b"<annotation>\xff</annotation>", "broken XML"),
        ("<svg/>", "<svg>, not <annotation>"),
        ('<?xml version="1.0" encoding="klingon"?><annotation/>', "klingon"),
        (f"<annotation><object>{box()}</object></annotation>", "object 1 has no <name>"),
        (cat(""), "object 1 ('cat') has no <bndbox>"),
        (cat(f"<part>{box()}</part>"), "object 1 ('cat') has no <bndbox>"),
        (cat("<bndbox/>"), "<xmin> is ''"),
        (cat(box(high="nan")), "<xmax> is 'nan', not a number"),
        (cat(box(low="-inf")), "<xmin> is '-inf', not a number"),
        (cat(box(low="left")), "<xmin> is 'left', not a number"),
        (cat("<difficult>7</difficult>" + box()), "<difficult> is '7', not 0 or 1"),
    ],
)
def test_what_cannot_be_used_is_refused_with_path_and_cause(write, content, what):
    path = write(content)
    with pytest.raises(UserError) as error:
        read_annotation(path)
    assert str(error.value).startswith(f"{path}: ")
    assert what in str(error.value)


def test_a_document_type_and_its_entity_bombs_are_refused(write):
    bomb = '<!DOCTYPE a [<!ENTITY x "boom"><!ENTITY y "&x;&x;">]>'
    with pytest.raises(UserError, match="document type"):
        read_annotation(write(f"{bomb}<annotation><filename>&y;</filename></annotation>"))


def test_a_missing_annotation_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "absent.xml", tmp_path):
        with pytest.raises(UserError, match=path.name):
            read_annotation(path)
