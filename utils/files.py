"""Replace files in one go: a reader sees the old content or all of the new."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from utils.errors import UserError


@contextmanager
def replacing(path: str | Path, *, tag: str = "tmp") -> Iterator[BinaryIO]:
    """Open a file to write; if the block succeeds, it is flushed to disk and renamed to `path`.

    An error in the block leaves the old file unchanged.

    Args:
        tag: A different one for each of several processes that may write the same file at once.

    Raises:
        UserError: If the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{tag}")  # fixed: a crash's file is overwritten
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # On a full disk torch.save raises a RuntimeError while it handles the OSError.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"{path}: cannot write the file ({cause}).") from None
    finally:
        with suppress(OSError):  # gone after the renaming, or never made
            temporary.unlink()
