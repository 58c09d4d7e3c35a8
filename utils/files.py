"""Files that are replaced in one go: whoever reads them sees the old content or all of the new."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from utils.errors import UserError


@contextmanager
def replacing(path: str | Path, *, tag: str = "tmp") -> Iterator[BinaryIO]:
    """A file to write, flushed to disk and renamed over `path` if the block ends well.

    An error in the block leaves the old file alone. tag: another one for each of several processes
    that may write the same file at once. Raises UserError if it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{tag}")  # one name: what a crash left is written over
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
