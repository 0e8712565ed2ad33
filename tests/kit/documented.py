"""The programs printed in the documentation, as files: what a page shows is what the tests run."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def write_example(page: str, name: str, directory: Path) -> Path:
    """Write the code block of ``docs/<page>`` whose first line is ``# <name>`` to a file of that name."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if block.startswith(f"# {name}\n"))
    path = directory / name
    path.write_text(block, encoding="utf-8")
    return path
