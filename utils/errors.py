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
    except (UserError, KeyboardInterrupt) as error:
        sys.exit(report(error))


def report(error: BaseException) -> int:
    """Print an error as a script's user sees it.

    A UserError is printed as its message alone, an unexpected error with its traceback.

    Returns:
        The exit status.
    """
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, UserError):
        # One from a DataLoader worker arrives as text, after its traceback.
        message = str(error).rpartition("utils.errors.UserError: ")[2].rstrip()
        print(f"error: {message}", file=sys.stderr)
        return 2
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    sys.excepthook(type(error), error, error.__traceback__)
    return 1


def summarise(names: Sequence[str], limit: int = 4) -> str:
    """The first few names, and how many more there are."""
    more = [f"{len(names) - limit} more"] if len(names) > limit else []
    return ", ".join([*names[:limit], *more])
