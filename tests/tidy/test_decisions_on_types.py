"""No decision on prose: core and node never read the words of a reason, a message or a key.

What code decides on is an enum, a frozen key or a reason code under a name of its own; texts are for people and may change.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("daemon/backstayd/core", "daemon/backstayd/node", "daemon/backstayd/coordinator")
PROSE = ("reason", "message", "sentence", "detail", "text", "why", "key", "problem", "missing", "note")
READING = {"startswith", "endswith", "split", "rsplit", "partition", "rpartition", "find", "index", "removeprefix"}


def _is_prose(node: ast.expr) -> bool:
    """Whether the expression is called like something made for people, or like the name of a task."""
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name.rpartition("_")[2] in PROSE


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value != ""
    )


def _reads_prose(node: ast.AST) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr in READING and _is_prose(node.func.value)
    if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
        return _is_text(node.left) and _is_prose(node.comparators[0])
    if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq):
        sides = (node.left, node.comparators[0])
        return any(map(_is_text, sides)) and any(map(_is_prose, sides))
    return False


def test_no_decision_is_made_on_the_words_of_a_reason_a_message_or_a_key() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if _reads_prose(node)
    ]
    assert not found, "decide on an enum, a key or a named reason code instead"


def test_the_check_finds_what_it_looks_for() -> None:
    wrong = (
        '"slot" in session.skip_reason',
        'missing.startswith(" at step ")',
        'key.split(":")[1]',
        'error.reason == "no_space"',
    )
    right = (
        'reason == ""',
        "error.reason == FENCED",
        "key in running",
        '"rank" in fields',
        "session.skip_cause is NO_SLOT",
    )
    assert [any(map(_reads_prose, ast.walk(ast.parse(line)))) for line in (*wrong, *right)] == [True] * 4 + [False] * 5
