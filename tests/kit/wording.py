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
ERRORS: dict[str, str] = {
    "certificate_expired": "certificate {file} of {identity} expired at {time}",
    "no_bucket": "the bucket {bucket} does not exist; create it or correct persist_url",
    "no_room_for_chunks": "of step {step} for another layout: {size} bytes wanted, {free} of {capacity} free under quota",
    "storage_absent": "the directory {directory} does not exist on this node; mount or create it",
    "storage_forbidden": "let the user that runs backstayd read and write there",
    "storage_full": "No space left on device; free room there",
}

# Lines in the logs of daemons and coordinators, and what the library logs or warns in a trainer.
LOGS: dict[str, str] = {
    "certificate_renewed": "certificate {file} of {identity} was reloaded; valid until",
    "coder_ended": "coder {pid} ended with status {status} and {jobs} jobs; restarting it",
    "coordinator_connected": "connected to the coordinator at {address}",
    "coordinator_listens": "coordinator {incarnation} listens at {address}, http at",
    "coordinator_lost": "lost the coordinator, trying again: {why}",
    "distrusted_by_trainer": "after restoring step {base}: {what}. The snapshot of step {base} is distrusted",
    "folder_given_up": "the files of the last folder of {run} are not kept",
    "handshakes_ended": "{count} connections ended before a call",
    "http_request": " DEBUG {logger}GET {path}",
    "http_served": "http at {http}",
    "memory_unmounted": "memory directory {directory} was unmounted",
    "name_is_taken": "the node name '{name}' is taken",
    "new_certificate_unusable": "cannot connect with the new certificate, keeping the connection of the previous one: {why}",
    "no_coordinator": "no coordinator yet, trying again: {why}",
    "node_serves": "serves trainers at {socket}, peers at {peers}, http at",
    "not_reloaded": "SIGHUP: settings not reloaded: {why}",
    "nothing_to_reload": "SIGHUP: needs a restart: {left}",
    "reloaded": "SIGHUP: applied {taken}; needs a restart: {left}",
}

# What the command line prints.
COMMANDS: dict[str, str] = {
    "copy_under_way": "step {step} is being copied to {url}: {done} of {total}",
    "demo_equal": "bitwise equal: {steps} steps",
    "demo_refused": "Nothing was loaded and no rank continued",
    "demo_rolled": "{count} restarts cost no step, protected never went back",
    "distrusted_by_operator": "step {step} of {run} and every snapshot trained from it will not be restored again",
    "drained": "{node}: drained: it may be stopped",
    "durable_copies": "on durable storage in {url}",
    "explained": "{outcome} from step {step} (attempt",
    "exported": "{run} at step {step}: {count} tensors",
    "node_is_safe": "live, safe",
    "nodes_not_listed": "{count} healthy nodes are not listed",
    "not_draining": "{node}: no longer draining",
    "restart_would_repeat": "a restart now would repeat {steps} from the last",
    "trusted": "{run}: {count} snapshot trusted again",
    "watch_no_answer": "NO ANSWER: {why}",
    "watch_protected": "protected, survives {count} losses",
    "weaker_groups": "GROUPS weaker than planned: {count}",
    "without_memory": "Restored from durable storage alone",
}

# What the programs on the pages of docs/integrations print.
EXAMPLES: dict[str, str] = {
    "example_began": "began from step {step}",
    "example_complete": "complete: {is_complete}",
    "example_ended": "went on after step {step} and ended with {end}",
    "example_notes": "notes of step {step}",
}

# Sentences of the status: of a run, a decision, a node, an event, a health check, the page.
STATUS: dict[str, str] = {
    "adopting": "adopting the contents of {directory}",
    "alive": "alive: the decisions {seconds} s ago",
    "cannot_be_staged": "its shards exist, but staging them failed repeatedly ({reason})",
    "cannot_restore": "cannot restore {run} at step {step}: {why}",
    "coordinates": "ready: coordinates at {address}",
    "corrupt_on": "what {node} holds is corrupt",
    "distrusted": "it is distrusted ({reason})",
    "from_scratch": "from scratch",
    "gate_differs": "{tensor} is {found} on {rank}, expected {expected} as on {other}",
    "gate_not_loaded": "rank {rank} did not load step {step}: {why}",
    "gate_rank_died": "{ranks} died after loading step {step}",
    "gate_two_owners": "{what} is owned by {ranks}, expected one owner",
    "imported_all": "imported: model and optimizer state of {count} parameters loaded{rest}generators and extras untouched",
    "imported_model": "imported: model loaded, optimizer fresh, generators and extras untouched",
    "keep_an_older_one": "(keep = 2 of the coordinator) or a durable copy (persist_url); `backstay trust {run}`",
    "last_ran_on": "it last ran on {nodes}, which are away",
    "loop_hangs": "{loop} has not run for {seconds} s; the limit is {bound} s",
    "never_complete": "it never became complete",
    "no_room_before": "a moment ago the other nodes had no room for a copy of a new snapshot",
    "no_room_to_drain": "no other node can take the shards of {ranks} of step {step}",
    "no_snapshot_taken": "{ranks} taken no snapshot since restore()",
    "nobody_to_drain_to": "no other node remains that could take over what it holds",
    "node_connected": "; connected to the coordinator at {address}",
    "node_not_connected": "not connected to the coordinator at {address}",
    "node_silent": "{node} did not report for {lease} s",
    "nodes_counted": "nodes: {count} live",
    "none_protected_since": "no step after {step} is protected",
    "nothing_older": "no older step is in memory",
    "older_step": "restoring step {step}, not {newest}: {why}",
    "order_not_answered": "it has not confirmed the order yet",
    "page_is_collecting": "The coordinator has just started and is collecting reports",
    "page_is_stale": "This page shows the state of {time}",
    "page_protected": "protected survives the loss of any {count} nodes",
    "parts_not_reported": "parts of step {step} are on nodes that have not reported, and there is no other snapshot",
    "ranks_lost": "{ranks} lost ({why}; {losses} losses, parity covers {parity})",
    "restore_loop": "{run} restored step {step} {tries} times in a row without a newer snapshot",
    "run_finished": "{run} finished at step {step} on {day}",
    "run_freed": "{run} was freed at step {step} on {day}, after {idle} without a trainer",
    "similar_names": "runs with a name like it: {name} (step",
    "start_over": "choose a new run_id, or start over under this one with restore(allow_fresh=True)",
    "trainers_stay": "still runs on it ({trainers}): a restart of the daemon alone does not disturb them",
}

WORDING = ERRORS | LOGS | COMMANDS | EXAMPLES | STATUS

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
