"""Tests do not hold words fast: wording is asserted through the table of ``tests/kit/wording.py`` alone.

An assertion on wording is a literal with prose (two words of letters beside each other) that a test compares with something:
as ``match=``, as a side of ``==``, ``!=``, ``in`` or ``not in``, or as what a string method or a regular expression looks for.
A name counts as its literals where it is bound to some in the same file: by an assignment, a ``for``, ``parametrize``, or as a
parameter of a function that a test calls with them. What is handed to the code under test (input data, command lines), keys of
mappings and the explanation of an ``assert`` are none.
Text that a test puts in itself and sees again is made of single words.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.wording import WORDING

TESTS = Path(__file__).parents[1]
PROSE = re.compile(r"[^\W\d_]{2,}['`)]?[,;:]? ['`(]?[^\W\d_]{2,}")
TABLE = TESTS / "kit" / "wording.py"
# How many there still are: may only fall.
ALLOWED = {"component": 193, "tidy": 5, "unit": 138}
_SEEKING = {
    "match",
    "fullmatch",
    "search",
    "findall",
    "finditer",
    "compile",
    "startswith",
    "endswith",
    "count",
    "index",
    "find",
}
_SEEKING |= {"partition", "rpartition", "split", "removeprefix", "removesuffix"}


@pytest.mark.parametrize("tier", sorted(path.name for path in TESTS.iterdir() if any(path.glob("*.py"))))
def test_wording_is_asserted_through_the_table_alone(tier: str) -> None:
    found = [
        f"{path.relative_to(TESTS)}:{line}: {text}"
        for path in sorted((TESTS / tier).rglob("*.py"))
        if path != TABLE
        for line, text in sorted(set(_asserted_wording(ast.parse(path.read_text(encoding="utf-8")))))
    ]
    assert len(found) <= ALLOWED.get(tier, 0), "\n".join(found)


def test_every_sentence_of_the_table_is_used() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in sorted(TESTS.rglob("*.py")) if path != TABLE)
    assert not [key for key in WORDING if f'"{key}"' not in source]


@pytest.mark.parametrize(
    "code",
    [
        'with raises(E, match=r"no .*such file"): pass',
        'assert "of no" in text',
        'assert text == f"{name} is not here, friend"',
        'assert lines == ["ok", "not ok"]',
        'wait(lambda: text.startswith("the node"))',
        'for word in ("all is well", "ok"):\n    assert word in text',
        '@pytest.mark.parametrize(("n", "words"), [(1, "too short")])\ndef test(n, words):\n    assert words in f(n)',
        'def wait(what): return what in log\nwait("is lost")',
        "with raises(E, match=fact): pass",
    ],
)
def test_wording_is_found_by_its_syntax(code: str) -> None:
    assert len(list(_asserted_wording(ast.parse(code)))) == 1


def test_what_is_no_wording_is_let_be() -> None:
    code = """
run(["backstay", "status"], "some input data")
assert reply["some key"] == {"a key": 3}, "an explanation"
assert parse("a b c") == "two-words" and "node-1" in text
"""
    assert not list(_asserted_wording(ast.parse(code)))


def _asserted_wording(tree: ast.Module) -> Iterator[tuple[int, str]]:
    bound = _bound_literals(tree)
    for node in ast.walk(tree):
        sides: list[ast.expr] = []
        if isinstance(node, ast.keyword) and node.arg == "match":
            sides = [node.value]
            if not list(_literals(node.value)):
                yield node.value.lineno, f"match={ast.unparse(node.value)}"
                continue
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _SEEKING:
            sides = node.args
        for side in sides:
            literals = list(_literals(side))
            literals += [found for name in _names(side) for found in bound[name]]
            yield from ((line, text) for line, text in literals if PROSE.search(text))


def _bound_literals(tree: ast.Module) -> dict[str, list[tuple[int, str]]]:
    """Names of a file and the literals that they are bound to, wherever in it."""
    bound: dict[str, list[tuple[int, str]]] = defaultdict(list)
    parameters = {
        node.name: [argument.arg for argument in node.args.args]
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                _bind(bound, target, [node.value])
        elif isinstance(node, ast.AnnAssign) and node.value:
            _bind(bound, node.target, [node.value])
        elif isinstance(node, ast.For | ast.comprehension):
            _bind(bound, node.target, _elements(node.iter))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "parametrize":
            names, rows = node.args[0], _elements(node.args[1])
            for index, name in enumerate(_parametrized(names)):
                cells = [_elements(row)[index : index + 1] for row in rows] if isinstance(names, ast.Tuple) else [rows]
                bound[name] += [found for cell in cells for value in cell for found in _literals(value)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            for name, value in zip(parameters.get(node.func.id, []), node.args, strict=False):
                bound[name] += _literals(value)
            for keyword in node.keywords:
                if keyword.arg in parameters.get(node.func.id, []):
                    bound[str(keyword.arg)] += _literals(keyword.value)
    return bound


def _bind(bound: dict[str, list[tuple[int, str]]], target: ast.expr, values: list[ast.expr]) -> None:
    if isinstance(target, ast.Name):
        bound[target.id] += [found for value in values for found in _literals(value)]
    elif isinstance(target, ast.Tuple):
        for index, part in enumerate(target.elts):
            _bind(bound, part, [cell for value in values for cell in _elements(value)[index : index + 1]])


def _parametrized(names: ast.expr) -> list[str]:
    return [text.strip() for _, literal in _literals(names) for text in literal.split(",")]


def _elements(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return node.elts
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "param":
        return node.args
    return list(node.values) if isinstance(node, ast.Dict) else []


def _names(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Name):
        yield node.id


def _literals(node: ast.expr) -> Iterator[tuple[int, str]]:
    """The strings of an expression that is nothing but literals; ``{}`` where an f-string has a value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
        yield node.lineno, node.value if isinstance(node.value, str) else node.value.decode("latin-1")
    elif isinstance(node, ast.JoinedStr):
        yield node.lineno, "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    elif isinstance(node, ast.BinOp):
        for part in (node.left, node.right):
            yield from _literals(part)
    else:
        for element in _elements(node):
            yield from _literals(element)
