"""What this machine has and what the course needs: `python -m lib.env`.

A line a requirement, the device, the precision, and the minutes of each notebook. Nothing heavy is
imported until it is needed, so this works on a bare machine too.
"""

import argparse
import platform
import sys

from lib.env.errors import cli
from lib.env.install import check, optional_kernels, requirements
from lib.env.machine import (
    check_python,
    choose_device,
    device_name,
    minutes_text,
    notebook_names,
    read_results,
)


def report(say=print) -> bool:
    """Print what this machine has; False where something is missing."""
    say(f"OK    python {platform.python_version()}")
    checks = [check(wanted, reason) for wanted, reason in requirements()]
    for found in checks:
        say(f"{'OK  ' if found.ok else 'FIX '}  {found.text}")
    say(f"      {optional_kernels()}")
    try:
        device, precision, why = choose_device()
        say(f"\ndevice      {device} ({device_name()})\nprecision   {precision}: {why}")
    # torch is missing or broken: any error may come out of its import
    except Exception as error:  # noqa: BLE001
        say(f"\ndevice      unknown: torch does not start ({str(error).splitlines()[0]})")
    measured = read_results("notebooks")
    say("\nminutes     full run, quick run")
    for name in notebook_names():
        found = measured.get(name, {})
        full, quick = (minutes_text(found.get(f"{kind}_minutes")) for kind in ("full", "quick"))
        where = found.get("full_run", {}).get("device")
        say(f"{name:<22} {full}, {quick}{f'  (on {where})' if where else ''}")
    return all(found.ok for found in checks)


def main(argv: list[str] | None = None) -> None:
    """The command line: check this machine; exit code 1 where something is missing."""
    description = "What this machine has and what the course needs."
    argparse.ArgumentParser(prog="python -m lib.env", description=description).parse_args(argv)
    check_python()
    if not report():
        sys.exit(1)


if __name__ == "__main__":
    cli(main)
