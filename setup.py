"""`pip install .` gives the package `state_space_music`;
everything else about it is in pyproject.toml.

Inside the repository the package is called `lib`, and notebooks, tests and commands import that. So
short a name would collide in a stranger's environment, so the wheel holds the same files under a
name of its own: here they are copied, and `lib.scan` in them becomes `state_space_music.scan`, in
imports and in the commands that their messages name. An alias that is set up while Python imports
would need no copy, but would leave a `lib` behind for everybody else, and two names for one class.

`lib.lab` stays behind: it measures the repository.
"""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

NAME = "state_space_music"
ROOMS = ("env", "music", "show", "scan", "mamba", "train", "generate")
PACKAGES = {f"{NAME}.{room}": f"lib/{room}" for room in ROOMS} | {NAME: "lib"}
# `lib.scan`, and `from lib import mamba`
OLD_NAME = re.compile(rf"\blib(?=\.(?:{'|'.join(ROOMS)})\b| import )")


class Build(build_py):
    """Copies the files; each Python file then names the package as it is called where it goes."""

    def build_module(self, module, source, package):
        target, _ = super().build_module(module, source, package)
        path = Path(target)
        path.write_text(OLD_NAME.sub(NAME, path.read_text(encoding="utf-8")), encoding="utf-8")
        return target, True


setup(
    packages=sorted(PACKAGES),
    package_dir=PACKAGES,
    package_data={"": ["*.cpp", "*.h", "*.js"]},
    cmdclass={"build_py": Build},
)
