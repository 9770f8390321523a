"""What every exercise of the notebooks ends with: its check, run without stopping the notebook."""

import inspect
import traceback
from collections.abc import Callable


def attempt(check: Callable[[], None]) -> bool:
    """Run a check and print "solved", or what is still missing; returns which."""
    try:
        check()
    except Exception as error:  # noqa: BLE001  whatever a reader's code raises
        print(f"not yet: {missing(error, check)}")
        return False
    print("solved")
    return True


def missing(error: Exception, check: Callable[[], None]) -> str:
    """One line on what is missing: the check's own words, a `return`, or the error and its place in the cell."""
    first = next(iter(str(error).splitlines()), "")
    check = inspect.unwrap(check)  # of torch.no_grad
    cell = check.__code__.co_filename
    where = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == cell][-1]
    if isinstance(error, AssertionError):
        return first or f"this should hold: {(where.line or 'the check').removeprefix('assert ')}"
    if "NoneType" in first and (where.name == check.__name__ or where.name.startswith("<")):  # the check's own line
        return "there is None where a value is needed: does the function return its result yet?"
    return f"{type(error).__name__}, {first or 'without a word'} (in {where.name}, line {where.lineno})"
