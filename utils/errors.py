"""One kind of error for everything that a user can mend."""

import sys
from collections.abc import Callable, Sequence


class UserError(ValueError):
    """Something that the user can mend: its message says what, where and how.

    The scripts print the message alone and exit with status 2.
    """


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main: a UserError becomes its message on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def summarise(names: Sequence[str], limit: int = 4) -> str:
    """The first few names, and how many more there are."""
    more = [f"{len(names) - limit} more"] if len(names) > limit else []
    return ", ".join([*names[:limit], *more])
