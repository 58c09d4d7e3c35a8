"""Bytes in a file that all processes map into their memory, kept for the next run."""

import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Sequence
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
        self._map: np.ndarray | None = None

    @property
    def pixels(self) -> np.ndarray:
        """(bytes,) uint8, not to be written to."""
        if self._map is None:
            # Not read-only, which torch would copy; what were written would stay in this process.
            self._map = np.memmap(self.path, np.uint8, mode="c")
        return self._map

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)  # another process maps it itself; a map would be copied


def pixel_file(
    folder: str, content: Sequence[tuple], size: int, parts: Iterable[np.ndarray]
) -> PixelFile:
    """The file in `folder` that holds `parts`, written unless it is there.

    content: for each part the path of the picture and what else its bytes depend on; with the
    pictures' sizes and times they make the file's name, so that a changed picture makes another.
    size: bytes of all parts. Two runs at once both write it, and one is kept.
    Raises UserError if the folder cannot be written or has no room.
    """
    path = Path(folder) / f"pictures-{_key(content)}.cache"
    if path.exists() and path.stat().st_size == size:
        return PixelFile(path)
    _make_room(path.parent, size)
    with replacing(path, tag=f"{os.getpid()}.unfinished") as file:
        for part in parts:
            file.write(part)
    return PixelFile(path)


def _key(content: Sequence[tuple]) -> str:
    digest = hashlib.sha256(str(VERSION).encode())
    for path, *rest in content:
        status = os.stat(path)
        facts = (os.path.abspath(path), status.st_size, status.st_mtime_ns, *rest)
        digest.update(repr(facts).encode())
    return digest.hexdigest()[:16]


def _make_room(folder: Path, size: int) -> None:
    """Make the folder, remove what killed runs have left unfinished, and see what is free."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(".pictures-*.unfinished"):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(
            f"cache_dir {folder}: cannot be used ({error}). Give a folder that can be written, or "
            "none: pictures beyond cache_gb are then decoded each time."
        ) from None
    if free < size:
        raise UserError(
            f"cache_dir {folder}: {size / 1e9:.1f} GB of decoded pictures do not fit into the "
            f"{free / 1e9:.1f} GB that are free. Make room (older pictures-*.cache files may go), "
            "give another folder, or none."
        )
