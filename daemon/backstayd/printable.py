"""Escapes untrusted text, such as a reason that a trainer sends, before it reaches a terminal or a text log.

Everything that the commands print passes here. Standard library only; must not know where the text comes from.
"""

from __future__ import annotations

from typing import Any, TextIO


def printable(text: str) -> str:
    r"""``text`` on one line: unprintable characters, also line ends and terminal sequences, as escapes (``\x1b``)."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def printable_lines(text: str) -> str:
    """The same for text whose line ends were added by us."""
    return "\n".join(map(printable, text.split("\n")))


def printable_values(document: Any) -> Any:
    """Plain JSON values with every string made :func:`printable`."""
    if isinstance(document, str):
        return printable(document)
    if isinstance(document, list):
        return [printable_values(value) for value in document]
    if isinstance(document, dict):
        return {printable_values(key): printable_values(value) for key, value in document.items()}
    return document


def say(text: str, stream: TextIO | None = None) -> None:
    """Print :func:`printable_lines`, by default on standard output."""
    print(printable_lines(text), file=stream)
