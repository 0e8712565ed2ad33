"""Each message that the troubleshooting page quotes exists in the code, in that order of words."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
GAP = "…"


def quoted() -> list[str]:
    return [line[2:].strip() for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("> ")]


def said_by_the_code() -> list[str]:
    """Every text of the code; what is filled in is a gap."""
    found = []
    for path in [*ROOT.glob("client/**/*.py"), *ROOT.glob("daemon/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(p.value) if isinstance(p, ast.Constant) else GAP for p in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[a-z.0-9]*[sdrfg]", GAP, node.value))
    return found


TEXTS = said_by_the_code()


@pytest.mark.parametrize("message", sorted(set(quoted())))
def test_a_quoted_message_exists(message: str) -> None:
    pattern = ".*".join(re.escape(part.strip()) for part in message.split(GAP) if part.strip())
    assert len(pattern) > 8, "a quotation says something"
    assert any(re.search(pattern, text, re.DOTALL) for text in TEXTS), f"no code says {message!r}"


def test_the_page_links_to_pages_that_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE.read_text(encoding="utf-8")):
        assert (PAGE.parent / target).is_file(), target
