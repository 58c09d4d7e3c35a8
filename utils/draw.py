"""Draw boxes with names and scores, readable on any background and at any image size."""

import colorsys
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont
GREY: Colour = (150, 150, 150)  # ignore regions, and the ground of an image grid
IGNORED = -1  # class id of an ignore region

# For names in scripts that Pillow's own font lacks: fonts that the common systems come with.
SYSTEM_FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc"),
    *("Arial Unicode.ttf", "PingFang.ttc", "arial.ttf", "msyh.ttc", "malgun.ttf", "YuGothM.ttc"),
)


def draw_detections(image_rgb: np.ndarray, detections) -> np.ndarray:
    """A copy of the image with a Predictor's Detections drawn."""
    return draw_boxes(
        image_rgb,
        detections.boxes_xyxy,
        detections.class_ids,
        class_names=detections.class_names,
        scores=detections.scores,
    )


def draw_boxes(
    image_rgb: np.ndarray,
    boxes_xyxy: np.ndarray,
    class_ids: np.ndarray,
    class_names: Sequence[str],
    scores: np.ndarray | None = None,
) -> np.ndarray:
    """A copy of an RGB uint8 (H, W, 3) image with boxes and labels.

    Each class has its own colour, the same in every image; the highest score lies on top.

    Args:
        boxes_xyxy: (n, 4) pixels.
        class_ids: (n,) indices into class_names, or -1 for an ignore region, drawn dashed and
            labelled "difficult".
        scores: (n,), or None for ground truth.
    """
    image = Image.fromarray(np.ascontiguousarray(image_rgb))
    drawing = ImageDraw.Draw(image)
    line_width, font_size = line_and_font_size(image.height, image.width)
    ids = np.asarray(class_ids, dtype=int)
    best_first = np.arange(len(ids))
    if scores is not None:
        best_first = np.argsort(-np.asarray(scores), kind="stable")
    boxes = np.asarray(boxes_xyxy, dtype=float).reshape(-1, 4)[best_first].tolist()
    colours = [class_colour(class_id) for class_id in ids[best_first].tolist()]
    font = font_for("".join(class_names), font_size)
    texts = [
        label(int(ids[index]), class_names, None if scores is None else float(scores[index]), font)
        for index in best_first
    ]
    for box, colour in reversed(list(zip(boxes, colours, strict=True))):
        draw_outline(drawing, box, colour, line_width)
    font = fitting_font(font, texts, image.width)
    places = place_labels(boxes, texts, font, image.size)
    for place, text, colour in reversed(list(zip(places, texts, colours, strict=True))):
        draw_label(drawing, place, text, colour, font)
    return np.array(image)


def image_grid(images: Sequence[np.ndarray], columns: int = 4) -> np.ndarray:
    """RGB uint8 images, row by row in cells of the largest one's size, on grey.

    Raises:
        ValueError: If there is no image or no column.
    """
    if not images or columns < 1:
        raise ValueError(f"need images and columns, got {len(images)} and {columns}")
    gap = 4
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    height = max(image.shape[0] for image in images) + gap
    width = max(image.shape[1] for image in images) + gap
    grid = np.full((rows * height + gap, columns * width + gap, 3), GREY, np.uint8)
    for index, image in enumerate(images):
        top = gap + index // columns * height
        left = gap + index % columns * width
        grid[top : top + image.shape[0], left : left + image.shape[1]] = image
    return grid


def class_colour(class_id: int) -> Colour:
    """RGB of a class: neighbouring ids are far apart in hue, groups of seven in brightness."""
    if class_id == IGNORED:
        return GREY
    hue = (0.02 + class_id * 0.6180339887) % 1  # by the golden ratio no hue comes twice
    saturation = (0.9, 0.6, 0.95)[class_id // 7 % 3]
    value = (1.0, 0.95, 0.7)[class_id // 7 % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def text_colour(background: Colour) -> Colour:
    """Black or white, whichever has the higher contrast by WCAG's relative luminance."""
    linear = [
        channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4
        for channel in (value / 255 for value in background)
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # (L + .05) / .05 against 1.05 / (L + .05): they are equal at L = .179.
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)


def line_and_font_size(height: int, width: int) -> tuple[int, int]:
    """Line width and font size in pixels: 2 and 12 up to 640 x 640, 4 and 28 at 1080 x 1920."""
    side = math.sqrt(height * width)
    return max(2, round(side / 320)), max(12, round(side / 52))


def label(class_id: int, class_names: Sequence[str], score: float | None, font: Font) -> str:
    """ "name 0.87", without a score for ground truth."""
    name = "difficult" if class_id == IGNORED else class_names[class_id]
    if missing_letters(font, name):
        name = f"class {class_id}"  # better than a row of empty boxes
    return name if score is None else f"{name} {score:.2f}"


def draw_outline(
    drawing: ImageDraw.ImageDraw, box: Sequence[float], colour: Colour, line_width: int
) -> None:
    """Draw a box in its class's colour between contrasting hairlines: visible on any background."""
    width, height = drawing.im.size
    x1, x2 = (min(max(round(value), 0), width - 1) for value in (box[0], box[2] - 1))
    y1, y2 = (min(max(round(value), 0), height - 1) for value in (box[1], box[3] - 1))
    x2, y2 = max(x1, x2), max(y1, y2)
    if colour == GREY:
        draw_dashes(drawing, (x1, y1, x2, y2), line_width)
        return
    hairline = text_colour(colour)
    drawing.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=hairline, width=line_width + 2)
    drawing.rectangle((x1, y1, x2, y2), outline=colour, width=line_width)


def draw_dashes(
    drawing: ImageDraw.ImageDraw, corners: tuple[int, int, int, int], line_width: int
) -> None:
    """Draw a rectangle of grey dashes with black gaps."""
    x1, y1, x2, y2 = corners
    step = 4 * line_width
    drawing.rectangle(corners, outline=(0, 0, 0), width=line_width)
    for x in range(x1, x2, 2 * step):
        for y in (y1, y2 - line_width + 1):
            drawing.rectangle((x, y, min(x + step, x2), y + line_width - 1), fill=GREY)
    for y in range(y1, y2, 2 * step):
        for x in (x1, x2 - line_width + 1):
            drawing.rectangle((x, y, x + line_width - 1, min(y + step, y2)), fill=GREY)


def place_labels(
    boxes: Sequence[Sequence[float]],
    texts: Sequence[str],
    font: Font,
    image_wh: tuple[int, int],
) -> np.ndarray:
    """(n, 4) whole pixels: per box the place that covers least of the labels before it."""
    places = np.zeros((len(boxes), 4), dtype=int)
    for index, (box, text) in enumerate(zip(boxes, texts, strict=True)):
        candidates = candidate_places(box, label_size(text, font), image_wh)
        places[index] = candidates[overlap(candidates, places[:index]).argmin()]
    return places


def overlap(candidates: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(m, 4) and (n, 4) -> (m,) pixels that each candidate shares with all places together."""
    top_left = np.maximum(candidates[:, None, :2], places[:, :2])
    bottom_right = np.minimum(candidates[:, None, 2:], places[:, 2:])
    return (bottom_right - top_left).clip(0).prod(axis=-1).sum(axis=-1)


def candidate_places(
    box: Sequence[float], label_wh: tuple[int, int], image_wh: tuple[int, int]
) -> np.ndarray:
    """(8, 4): above, below and inside the box, left and right, moved into the image."""
    width, height = label_wh
    x1, y1, x2, y2 = (round(value) for value in box)
    tops = np.array([y1 - height, y2, y1, y2 - height]).clip(0, max(0, image_wh[1] - height))
    lefts = np.array([x1, x2 - width]).clip(0, max(0, image_wh[0] - width))
    top, left = np.repeat(tops, 2), np.tile(lefts, 4)
    return np.stack((left, top, left + width, top + height), axis=1)


def label_size(text: str, font: Font) -> tuple[int, int]:
    """Width and height of a label, its margin included."""
    return math.ceil(font.getlength(text)) + 2 * margin(font), sum(font.getmetrics())


def margin(font: Font) -> int:
    """Pixels left and right of a label's text."""
    return max(1, round(font.size / 6))


def draw_label(
    drawing: ImageDraw.ImageDraw, place: np.ndarray, text: str, colour: Colour, font: Font
) -> None:
    """Draw the text on a ground of its class's colour, at `place`: (4,) xyxy, whole pixels."""
    left, top, right, bottom = place.tolist()
    drawing.rectangle((left, top, right - 1, bottom - 1), fill=colour)
    drawing.text((left + margin(font), top), text, fill=text_colour(colour), font=font)


def fitting_font(font: Font, texts: Sequence[str], width: int) -> Font:
    """The font at a size that fits the longest label into `width`, or the smallest legible one."""
    longest = max(texts, key=len, default="")
    while font.size > 8 and label_size(longest, font)[0] > width:
        font = font.font_variant(size=font.size - 1)
    return font


@lru_cache(maxsize=64)  # the search takes milliseconds, and every frame of a video repeats it
def font_for(letters: str, size: int) -> Font:
    """Pillow's embedded font, or, for other scripts, the installed one with the most letters."""
    embedded = ImageFont.load_default(size)
    assert isinstance(embedded, Font)  # what Pillow gives where the size is chosen
    if not missing_letters(embedded, letters):
        return embedded
    fonts = [embedded, *installed_fonts(size)]
    return min(fonts, key=lambda font: len(missing_letters(font, letters)))


def installed_fonts(size: int) -> Iterator[Font]:
    """The fonts of SYSTEM_FONTS that this machine has."""
    for name in SYSTEM_FONTS:
        with suppress(OSError):
            yield ImageFont.truetype(name, size)


@lru_cache(maxsize=1024)
def missing_letters(font: Font, letters: str) -> frozenset[str]:
    """The letters that the font draws as its sign for a missing one."""
    sign = bytes(font.getmask("\U0010fffe"))
    return frozenset(x for x in set(letters) - {" "} if bytes(font.getmask(x)) == sign)
