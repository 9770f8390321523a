"""What every exercise of the notebooks ends with: its check, run without stopping the notebook."""

import ctypes
import inspect
import threading
import traceback
from collections.abc import Callable
from contextlib import contextmanager

SECONDS = 20  # that a check may take; a right answer needs a moment


class TooLong(BaseException):
    """The time is up.

    No `Exception`, so that an `except Exception` in a reader's code lets it through.
    """


def attempt(check: Callable[[], None]) -> bool:
    """Run a check and print "solved", or what is still missing; returns which.

    It has `SECONDS` seconds.
    """
    try:
        with time_limit(SECONDS):
            check()
    except TooLong:
        print(
            f"not yet: stopped after {SECONDS:g} seconds. Does a loop never end, "
            "or does one more item double the work?"
        )
        return False
    except Exception as error:  # noqa: BLE001  whatever a reader's code raises
        print(f"not yet: {missing(error, check)}")
        return False
    print("solved")
    return True


@contextmanager
def time_limit(seconds: float):
    """Raise `TooLong` in this thread, between two steps of Python, after `seconds` in the block.

    A signal would do the same, but only in the main thread, and not on Windows.
    """
    here, over = ctypes.c_ulong(threading.get_ident()), threading.Event()

    def watch():
        # tenth by tenth of a second, so that a machine that sleeps loses one of them
        for _ in range(round(10 * seconds)):
            if over.wait(0.1):
                return
        ctypes.pythonapi.PyThreadState_SetAsyncExc(here, ctypes.py_object(TooLong))

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def missing(error: Exception, check: Callable[[], None]) -> str:
    """One line on what is missing.

    It is the check's own words, a `return`, or the error and its place in the cell.
    """
    first = next(iter(str(error).splitlines()), "")
    check = inspect.unwrap(check)  # of torch.no_grad
    cell = check.__code__.co_filename
    where = [
        frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == cell
    ][-1]
    if isinstance(error, AssertionError):
        return first or f"this should hold: {(where.line or 'the check').removeprefix('assert ')}"
    # an error in the check's own line: it was given None
    if "NoneType" in first and (where.name == check.__name__ or where.name.startswith("<")):
        return "there is None where a value is needed: does the function return its result yet?"
    what = first or "without a word"
    return f"{type(error).__name__}, {what} (in {where.name}, line {where.lineno})"
