"""The programs printed in the documentation, as files: what a page shows is what the tests run."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def write_example(page: str, name: str, directory: Path) -> Path:
    """Write the code block of ``docs/<page>`` whose first line is ``# <name>`` to a file of that name."""
    (block,) = (block for block in _blocks(page, "python") if block.startswith(f"# {name}\n"))
    path = directory / name
    path.write_text(block, encoding="utf-8")
    return path


def write_script(page: str, name: str, directory: Path) -> Path:
    """Write the shell script of ``docs/<page>`` whose second line begins with ``# <name>:`` to a file that can be run."""
    (block,) = (block for block in _blocks(page, "sh") if block.startswith(f"#!/bin/sh\n# {name}: "))
    path = directory / name
    path.write_text(block, encoding="utf-8")
    path.chmod(0o755)
    return path


def _blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
