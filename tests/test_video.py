import struct

import cv2
import numpy as np
import pytest

from utils.errors import UserError
from utils.video import VideoReader, VideoWriter

BITS = 6


def coded_frame(index, size_hw):
    """A frame that shows its index as vertical bars, one a bit, with a red top edge."""
    height, width = size_hw
    bars = [230 if index >> bit & 1 else 20 for bit in range(BITS)]
    row = np.array(bars, np.uint8)[np.arange(width) * BITS // width]
    frame = np.repeat(np.tile(row, (height, 1))[..., None], 3, axis=2)
    frame[: height // 4] = (220, 30, 30)
    return frame


def read_index(frame):
    height, width = frame.shape[:2]
    row = frame[height // 2 :, (np.arange(BITS) * width + width // 2) // BITS].mean(axis=(0, 2))
    return sum(int(value > 128) << bit for bit, value in enumerate(row))


def write_with_opencv(path, codec, frames, fps=25.0):
    size = frames[0].shape[1::-1]
    fourcc = cv2.VideoWriter_fourcc(*codec)
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, fourcc, fps, size)
    for frame in frames:
        writer.write(frame[..., ::-1])
    writer.release()
    return path


@pytest.mark.parametrize("size_hw", [(64, 96), (63, 95), (48, 97), (49, 96)])
@pytest.mark.parametrize("fps", [25.0, 29.97, 0.5])
def test_every_frame_comes_back_in_order_at_its_rate(tmp_path, size_hw, fps):
    path = tmp_path / "näme with %03d.mp4"
    with VideoWriter(path, fps, size_hw) as writer:
        for index in range(40):
            writer.write(coded_frame(index, size_hw))
    video = VideoReader(path)
    assert (video.frame_count, video.size_hw) == (40, writer.padded_hw)
    assert video.fps == pytest.approx(fps, rel=1e-4)
    assert [read_index(frame) for frame in video] == list(range(40))
    assert video.notes == []


@pytest.mark.parametrize("size_hw", [(1, 1), (33, 41), (32, 40)])
def test_an_odd_last_row_and_column_are_kept_by_repeating_them(tmp_path, size_hw):
    frame = np.full((*size_hw, 3), 40, np.uint8)
    frame[-1] = frame[:, -1] = 220
    with VideoWriter(tmp_path / "odd.mp4", 25, size_hw) as writer:
        writer.write(frame)
    (back,) = VideoReader(tmp_path / "odd.mp4")
    assert back.shape == (size_hw[0] + size_hw[0] % 2, size_hw[1] + size_hw[1] % 2, 3)
    assert abs(back[: size_hw[0], : size_hw[1]].astype(int) - frame).mean() < 12
    assert back[-1].mean() > 190


def test_colours_are_rgb_on_both_sides(tmp_path):
    with VideoWriter(tmp_path / "red.mp4", 25, (64, 64)) as writer:
        writer.write(np.full((64, 64, 3), (220, 30, 30), np.uint8))
    (frame,) = VideoReader(tmp_path / "red.mp4")
    np.testing.assert_allclose(frame.mean(axis=(0, 1)), (220, 30, 30), atol=8)


@pytest.mark.parametrize(("name", "codec"), [("a.avi", "MJPG"), ("a.mkv", "mp4v")])
def test_other_containers_are_read_and_can_be_read_twice(tmp_path, name, codec):
    frames = [coded_frame(index, (64, 96)) for index in range(12)]
    video = VideoReader(write_with_opencv(tmp_path / name, codec, frames, fps=12.5))
    assert (video.fps, video.frame_count) == (12.5, 12)
    for _ in range(2):
        assert [read_index(frame) for frame in video] == list(range(12))


def test_a_truncated_file_gives_its_whole_frames_and_says_what_is_missing(tmp_path):
    frames = [coded_frame(index, (256, 384)) for index in range(20)]
    path = write_with_opencv(tmp_path / "cut.avi", "MJPG", frames)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    video = VideoReader(path)
    indices = [read_index(frame) for frame in video]
    assert 8 < len(indices) < 20
    assert indices[:-1] == list(range(len(indices) - 1))  # the last one may be cut in its middle
    assert video.notes == [
        f"{path}: the file announces 20 frames, {len(indices)} could be decoded."
    ]


@pytest.mark.parametrize("content", [b"", b"no video at all" * 500])
def test_a_file_without_a_frame_is_an_error_with_a_cure(tmp_path, content):
    (tmp_path / "bad.mp4").write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.mp4.*not a video.*ffmpeg"):
        VideoReader(tmp_path / "bad.mp4")


def test_an_mp4_without_its_index_is_an_error(tmp_path):
    frames = [coded_frame(index, (64, 96)) for index in range(5)]
    path = write_with_opencv(tmp_path / "cut.mp4", "mp4v", frames)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="cut off"):
        VideoReader(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.mp4: no such"):
        VideoReader(tmp_path / "nowhere.mp4")


def test_rotation_in_the_container_is_applied(tmp_path):
    path = write_with_opencv(tmp_path / "turned.mp4", "mp4v", [coded_frame(0, (64, 96))])
    identity = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    quarter_turn = struct.pack(">9i", 0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)
    head, track = path.read_bytes().split(b"tkhd")
    path.write_bytes(head + b"tkhd" + track.replace(identity, quarter_turn, 1))
    video = VideoReader(path)
    (frame,) = video
    assert video.size_hw == frame.shape[:2] == (96, 64)
    red = frame[..., 0].astype(int) - frame[..., 1]
    assert red[:, -8:].mean() > 100 > 20 > red[:, :32].mean()  # the red top edge is now right


def test_a_nonsense_rate_becomes_25_and_is_said(tmp_path):
    path = write_with_opencv(tmp_path / "rate.avi", "MJPG", [coded_frame(1, (64, 96))])
    data = bytearray(path.read_bytes())
    scale_and_rate = data.index(b"strh") + 28  # of the stream header
    assert struct.unpack_from("<II", data, scale_and_rate) == (1, 25)
    struct.pack_into("<II", data, scale_and_rate, 1, 90000)
    path.write_bytes(data)
    video = VideoReader(path)
    assert video.fps == 25.0
    assert video.notes == [f"{path}: the file gives 90000 frames a second; 25 is taken instead."]


def test_a_frame_of_another_size_is_resized_not_lost(tmp_path):
    with VideoWriter(tmp_path / "sizes.mp4", 25, (64, 96)) as writer:
        for index, size_hw in enumerate([(64, 96), (128, 192), (64, 96)]):
            writer.write(coded_frame(index, size_hw))
    assert [read_index(frame) for frame in VideoReader(tmp_path / "sizes.mp4")] == [0, 1, 2]


@pytest.mark.parametrize(("size_hw", "fps"), [((2, 9000), 25.0), ((64, 64), 90000.0)])
def test_what_the_codec_cannot_write_is_said_at_once(tmp_path, size_hw, fps):
    with pytest.raises(UserError, match=r"x\.mp4.*MPEG-4 takes"):
        VideoWriter(tmp_path / "x.mp4", fps, size_hw)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_said_at_once(tmp_path):
    with pytest.raises(UserError, match="nowhere: cannot be written"):
        VideoWriter(tmp_path / "nowhere" / "x.mp4", 25, (64, 64))


def test_the_writer_is_closed_when_its_user_fails(tmp_path):
    def write_and_fail():
        with VideoWriter(tmp_path / "x.mp4", 25, (64, 96)) as writer:
            writer.write(coded_frame(3, (64, 96)))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        write_and_fail()
    assert [read_index(frame) for frame in VideoReader(tmp_path / "x.mp4")] == [3]


def test_a_file_that_lost_frames_is_noticed(tmp_path):
    def write_and_lose():
        with VideoWriter(tmp_path / "x.mp4", 25, (64, 96)) as writer:
            for index in range(3):
                writer.write(coded_frame(index, (64, 96)))
            (tmp_path / "x.mp4").unlink()

    with pytest.raises(UserError, match=r"3 frames .* 0 can be read back"):
        write_and_lose()
