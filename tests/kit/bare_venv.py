"""A virtual environment with what `pip install` of the README brings, and nothing else that this machine has.

Nothing is downloaded: the distributions are those of the running environment, found by following what each one's metadata
requires, and linked. So it shows what is *declared* to be needed, not what an index would serve today.
"""

from __future__ import annotations

import os
import re
import tomllib
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def readme_extras() -> set[str]:
    """The extras of the install line in README.md."""
    (found,) = re.findall(r"^    pip\s+install '\.\[([a-z,]+)\]'$", (ROOT / "README.md").read_text(), re.MULTILINE)
    return set(found.split(","))


def required(extras: set[str]) -> set[str]:
    """Every distribution that backstay with ``extras`` requires, directly or not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    todo = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    found: set[str] = set()
    while todo:
        requirement = Requirement(todo.pop())
        is_wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if requirement.name in found or not is_wanted:
            continue
        try:
            todo += distribution(requirement.name).requires or []
        except PackageNotFoundError:
            raise AssertionError(f"{requirement} is required and not installed here") from None
        found.add(requirement.name)
    return found


def make(directory: Path, extras: set[str]) -> Path:
    """Make the environment; its Python."""
    venv.create(directory, with_pip=False, symlinks=True)
    (site,) = directory.glob("lib/python*/site-packages")
    for name in required(extras):
        installed = distribution(name)
        for top in {file.parts[0] for file in installed.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            _link(Path(str(installed.locate_file(top))), site / top)
    _link(ROOT / "client" / "backstay", site / "backstay")
    _link(ROOT / "daemon" / "backstayd", site / "backstayd")
    return directory / "bin" / "python"


def _link(target: Path, path: Path) -> None:
    if not path.exists():
        os.symlink(target, path)
