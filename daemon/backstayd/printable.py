"""Words of others, such as the reason a trainer gives, on their way to a terminal or a text log: they stay words.

Everything the commands print passes here. Standard library alone; must not know where words come from.
"""

from __future__ import annotations

from typing import Any, TextIO


def printable(text: str) -> str:
    r"""``text`` on one line: what is not printable, line ends and terminal sequences too, as its escape (``\x1b``)."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def printable_lines(text: str) -> str:
    """The same for text whose line ends are our own."""
    return "\n".join(map(printable, text.split("\n")))


def printable_values(document: Any) -> Any:
    """Plain JSON values with every text in them made :func:`printable`."""
    if isinstance(document, str):
        return printable(document)
    if isinstance(document, list):
        return [printable_values(value) for value in document]
    if isinstance(document, dict):
        return {printable_values(key): printable_values(value) for key, value in document.items()}
    return document


def say(text: str, stream: TextIO | None = None) -> None:
    """Print :func:`printable_lines`, on standard output unless told otherwise."""
    print(printable_lines(text), file=stream)
