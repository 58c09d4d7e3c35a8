"""Images of every kind that users bring: read upright, as RGB, or refused by name."""

import io
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from data.image import check_image, image_size, read_image, upright_boxes
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
RED, BLUE = (220, 30, 30), (20, 40, 200)
FORMATS = {".jpg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP", ".tif": "TIFF"}


def two_colours(height=40, width=64):
    """Red, with a blue lower right quarter: no rotation or mirroring leaves it alike."""
    image = np.full((height, width, 3), RED, np.uint8)
    image[height // 2 :, width // 2 :] = BLUE
    return image


def noise(height=64, width=96):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def exif_with(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def in_memory(image, exif):
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG", exif=exif)
    return Image.open(data)


@pytest.mark.parametrize("name", ["a.jpg", "a.JPG", "a.jpeg", "a.png", "a.bmp", "a.webp", "a.tif"])
def test_every_suffix_is_read_from_a_path_with_spaces_and_foreign_letters(tmp_path, name):
    path = tmp_path / "schöne Bilder 猫" / f"ein Bild ü {name}"
    path.parent.mkdir()
    Image.fromarray(two_colours()).save(path, quality=95)
    image = read_image(path)
    assert image.shape == (40, 64, 3)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert np.abs(image[5, 5].astype(int) - RED).max() < 12
    assert np.abs(image[-5, -5].astype(int) - BLUE).max() < 12
    assert image_size(path) == check_image(str(path)).upright_hw == (40, 64)


def test_the_fast_jpeg_decoder_agrees_with_pillow(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(noise()).save(path, quality=90)
    reference = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert np.abs(read_image(path) - reference).max() <= 2


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "I;16"])
def test_grey_palette_alpha_and_16_bits_read_as_the_same_grey(tmp_path, mode):
    grey = np.repeat(np.array([[0, 255], [255, 0]], np.uint8), 8, axis=1)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert(mode)
    image.save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_are_scaled_and_not_clipped(tmp_path, suffix):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    colours = np.stack((ramp, ramp[::-1], ramp // 2), axis=-1)
    cv2.imwrite(str(tmp_path / f"grey{suffix}"), ramp)
    assert np.array_equal(read_image(tmp_path / f"grey{suffix}")[..., 1], ramp >> 8)
    if suffix == ".png":
        cv2.imwrite(str(tmp_path / "colours.png"), colours[..., ::-1])
        image = read_image(tmp_path / "colours.png").astype(int)
        assert np.abs(image - (colours >> 8)).max() <= 1


def test_values_beyond_16_bits_are_refused_with_the_cure(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif.*save it with 8 or 16 bits"):
        read_image(tmp_path / "a.tif")


def test_the_check_refuses_what_cannot_be_read(tmp_path):
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "float.tif")
    for reader in (check_image, read_image):
        with pytest.raises(UserError, match=r"float\.tif"):
            reader(tmp_path / "float.tif")


def test_transparency_is_laid_on_white(tmp_path):
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = 0, 128, 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.abs(read_image(tmp_path / "a.png")[0, :, 0].astype(int) - [255, 127, 0]).max() <= 1

    palette = Image.fromarray(np.array([[0, 1]], np.uint8), mode="P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "p.png", transparency=0)
    assert read_image(tmp_path / "p.png").tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_cmyk_keeps_its_colours(tmp_path):
    Image.fromarray(two_colours()).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    image = read_image(tmp_path / "a.jpg").astype(int)
    assert np.abs(image[5, 5] - RED).max() < 12
    assert np.abs(image[-5, -5] - BLUE).max() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_images_are_turned_upright_as_exif_says(tmp_path, suffix, orientation):
    path = tmp_path / f"a{suffix}"
    options = {".jpg": {"quality": 100, "subsampling": 0}, ".webp": {"lossless": True}}
    exif = exif_with(orientation)
    Image.fromarray(two_colours()).save(path, exif=exif, **options.get(suffix, {}))
    turned = np.asarray(ImageOps.exif_transpose(in_memory(two_colours(), exif)))
    image = read_image(path)
    assert image.shape == turned.shape
    assert np.abs(image.astype(int) - turned).max() < 12
    assert image_size(path) == check_image(path).upright_hw == turned.shape[:2]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_on_stored_pixels_follow_them_upright(tmp_path, orientation):
    stored = np.zeros((30, 50, 3), np.uint8)
    stored[4:9, 20:43] = 255
    path = tmp_path / "a.png"
    Image.fromarray(stored).save(path, exif=exif_with(orientation))
    boxes = upright_boxes(np.array([[20, 4, 43, 9]]), check_image(path))
    ys, xs = np.nonzero(read_image(path)[..., 0])
    assert boxes.tolist() == [[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]]


def test_no_boxes_stay_no_boxes(tmp_path):
    Image.fromarray(two_colours()).save(tmp_path / "a.jpg", exif=exif_with(6))
    assert upright_boxes(np.zeros((0, 4)), check_image(tmp_path / "a.jpg")).shape == (0, 4)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*\0\0\0\x08\0", b"Exif\0\0nonsense", b"Exif\0\0"])
def test_a_damaged_or_odd_exif_block_does_not_spoil_the_image(tmp_path, exif):
    Image.fromarray(two_colours()).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (40, 64, 3)


def test_an_orientation_out_of_range_counts_as_upright(tmp_path):
    Image.fromarray(two_colours()).save(tmp_path / "a.jpg", exif=exif_with(99))
    assert check_image(tmp_path / "a.jpg").orientation == 1


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_truncated_image_is_refused_with_its_path(tmp_path, suffix, share):
    data = io.BytesIO()
    Image.fromarray(noise()).save(data, FORMATS[suffix])
    path = tmp_path / f"half a{suffix}"
    path.write_bytes(data.getvalue()[: int(len(data.getvalue()) * share)])
    for function in (read_image, check_image):
        with pytest.raises(UserError) as error:
            function(path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\xff\xd8\xff\xd9"])
def test_what_is_no_image_is_refused_with_its_path(tmp_path, content):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    for function in (read_image, check_image, image_size):
        with pytest.raises(UserError, match=r"a\.jpg"):
            function(path)


def test_a_missing_image_and_a_folder_are_refused(tmp_path):
    for function in (read_image, check_image, image_size):
        with pytest.raises(UserError, match="no such file"):
            function(tmp_path / "absent.jpg")
        with pytest.raises(UserError, match=tmp_path.name):
            function(tmp_path)


def test_bytes_after_the_end_of_a_jpeg_do_no_harm(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(two_colours()).save(path)
    whole = read_image(path)
    path.write_bytes(path.read_bytes() + b"maker notes" * 100)
    assert np.abs(read_image(path).astype(int) - whole).max() <= 2
    check_image(path)


def test_the_size_of_a_jpeg_needs_its_header_alone(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(noise()).save(path, quality=95)
    path.write_bytes(path.read_bytes()[:2000])
    assert image_size(path) == (64, 96)


THREADS = """
import os
import cv2
import numpy as np
big = np.zeros((3000, 3000, 3), np.uint8)
cv2.GaussianBlur(big, (31, 31), 0)  # OpenCV starts its threads here, if it may
import data.image
threads = len(os.listdir("/proc/self/task"))
cv2.GaussianBlur(big, (31, 31), 0)
print(threads, len(os.listdir("/proc/self/task")), cv2.getNumThreads())
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux does")
def test_opencv_has_no_threads_that_a_forked_worker_would_wait_for():
    command = [sys.executable, "-c", THREADS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    before, after, used = map(int, done.stdout.split())
    assert (after, used) == (before, 1)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize("image_hw", [(64, 96), (61, 83)])
def test_a_reduced_image_has_a_pixel_for_each_square(tmp_path, suffix, reduction, image_hw):
    height, width = image_hw
    smooth = np.add.outer(np.arange(height), np.arange(width))[..., None].repeat(3, axis=2)
    path = tmp_path / f"x.{suffix}"
    Image.fromarray((60 + smooth).astype(np.uint8)).save(
        path, **({"quality": 98} if suffix == "jpg" else {})
    )
    image = read_image(path, reduction=reduction)
    assert image.shape == (-(-height // reduction), -(-width // reduction), 3)
    inner = image[: height // reduction, : width // reduction].astype(float)
    cells = np.add.outer(*(np.arange(n) for n in inner.shape[:2])) * reduction
    assert np.abs(inner[..., 1] - (60 + cells + reduction - 1)).max() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_image_is_turned_upright_too(tmp_path, orientation):
    image = np.zeros((48, 80, 3), np.uint8)
    image[:24, :40] = 250
    path = tmp_path / "x.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(image).save(path, quality=95, exif=exif)
    small, whole = read_image(path, reduction=4), read_image(path)
    assert small.shape[:2] == tuple(side // 4 for side in whole.shape[:2])
    middles = whole[2::4, 2::4].astype(int)
    assert (np.abs(middles - small) > 60).mean() < 0.05


def jpeg(mode="RGB", **options):
    data = io.BytesIO()
    Image.fromarray(noise()).convert(mode).save(data, "JPEG", **options)
    return data.getvalue()
