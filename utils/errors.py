"""One kind of error for everything that a user can fix, and the frame of every script."""

import sys
from collections.abc import Callable, Sequence

from utils.version import __version__


class UserError(ValueError):
    """Something that the user can fix: the message states what is wrong, where, and how to fix it.

    The scripts print the message alone and exit with status 2.
    """


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main. A UserError becomes its message on stderr and exit status 2.

    --version prints the version instead.
    """
    if "--version" in sys.argv[1:]:
        print(__version__)
        return
    try:
        main()
    except UserError as error:
        # One of a DataLoader's worker comes as text, behind its traceback.
        message = str(error).rpartition("utils.errors.UserError: ")[2].rstrip()
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def summarise(names: Sequence[str], limit: int = 4) -> str:
    """The first few names, and how many more there are."""
    more = [f"{len(names) - limit} more"] if len(names) > limit else []
    return ", ".join([*names[:limit], *more])
