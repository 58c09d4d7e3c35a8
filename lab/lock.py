"""One comparison at a time in a folder, its trainings included."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.runlog import is_running, lock
from utils.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # a module that is not there has no other form


@contextmanager
def folder_lock(save_dir: Path) -> Iterator[tuple[int, ...]]:
    """Hold a folder. Yields the file descriptors for `pass_fds` of every child.

    The lock belongs to the open file: a child that inherits it holds the folder even when this
    process was killed. Windows has nothing like it: there, only a living parent keeps others out.
    Raises UserError if the folder is held.
    """
    path = save_dir / "comparing.pid"
    if fcntl is None:
        lock(path)
        try:
            yield ()
        finally:
            path.unlink(missing_ok=True)
        return
    # The file stays: were it removed, two could each hold a file of this name.
    with open(path, "a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(_held(save_dir, path)) from None
        file.truncate(0)
        print(os.getpid(), file=file, flush=True)
        yield (file.fileno(),)


def _held(save_dir: Path, path: Path) -> str:
    """By whom, and what to do about it."""
    number = path.read_text(encoding="ascii").strip()
    if number.isdigit() and is_running(int(number)):
        return f"{save_dir} is in use by process {number}. Wait for it, or give another --save_dir."
    locks = sorted(save_dir.glob("runs/*/*/running.pid"))
    numbers = [own.read_text(encoding="ascii").strip() for own in locks]
    living = [own for own in numbers if own.isdigit() and is_running(int(own))]
    kill = f" (kill {' '.join(living)}; it saves itself)" if living else ""
    return (
        f"{save_dir} is in use by a training or evaluation that process {number or '?'} had "
        f"started before it was killed. Wait for it or end it{kill}, then start again."
    )
