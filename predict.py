"""Detect objects in images and videos: python predict.py --weights logs/RUN/best.pt --source S

For weights of darknet or of the original fork add --classes_path NAMES --cfg CFG, or --anchors_path
and --input_shape instead of --cfg. The error message lists the flags to add.
"""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import count, islice
from pathlib import Path

import cv2
import numpy as np
import tyro
from tqdm import tqdm

from data.image import IMAGE_SUFFIXES, read_image
from engine.predictor import Detections, Predictor
from utils.draw import draw_detections
from utils.errors import UserError, run_script
from utils.memory import FittingBatch
from utils.overlap import Behind, ahead
from utils.video import VIDEO_SUFFIXES, VideoReader, VideoWriter
from weights.foreign import FileMetadata, MetadataFlags

RECORDS = "detections.jsonl"


@dataclasses.dataclass(frozen=True)
class Config:
    # Edit the values here, or give them as flags. Each comment is the help text of its flag.
    weights: str = ""  # best.pt or last.pt of a run, darknet .weights, or the original fork's .pth
    source: str = ""  # an image, a video, or a folder of images and videos
    save_dir: str = ""  # folder for the results; default: logs/predict-<time>
    # minimum score of a detection; default: the checkpoint's threshold of best F1
    conf_threshold: float | None = None
    class_thresholds: bool = False  # use the threshold of best F1 of each class instead
    nms_iou: float = 0.45  # NMS removes boxes whose IoU with a better box of the class exceeds this
    device: str = ""  # cpu, cuda or cuda:N; default: CUDA when available
    amp: str = "auto"  # precision: auto, bf16, fp16 or off; auto is fp16 on a GPU, off on a CPU
    batch_size: int = 8  # images or video frames per batch
    metadata: MetadataFlags = dataclasses.field(default_factory=FileMetadata)


def main() -> None:
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    if not config.weights:
        raise UserError(
            "No weights given. Use --weights logs/RUN/best.pt, a file of your training, or "
            "weights of darknet or the original fork."
        )
    if config.batch_size < 1:
        raise UserError(f"--batch_size is {config.batch_size}: give 1 or more.")
    images, videos, left_out = find_sources(config.source)
    predictor = Predictor(
        config.weights,
        device=config.device or None,
        conf_threshold=config.conf_threshold,
        nms_iou=config.nms_iou,
        class_thresholds=config.class_thresholds,
        metadata=config.metadata,
        amp=config.amp,
    )
    folder = results_folder(config.save_dir, config.source)

    started = time.perf_counter()
    with Results(folder, [*images, *videos], config.batch_size) as results:
        if left_out:
            results.notes.append(left_out)
        if predictor.stand_in:
            results.notes.append(
                f"score >= {predictor.conf_threshold:.4g} is a default: no evaluation has "
                "measured a better one for these weights. --conf_threshold gives another score"
            )
        predict_images(images, predictor, results, config.batch_size)
        for path in videos:
            predict_video(path, predictor, results, config.batch_size)
    print(results.summary(predictor, time.perf_counter() - started))
    if results.failures:
        raise UserError(
            f"{len(results.failures)} of {len(images) + len(videos)} files could not be done:\n"
            + "\n".join(f"  {failure}" for failure in results.failures)
        )


def find_sources(source: str) -> tuple[list[Path], list[Path], str]:
    """The images and the videos to work on, sorted, and a sentence on what a folder has besides.

    Of a folder only its own files count, not those of its subfolders.
    Raises UserError if there is nothing to work on.
    """
    path = Path(source)
    if not source or not path.exists():
        raise UserError(f"--source {source!r} is not there: give an image, a video or a folder.")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    visible = [file for file in files if file.is_file() and not file.name.startswith(".")]
    images = [file for file in visible if file.suffix.lower() in IMAGE_SUFFIXES]
    videos = [file for file in visible if file.suffix.lower() in VIDEO_SUFFIXES]
    if not images and not videos:
        raise UserError(
            f"--source {source}: no image ({' '.join(IMAGE_SUFFIXES)}) "
            f"and no video ({' '.join(VIDEO_SUFFIXES)})."
        )
    others = len(files) - len(images) - len(videos)
    return images, videos, f"{source}: {others} other files or folders left out" if others else ""


def results_folder(save_dir: str, source: str) -> Path:
    """The folder for the results, which is not yet made."""
    folder = Path(save_dir or time.strftime("logs/predict-%Y%m%d-%H%M%S"))
    if folder.resolve() == Path(source).resolve():
        raise UserError(f"--save_dir {folder} is the source: results would mix with your images.")
    return folder


def predict_images(
    paths: Sequence[Path], predictor: Predictor, results: "Results", batch_size: int
) -> None:
    """Detect in images and write them with their boxes; unreadable ones become failures."""
    progress = tqdm(paths, desc="images", unit="image", disable=not paths)

    def keep(batch: list[tuple[Path, np.ndarray]], detections: list[Detections]) -> None:
        for (path, image), found in zip(batch, detections, strict=True):
            results.add(path, None, image.shape[:2], found)
            write_image(results.free_path(path.name), draw_detections(image, found))

    with Behind() as behind:
        for batch in ahead(batches(readable(progress, results), batch_size)):
            behind(keep, batch, results.detect(predictor, [image for _, image in batch]))


def readable(paths: Iterable[Path], results: "Results") -> Iterator[tuple[Path, np.ndarray]]:
    """Each path with its image, leaving out and noting those that cannot be read."""
    for path in paths:
        try:
            yield path, read_image(path)
        except UserError as error:
            results.failures.append(str(error))


def predict_video(path: Path, predictor: Predictor, results: "Results", batch_size: int) -> None:
    """Detect in every frame and write the video with its boxes; a bad file becomes a failure."""
    try:
        video = VideoReader(path)
        target = results.free_path(f"{path.stem}.mp4")
        numbers = count()
        progress = tqdm(video, desc=path.name, unit="frame", total=video.frame_count or None)
        with VideoWriter(target, video.fps, video.size_hw) as writer, Behind() as behind:

            def keep(images: list[np.ndarray], detections: list[Detections]) -> None:
                for image, found in zip(images, detections, strict=True):
                    results.add(path, next(numbers), image.shape[:2], found)
                    writer.write(draw_detections(image, found))

            for images in ahead(batches(progress, batch_size)):
                behind(keep, images, results.detect(predictor, images))
        results.notes += video.notes
    except UserError as error:
        results.failures.append(str(error))


def batches(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def write_image(path: Path, image_rgb: np.ndarray) -> None:
    """Write in the format of the suffix; a JPEG at quality 95."""
    # Encoded in memory: on Windows cv2.imwrite takes no path with other than ASCII letters.
    _, data = cv2.imencode(path.suffix, cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR))
    try:
        path.write_bytes(data.tobytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}).") from None


class Results:
    """Writes the results folder and prints a summary at the end. A context manager.

    No source is written over, nor any file of a folder that is not an earlier prediction's. The
    folder is made at once, before the work that its results cost, and goes when there are none.
    """

    def __init__(self, folder: Path, sources: Sequence[Path], batch_size: int):
        self.folder = folder
        self.batch = FittingBatch(batch_size)
        self.notes: list[str] = []
        self.failures: list[str] = []
        self.boxes_per_class: Counter[str] = Counter()
        self.images = 0
        self.max_score = 0.0
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--save_dir {folder}: cannot make the folder ({error}).") from None
        strangers = [] if (folder / RECORDS).exists() else list(folder.iterdir())
        inside = [path for path in map(Path.resolve, sources) if path.parent == folder.resolve()]
        self._taken = {path.name.casefold() for path in (*strangers, *inside)}
        try:  # to append: the records of an earlier prediction go when there is a first new one
            self._records = open(folder / RECORDS, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"--save_dir {folder}: cannot be written to ({error}).") from None

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *exception) -> None:
        self._records.close()
        if not (self.folder / RECORDS).stat().st_size:
            (self.folder / RECORDS).unlink()
        if not self.images:
            with suppress(OSError):  # whatever else came to lie there stays
                for path in self._made:
                    path.rmdir()

    def free_path(self, name: str) -> Path:
        """A path in the folder for this name, numbered where it is taken: a.mp4, a-2.mp4, ..."""
        path, number = Path(name), 1
        while path.name.casefold() in self._taken:
            number += 1
            path = Path(f"{Path(name).stem}-{number}{Path(name).suffix}")
        self._taken.add(path.name.casefold())
        return self.folder / path

    def detect(self, predictor: Predictor, images: list[np.ndarray]) -> list[Detections]:
        """The predictor's answer, with the highest score remembered."""
        found = self.batch.run(lambda size: predictor(images, batch_size=size))
        assert predictor.max_score is not None  # it has seen images
        self.max_score = max(predictor.max_score, self.max_score)
        return found

    def add(
        self, source: Path, frame: int | None, image_hw: tuple[int, int], found: Detections
    ) -> None:
        """Write the line of an image (frame None) or of a video's frame, counted from 0."""
        rows = zip(
            found.boxes_xyxy.tolist(), found.scores.tolist(), found.class_ids.tolist(), strict=True
        )
        boxes = [
            {
                "box_xyxy": box,
                "score": score,
                "class_id": class_id,
                "class_name": found.class_names[class_id],
            }
            for box, score, class_id in rows
        ]
        if self.images == 0:
            self._records.truncate(0)
        self.images += 1
        self.boxes_per_class.update(box["class_name"] for box in boxes)
        record = {
            "source": str(source),
            "frame": frame,
            "width": image_hw[1],
            "height": image_hw[0],
            "boxes": boxes,
        }
        self._records.write(json.dumps(record, ensure_ascii=False) + "\n")

    def summary(self, predictor: Predictor, seconds: float) -> str:
        """Boxes per class, speed, place, and whatever was odd."""
        precision = str(predictor.dtype).removeprefix("torch.")
        if not self.images:
            lines = ["nothing could be read: nothing is written"]
        else:
            lines = [
                self._boxes_line(predictor),
                f"{self.images} images or frames, {self.images / seconds:.1f} a second "
                f"on {predictor.device} in {precision}, reading and writing included",
                f"wrote {self.folder} with {RECORDS}",
            ]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    def _boxes_line(self, predictor: Predictor) -> str:
        """How many boxes of each class, or why there is none."""
        threshold = f"score >= {predictor.conf_threshold:.4g}"
        cure = "lower --conf_threshold"
        if predictor.class_thresholds:
            highest = max(predictor.class_thresholds.values())
            threshold += f" to {highest:.4g}, its class's own"
            cure = "give a --conf_threshold instead of --class_thresholds"
        if not self.boxes_per_class:
            return (
                f"No box has a {threshold}; the highest score seen is {self.max_score:.4g}. "
                f"To see more, {cure}."
            )
        boxes = ", ".join(f"{name} {count}" for name, count in self.boxes_per_class.most_common())
        return f"{self.boxes_per_class.total()} boxes with {threshold}: {boxes}"


if __name__ == "__main__":
    run_script(main)
