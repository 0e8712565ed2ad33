"""Names of runs that exist and look like one that is new: a mistyped run_id begins at step 0 otherwise without a word. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from backstayd.core.sentences import listed

MOST = 3
LIKENESS = 0.8  # of difflib: one wrong letter in five is still like it


def near_sentence(run: str, known: Mapping[str, str]) -> str:
    """Which of ``known`` (run to what became of it) have a name like ``run``; "" for none."""
    lowered = {name.lower(): name for name in sorted(known) if name != run}
    found = [lowered[name] for name in difflib.get_close_matches(run.lower(), lowered, n=MOST, cutoff=LIKENESS)]
    if not found:
        return ""
    return f"; runs with a name like it: {listed(f'{name} ({known[name]})' for name in found)}"
