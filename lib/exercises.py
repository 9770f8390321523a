"""What every exercise of the notebooks ends with: its check, run without stopping the notebook."""

from collections.abc import Callable


def attempt(check: Callable[[], None]) -> bool:
    """Run a check and print "solved", or what is still missing; returns which."""
    try:
        check()
    except Exception as error:  # noqa: BLE001  whatever a reader's code raises
        first = next(iter(str(error).splitlines()), "")
        print(f"not yet: {type(error).__name__}: {first}".rstrip(": "))
        return False
    print("solved")
    return True
