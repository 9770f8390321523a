"""A user's mistake is one clear sentence, never a traceback."""

import errno
import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import NoReturn


class UserError(Exception):
    """What is wrong and what to do, in one sentence that is shown as it stands."""


class Unreachable(UserError):
    """This source cannot be had just now; another one may do."""


def explain_os_error(error: OSError) -> str:
    """The operating system's complaint as a plain sentence without a final stop."""
    name = getattr(error, "filename", None)
    where = f" ({name})" if name else ""
    if error.errno == errno.ENOSPC:
        return f"the disk is full{where}: free some space and run it again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write or read{where}: choose another folder"
    return f"{error.strerror or error}{where}"


@contextmanager
def os_errors(doing: str):
    """Turn an ``OSError`` inside the block into ``UserError("could not {doing}: …")``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"could not {doing}: {explain_os_error(error)}") from error


def cli(main: Callable[[list[str] | None], None]) -> NoReturn:
    """Run a command line: a ``UserError`` becomes one line on stderr and exit code 2."""
    try:
        main(None)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {explain_os_error(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
