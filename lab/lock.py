"""Only one comparison at a time in a folder, including its trainings."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.runlog import is_running, lock
from utils.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # None in place of a missing module


@contextmanager
def folder_lock(save_dir: Path) -> Iterator[tuple[int, ...]]:
    """Lock the folder of a comparison.

    The lock belongs to the open file: a child that inherits it holds the folder even after this
    process was killed. Windows has no such lock: there, only a living parent keeps others out.

    Yields:
        The file descriptors for `pass_fds` of every child.

    Raises:
        UserError: If the folder is locked.
    """
    path = save_dir / "comparing.pid"
    if fcntl is None:
        lock(path)
        try:
            yield ()
        finally:
            path.unlink(missing_ok=True)
        return
    # The file stays: otherwise two processes could each lock a file of this name.
    with open(path, "a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(_held(save_dir, path)) from None
        file.truncate(0)
        print(os.getpid(), file=file, flush=True)
        yield (file.fileno(),)


def _held(save_dir: Path, path: Path) -> str:
    """Who holds the folder, and what to do about it."""
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
