"""Names of runs that exist and look like one that is new: a mistyped run_id begins at step 0 otherwise without a word. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from backstayd.core.sentences import listed

MOST = 3
LIKENESS = 0.8  # of difflib: one wrong letter in five is still like it


def near_sentence(run: str, known: Mapping[str, str]) -> str:
    """Which of ``known`` (run to what became of it) have a name like ``run``; "" for none.

    Its job must be the same and its run_id like it, or its run_id the same and its job another.
    """
    job, _, run_id = run.partition("/")
    parts = {name: name.partition("/") for name in sorted(known) if name != run}
    lowered = {other.lower(): name for name, (of, _, other) in parts.items() if of == job}
    close = difflib.get_close_matches(run_id.lower(), lowered, n=MOST, cutoff=LIKENESS)
    found = [lowered[name] for name in close]
    found += [name for name, (of, _, other) in parts.items() if of != job and other == run_id]
    if not found:
        return ""
    return f"; runs with a name like it: {listed(f'{name} ({known[name]})' for name in found[:MOST])}"
