"""A user's mistake is one clear sentence, never a traceback."""

import errno
import re
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import NoReturn

LONGEST = 2000  # letters of a sentence: a stranger's file may put a book where a word should be
UNSEEN = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")  # a terminal obeys them


class UserError(Exception):
    """What is wrong and what to do, in one sentence that is shown as it stands."""

    def __init__(self, sentence: str):
        if len(sentence) > LONGEST:
            half = LONGEST // 2
            sentence = f"{sentence[:half]} … {sentence[-half:]}"
        super().__init__(UNSEEN.sub(lambda found: ascii(found[0])[1:-1], sentence))


class Damaged(UserError):
    """This file's content is not what it should be; a copy of it may be whole."""


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


def escape_what_cannot_be_printed() -> None:
    """Let a terminal that knows few letters show an escape where it has no letter, and not fail."""
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):  # not where a notebook or a test has put its own
            output.reconfigure(errors="backslashreplace")


def cli(main: Callable[[list[str] | None], None]) -> NoReturn:
    """Run a command line: a ``UserError`` becomes one line on stderr and exit code 2.

    Ctrl-C ends it with the word "stopped" and exit code 130, also where a library that was just
    being imported turned the interruption into an error of its own.
    """
    interrupted = []

    def interrupt(*_) -> NoReturn:
        interrupted.append(True)
        raise KeyboardInterrupt

    escape_what_cannot_be_printed()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)
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
    except Exception:
        if not interrupted:
            raise
        print("stopped", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
