"""The wording that tests look at: one table of example sentences, and how a test refers to it.

Words may change; what a test asserts is the class and the ``reason`` of an error and the facts in its message (``refuses``).
Only where no reason, field or metric tells what happened does a test look at words, and then at a sentence of this table, by
its key (``says``): a log line, what a command prints, a sentence of the status. Whoever rewrites a message edits it here.

A ``{placeholder}`` stands for a fact: the value that the test gives, else any text on one line.
``tests/tidy/test_wording.py`` finds wording outside this table, and keys that no test uses.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator

import pytest

from backstay.errors import BackstayError

# What an error says to users beyond its reason and the facts: above all the next step.
ERRORS: dict[str, str] = {}

# Lines in the logs of daemons and coordinators, and what the library logs or warns in a trainer.
LOGS: dict[str, str] = {}

# What the command line prints.
COMMANDS: dict[str, str] = {}

# Sentences of the status: of a run, a node, an event, a health check.
STATUS: dict[str, str] = {}

WORDING = ERRORS | LOGS | COMMANDS | STATUS

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@contextlib.contextmanager
def refuses(
    error_class: type[BackstayError] | tuple[type[BackstayError], ...], reason: str, *facts: object
) -> Iterator[pytest.ExceptionInfo[BackstayError]]:
    """Assert that the block raises this class for this reason, with every fact (a number, a name, a path) in the message."""
    with pytest.raises(error_class) as caught:
        yield caught
    message = str(caught.value)
    assert caught.value.reason == reason, message
    missing = [fact for fact in facts if str(fact) not in message]
    assert not missing, f"{missing} not in: {message}"


def says(key: str, text: str | Iterable[str], **facts: object) -> bool:
    """Whether the sentence of that key, with these facts, stands in a text (or in one of several)."""
    return count_of(key, text, **facts) > 0


def count_of(key: str, text: str | Iterable[str], **facts: object) -> int:
    """How often the sentence of that key, with these facts, stands in a text (or in several)."""
    return len(_pattern(key, facts).findall(_as_text(text)))


def facts_of(key: str, text: str | Iterable[str], **facts: object) -> dict[str, str]:
    """What stands in a text for the placeholders of the sentence of that key, where it stands first."""
    found = _pattern(key, facts).search(_as_text(text))
    assert found, f"not said: {WORDING[key]} {facts or ''}\n{_as_text(text)}"
    return found.groupdict()


def line_of(key: str, text: str | Iterable[str], **facts: object) -> str:
    """The first line of a text with the sentence of that key."""
    lines = _as_text(text).splitlines()
    found = [line for line in lines if says(key, line, **facts)]
    assert found, f"not said: {WORDING[key]} {facts or ''}\n{_as_text(text)}"
    return found[0]


def _as_text(text: str | Iterable[str]) -> str:
    return text if isinstance(text, str) else "\n".join(text)


def _pattern(key: str, facts: dict[str, object]) -> re.Pattern[str]:
    sentence = WORDING[key]
    unknown = facts.keys() - set(_PLACEHOLDER.findall(sentence))
    assert not unknown, f"{key} has no placeholder for {sorted(unknown)}: {sentence}"
    pattern, seen = "", set[str]()
    for literal, name in re.findall(r"([^{]*)(?:\{(\w+)\}|$)", sentence):
        pattern += re.escape(literal)
        if name in facts:
            pattern += re.escape(str(facts[name]))
        elif name in seen:
            pattern += f"(?P={name})"
        elif name:  # up to what follows it in the sentence, or to the end of the line
            pattern += f"(?P<{name}>.+{'' if sentence.endswith(f'{{{name}}}') else '?'})"
            seen.add(name)
    return re.compile(pattern)
