"""Read and write video files with OpenCV's FFmpeg: every frame, in order, at its frame rate."""

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from utils.errors import UserError

VIDEO_SUFFIXES = (  # in lower case
    *(".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv"),
    *(".ts", ".mts", ".m2ts", ".3gp", ".ogv", ".gif"),
)
FALLBACK_FPS = 25.0
MAX_FPS = 1000.0  # a higher one is a container's clock (90000), not a frame rate


class VideoReader:
    """The frames of a video file as upright RGB uint8 (H, W, 3); each iteration starts anew.

    Attributes:
        fps: Frames per second.
        size_hw: (height, width) of the first frame, turned upright.
        frame_count: The container's own count, 0 if it has none.
        notes: What was odd, as sentences. Whether the count was right is known after a whole
            iteration.

    Raises:
        UserError: If the file is missing or no frame of it can be decoded.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.notes: list[str] = []
        if not self.path.is_file():
            raise UserError(f"{path}: no such video file.")
        capture = self._open()
        try:
            ok, first = capture.read()
            fps, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        finally:
            capture.release()
        if not ok:
            raise UserError(
                f"{path}: no frame can be decoded; it is not a video, is cut off, or has a codec "
                "that OpenCV lacks. Try: ffmpeg -i INPUT -c:v libx264 OUTPUT.mp4"
            )
        self.size_hw: tuple[int, int] = first.shape[:2]
        self.frame_count = int(count) if math.isfinite(count) and count > 0 else 0
        self.fps = self._plausible_fps(fps)

    def __iter__(self) -> Iterator[np.ndarray]:
        capture = self._open()
        frames = 0
        try:
            while True:
                ok, frame_bgr = capture.read()
                if not ok:
                    break
                frames += 1
                yield cv2.cvtColor(frame_bgr, cv2.COLOR_BGR2RGB)
        finally:
            capture.release()
        if self.frame_count and frames != self.frame_count:
            self._note(f"the file announces {self.frame_count} frames, {frames} could be decoded")

    def _open(self) -> cv2.VideoCapture:
        # The backend is named: left to choose, OpenCV takes "%03d" in a name for an image series.
        capture = cv2.VideoCapture(str(self.path), cv2.CAP_FFMPEG)
        capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
        return capture

    def _plausible_fps(self, fps: float) -> float:
        if 0 < fps <= MAX_FPS:
            return fps
        self._note(f"the file gives {fps:g} frames a second; {FALLBACK_FPS:g} is taken instead")
        return FALLBACK_FPS

    def _note(self, sentence: str) -> None:
        note = f"{self.path}: {sentence}."
        if note not in self.notes:
            self.notes.append(note)


class VideoWriter:
    """Write RGB uint8 frames to an .mp4 file (MPEG-4 Part 2, which every OpenCV wheel has).

    A context manager. The codec takes even sizes only, and OpenCV would cut off an odd last row or
    column: it is repeated instead, so the video has `padded_hw`.

    Args:
        fps: Frames per second.
        size_hw: (height, width) of the frames.

    Raises:
        UserError: If no video can be written there (found by writing and reading one frame), and on
            leaving if the finished file does not hold every frame.
    """

    def __init__(self, path: str | Path, fps: float, size_hw: tuple[int, int]):
        self.path = Path(path)
        self.fps = fps
        self.size_hw = tuple(size_hw)
        self.padded_hw = (size_hw[0] + size_hw[0] % 2, size_hw[1] + size_hw[1] % 2)
        self.frames_written = 0
        self._probe()
        self._writer = self._open(self.path)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, exception_type, exception, traceback) -> None:
        self._writer.release()
        if exception_type is None and self.frames_written:
            self._verify(self.path, self.frames_written)

    def write(self, frame: np.ndarray) -> None:
        """Append a frame; a frame of another size (the stream has changed it) is resized."""
        frame_bgr = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        if frame.shape[:2] != self.size_hw:
            frame_bgr = cv2.resize(frame_bgr, self.size_hw[::-1], interpolation=cv2.INTER_AREA)
        self._writer.write(self._pad(frame_bgr))
        self.frames_written += 1

    def _pad(self, frame_bgr: np.ndarray) -> np.ndarray:
        bottom, right = (self.padded_hw[axis] - self.size_hw[axis] for axis in (0, 1))
        if not bottom and not right:
            return frame_bgr
        return cv2.copyMakeBorder(frame_bgr, 0, bottom, 0, right, cv2.BORDER_REPLICATE)

    def _open(self, path: Path) -> cv2.VideoWriter:
        codec = cv2.VideoWriter.fourcc(*"mp4v")
        return cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, codec, self.fps, self.padded_hw[::-1])

    def _probe(self) -> None:
        """Write and read back one frame beside the target, before hours go into the real one."""
        try:
            with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
                path = Path(folder) / "probe.mp4"
                writer = self._open(path)
                writer.write(np.zeros((*self.padded_hw, 3), np.uint8))
                writer.release()
                self._verify(path, 1)
        except OSError as error:
            raise UserError(f"{self.path.parent}: cannot be written to ({error}).") from None

    def _verify(self, path: Path, frames: int) -> None:
        """Raise UserError unless the file holds `frames` frames and its first one decodes."""
        capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
        try:
            ok, first = capture.read()
            found = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if ok else 0
        finally:
            capture.release()
        if found != frames or first.shape[:2] != self.padded_hw:
            height, width = self.padded_hw
            raise UserError(
                f"{self.path}: {frames} frames of {width} x {height} at {self.fps:g} a second were "
                f"written, {found} can be read back. MPEG-4 takes sides up to 8190 px and rates "
                "up to 65535; is the disk full? Is opencv-python-headless installed from PyPI?"
            )
