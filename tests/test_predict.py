import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import predict
from data.image import read_image
from engine.predictor import Predictor
from tests.test_predictor import (
    CLASS_NAMES,
    THRESHOLD,
    random_image,
    with_class_thresholds,
    write_checkpoint,
)
from utils.draw import draw_detections
from utils.errors import UserError
from utils.video import VideoReader, VideoWriter

ROOT = Path(__file__).resolve().parent.parent


def write_image(path, height=50, width=80, seed=0):
    Image.fromarray(random_image(height, width, seed)).save(path)
    return path


def write_video(path, frames=5, size_hw=(63, 95), fps=12.5):
    with VideoWriter(path, fps, size_hw) as writer:
        for index in range(frames):
            writer.write(np.full((*size_hw, 3), 40 * index, np.uint8))
    return path


def run_predict(*arguments):
    command = [sys.executable, ROOT / "predict.py", *arguments]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, encoding="utf-8", timeout=300
    )


def run_main(monkeypatch, **flags):
    given = {"device": "cpu", **flags}.items()
    arguments = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given]
    monkeypatch.setattr(sys, "argv", ["predict.py", *arguments])
    predict.main()


def read_records(folder):
    lines = (folder / "detections.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "tiny.pt")


@pytest.fixture(scope="module")
def mixed_run(weights, tmp_path_factory):
    """predict.py, run as a user does, on a folder of all kinds of files, two of them broken."""
    root = tmp_path_factory.mktemp("mixed run")
    source = root / "my images"
    (source / "subfolder").mkdir(parents=True)
    write_image(source / "a.png")
    write_image(source / "a.jpg", 60, 40, seed=1)
    write_image(source / "Ärger.JPG", 30, 90, seed=2)
    write_image(source / "subfolder" / "deep.png")
    (source / "broken.jpg").write_bytes(b"no image")
    (source / "notes.txt").write_text("hello")
    write_video(source / "a.mp4")
    write_video(root / "twin.mp4", frames=3).rename(source / "a.mov")
    (source / "broken.mp4").write_bytes(b"no video")
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    out = root / "out"
    result = run_predict(
        *("--weights", weights, "--source", source, "--save_dir", out),
        *("--device", "cpu", "--batch-size", 2, "--nms_iou", 0.3),
    )
    return source, out, result, before


def test_a_folder_gives_a_record_for_each_image_and_frame(mixed_run):
    source, out, _, _ = mixed_run
    records = read_records(out)
    told = [(Path(record["source"]).name, record["frame"]) for record in records]
    assert told == [
        *(("a.jpg", None), ("a.png", None), ("Ärger.JPG", None)),
        *(("a.mov", index) for index in range(3)),
        *(("a.mp4", index) for index in range(5)),
    ]
    assert [(record["width"], record["height"]) for record in records[:3]] == [
        *((40, 60), (80, 50), (90, 30))
    ]
    assert all(Path(record["source"]).parent == source for record in records)
    assert all(set(record) == {"source", "frame", "width", "height", "boxes"} for record in records)


def test_the_records_are_the_predictors_boxes(mixed_run, weights):
    source, out, _, _ = mixed_run
    found = Predictor(weights, device="cpu", nms_iou=0.3)(source / "a.png")
    boxes = read_records(out)[1]["boxes"]
    assert len(boxes) == len(found) > 5
    assert set(boxes[0]) == {"box_xyxy", "score", "class_id", "class_name"}
    np.testing.assert_allclose([box["score"] for box in boxes], found.scores, rtol=1e-4)
    assert all(box["class_name"] == CLASS_NAMES[box["class_id"]] for box in boxes)
    assert all(box["score"] >= THRESHOLD for box in boxes)


def test_drawn_images_and_videos_lie_under_names_of_their_own(mixed_run, weights):
    source, out, _, _ = mixed_run
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["a.jpg", "a.png", "Ärger.JPG", "a.mp4", "a-2.mp4", "detections.jsonl"]
    )
    found = Predictor(weights, device="cpu", nms_iou=0.3)(source / "a.png")
    drawn = read_image(out / "a.png").astype(int)
    expected = draw_detections(read_image(source / "a.png"), found)
    assert abs(drawn - expected).mean() < 2  # a few boxes of nearly equal score may change places
    assert abs(drawn - read_image(source / "a.png")).mean() > 10


def test_a_drawn_video_has_every_frame_and_the_rate_of_its_source(mixed_run):
    _, out, _, _ = mixed_run
    for name, count in (("a.mp4", 3), ("a-2.mp4", 5)):
        video = VideoReader(out / name)
        assert (video.fps, video.frame_count, len(list(video))) == (12.5, count, count)


def test_what_could_not_be_read_is_told_at_the_end_and_the_status_is_2(mixed_run):
    source, _, result, _ = mixed_run
    assert result.returncode == 2, result.stderr
    assert "2 of 7 files could not be done" in result.stderr
    assert str(source / "broken.jpg") in result.stderr
    assert str(source / "broken.mp4") in result.stderr
    assert "Traceback" not in result.stderr
    assert "2 other files or folders left out" in result.stdout
    assert "11 images or frames" in result.stdout
    assert "disc" in result.stdout


def test_the_sources_are_untouched(mixed_run):
    source, _, _, before = mixed_run
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("suffix", predict.IMAGE_SUFFIXES)
def test_an_image_keeps_its_format(monkeypatch, weights, tmp_path, suffix):
    path = write_image(tmp_path / f"bild{suffix}")
    run_main(monkeypatch, weights=weights, source=path, save_dir=tmp_path / "out")
    assert read_image(tmp_path / "out" / path.name).shape == (50, 80, 3)
    with Image.open(path) as source, Image.open(tmp_path / "out" / path.name) as drawn:
        assert source.format == drawn.format


def test_saving_beside_the_sources_writes_over_nothing(monkeypatch, weights, tmp_path):
    pixels = read_image(write_image(tmp_path / "a.png"))
    (tmp_path / "a-2.png").mkdir()
    run_main(monkeypatch, weights=weights, source=tmp_path / "a.png", save_dir=tmp_path)
    assert np.array_equal(read_image(tmp_path / "a.png"), pixels)
    assert not np.array_equal(read_image(tmp_path / "a-3.png"), pixels)


def test_a_strangers_image_in_the_save_dir_stays(monkeypatch, weights, tmp_path):
    source = write_image(tmp_path / "a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "A.PNG").write_bytes(b"mine")
    run_main(monkeypatch, weights=weights, source=source, save_dir=tmp_path / "out")
    assert (tmp_path / "out" / "A.PNG").read_bytes() == b"mine"
    assert read_image(tmp_path / "out" / "a-2.png").shape == (50, 80, 3)


def test_a_second_run_replaces_the_results_of_the_first(monkeypatch, weights, tmp_path):
    source, out = write_image(tmp_path / "a.png"), tmp_path / "out"
    counts = []
    for threshold in (0.2, 0.45):
        flags = {"weights": weights, "source": source, "save_dir": out}
        run_main(monkeypatch, **flags, conf_threshold=threshold)
        (record,) = read_records(out)
        counts.append(len(record["boxes"]))
    assert counts[0] > counts[1]
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "detections.jsonl"]


def test_when_nothing_passes_the_highest_score_is_told(monkeypatch, weights, tmp_path, capsys):
    source, out = write_image(tmp_path / "a.png"), tmp_path / "out"
    run_main(monkeypatch, weights=weights, source=source, save_dir=out, conf_threshold=0.9)
    assert "No box has a score >= 0.9; the highest score seen is 0." in capsys.readouterr().out
    assert read_records(out)[0]["boxes"] == []
    assert np.array_equal(read_image(out / "a.png"), read_image(source))


def test_a_threshold_that_stands_in_is_told_where_it_is_used(monkeypatch, tmp_path, capsys):
    source = write_image(tmp_path / "a.png")
    for metrics, flags, told in (
        ({}, {}, 1),
        ({"f1": 0.0}, {}, 1),
        ({"f1": 0.6}, {}, 0),
        ({}, {"conf_threshold": 0.3}, 0),
    ):
        weights = write_checkpoint(tmp_path / "own.pt", metrics=metrics)
        run_main(monkeypatch, weights=weights, source=source, save_dir=tmp_path / "out", **flags)
        lines = [line for line in capsys.readouterr().out.splitlines() if "is a default" in line]
        assert len(lines) == told
        assert all(f"score >= {THRESHOLD:.4g} is" in line for line in lines)


def test_class_thresholds_are_used_and_told(monkeypatch, tmp_path, capsys):
    source, out = write_image(tmp_path / "a.png"), tmp_path / "out"
    for own, told in (
        ((0.3, 0.9, 0.95), "boxes with score >= 0.3 to 0.95, its class's own: disc"),
        ((0.9, 0.91, 0.95), "No box has a score >= 0.9 to 0.95, its class's own; the highest"),
    ):
        weights = with_class_thresholds(tmp_path / "own.pt", *own)
        flags = {"weights": weights, "source": source, "save_dir": out}
        run_main(monkeypatch, **flags, class_thresholds=True)
        assert told in capsys.readouterr().out
        boxes = read_records(out)[0]["boxes"]
        assert {box["class_name"] for box in boxes} <= {"disc"}


@pytest.mark.parametrize("save_dir", ["out", "new/nested/out"])
def test_when_nothing_can_be_read_nothing_is_left(monkeypatch, weights, tmp_path, capsys, save_dir):
    (tmp_path / "source").mkdir()
    for name in ("broken.jpg", "broken.mp4"):
        (tmp_path / "source" / name).write_bytes(b"neither")
    flags = {"source": tmp_path / "source", "save_dir": tmp_path / save_dir}
    with pytest.raises(UserError, match="2 of 2 files"):
        run_main(monkeypatch, weights=weights, **flags)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert "nothing is written" in capsys.readouterr().out


def test_when_nothing_can_be_read_earlier_results_stay(monkeypatch, weights, tmp_path):
    out, broken = tmp_path / "out", tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    source = write_image(tmp_path / "a.png")
    run_main(monkeypatch, weights=weights, source=source, save_dir=out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match="1 of 1 files"):
        run_main(monkeypatch, weights=weights, source=broken, save_dir=out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_video_that_ends_early_is_told(monkeypatch, weights, tmp_path, capsys):
    path = tmp_path / "cut.avi"
    writer = cv2.VideoWriter(
        str(path), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*"MJPG"), 25.0, (96, 64)
    )
    for seed in range(8):
        writer.write(random_image(64, 96, seed))
    writer.release()
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    run_main(monkeypatch, weights=weights, source=path, save_dir=tmp_path / "out")
    frames = len(read_records(tmp_path / "out"))
    assert 0 < frames < 8
    assert f"announces 8 frames, {frames} could be decoded" in capsys.readouterr().out
    assert VideoReader(tmp_path / "out" / "cut.mp4").frame_count == frames


def test_without_save_dir_the_results_lie_in_logs(monkeypatch, weights, tmp_path):
    source = write_image(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    run_main(monkeypatch, weights=weights, source=source)
    (folder,) = (tmp_path / "logs").iterdir()
    assert folder.name.startswith("predict-")
    assert (folder / "a.png").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"weights": ""}, "No weights given"),
        ({"source": ""}, "is not there"),
        ({"source": "nowhere"}, "is not there"),
        ({"source": "empty"}, "no image .* and no video"),
        ({"source": "text.txt"}, "no image .* and no video"),
        ({"weights": "text.txt"}, "text.txt"),
        ({"weights": "nowhere.pt"}, "nowhere.pt"),
        ({"save_dir": "text.txt"}, "cannot make the folder"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"conf_threshold": 2}, "conf_threshold is 2"),
        ({"amp": "half"}, "amp 'half' on cpu: use auto, bf16 or off"),
        ({"class_thresholds": True}, "class_thresholds"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(
    monkeypatch, weights, tmp_path, flags, message
):
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(UserError, match=message):
        run_main(monkeypatch, **{"weights": weights, "source": "a.png", "save_dir": "out", **flags})
    assert not (tmp_path / "out").exists()
