"""Bytes in a file that all processes map into their memory, kept for the next run."""

import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.files import replacing

VERSION = 1  # of what the bytes mean
STALE_SECONDS = 3600  # an unfinished file that was not written to for as long has no writer


class PixelFile:
    """A finished file. Its pages are the system's: they go when memory is short, and come back."""

    def __init__(self, path: Path):
        self.path = path
        self.pixels = np.memmap(path, np.uint8, mode="r")  # (bytes,)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)  # another process maps it itself; a map would be copied


def pixel_file(
    folder: str, content: Sequence[tuple], size: int, parts: Iterable[np.ndarray]
) -> PixelFile:
    """The file in `folder` that holds `parts`, written unless it is there.

    content: for each part the path of the image and what else its bytes depend on; with the
    images' sizes and times they make the file's name, so that a changed image makes another.
    size: bytes of all parts, at least 1. Two runs at once both write it, and one is kept.
    Raises UserError if the folder cannot be used or has no room, or an image is gone.
    """
    try:
        path = Path(folder) / f"images-{_key(content)}.cache"
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(path.parent)
        if not _is_whole(path, size):
            _check_room(path.parent, size)
            _write(path, size, parts)
        return PixelFile(path)
    except OSError as error:
        raise UserError(
            f"cache_dir {folder}: cannot be used ({error}). Give a folder that can be written, or "
            "none: images beyond cache_gb are then decoded each time."
        ) from None


def _key(content: Sequence[tuple]) -> str:
    digest = hashlib.sha256(str(VERSION).encode())
    for path, *rest in content:
        status = os.stat(path)
        metadata = (os.path.abspath(path), status.st_size, status.st_mtime_ns, *rest)
        digest.update(repr(metadata).encode())
    return digest.hexdigest()[:16]


def _is_whole(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


def _write(path: Path, size: int, parts: Iterable[np.ndarray]) -> None:
    try:
        with replacing(path, tag=f"{uuid.uuid4().hex}.unfinished") as file:
            for part in parts:
                file.write(part.data)
    except UserError:
        if not _is_whole(path, size):  # another run may have finished it meanwhile
            raise


def _remove_unfinished(folder: Path) -> None:
    """Remove what killed runs have left."""
    for path in folder.glob(".images-*.unfinished"):
        with suppress(OSError):  # gone already, or another user's
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"cache_dir {folder}: {size / 1e9:.1f} GB of decoded images do not fit into the "
            f"{free / 1e9:.1f} GB that are free. Make room (images-*.cache of earlier runs and "
            ".images-*.unfinished of killed ones may go), give another folder, or none."
        )
