"""The operator's command without a cluster: what it prints for a status document, and its exit codes."""

from __future__ import annotations

import io
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backstay.errors import SnapshotNotFoundError, UnavailableError, UsageError
from backstayd import cli
from backstayd.cli import explain, snapshots, status, status_watch, tables
from backstayd.cli.coordinator_client import find_run
from tests.kit.wording import refuses


@pytest.fixture
def document() -> dict[str, Any]:
    """A status document with one run that lost a node and one healthy one."""
    shard = {"rank": 0, "nodes": ["node-01", "node-02"], "size_bytes": 3 << 20}
    degraded = {
        "run": "default/gpt",
        "world_id": "a" * 16,
        "world_size": 2,
        "attempt": 3,
        "trainer_count": 1,
        "redundancy": "DEGRADED(1)",
        "verdict": {"word": "degraded", "survives": 1, "reason": "node-03 was lost 2 s ago"},
        "forgotten_in_s": None,
        "behind": None,
        "distrusted": [],
        "storage": None,
        "complete_step": 13,
        "protected_step": 12,
        "interval_steps": 1,
        "decision": {
            "decision_id": "d1",
            "phase": "prepare",
            "outcome": "EXACT",
            "attempt": 3,
            "base": {"attempt": 2, "step": 12, "snapshot_id": "ab" * 32},
            "message": "waiting for node-02 to stage rank 1",
            "placements": [{"rank": 0, "node": "node-01"}],
            "sources": [{"rank": 1, "kind": "rebuild", "holders": ["node-02"]}],
        },
        "sessions": [{"rank": 0, "node": "node-01", "phase": "restoring", "last_step": 12}],
        "snapshots": [
            {
                "attempt": 2,
                "step": 12,
                "state": "degraded",
                "spares": 1,
                "snapshot_id": "ab" * 32,
                "shards": [shard],
                "missing": "rank 1 is on no live node; 4 of 4 fragments reachable",
            },
            {
                "attempt": 2,
                "step": 13,
                "state": "incomplete",
                "spares": 0,
                "snapshot_id": "",
                "shards": [],
                "missing": "",
            },
        ],
        "groups": [{"members": ["node-01", "node-02"], "k": 1, "m": 1, "spares": 0, "is_weak": True}],
        "quarantined": [
            {"node": "node-01", "what": "shard rank 1 of step 12", "attempt": 2, "step": 12, "reason": "chunk 3 crc"}
        ],
        "explain": {
            "outcome": "EXACT",
            "attempt": 2,
            "step": 12,
            "message": "every shard has a source",
            "sources": [
                {"rank": 0, "kind": "local", "holders": ["node-01"]},
                {"rank": 1, "kind": "rebuild", "holders": ["node-01", "node-02"]},
            ],
        },
    }
    other = {**degraded, "run": "vision/resnet", "decision": None, "quarantined": [], "snapshots": []}
    return {
        "format": 1,
        "role": "coordinator",
        "generation": {"number": 7, "incarnation": "c" * 16},
        "time_unix_s": 1_800_000_000.25,
        "is_settled": True,
        "nodes": [
            {
                "name": "node-01",
                "incarnation": "1" * 16,
                "bulk_address": "127.0.0.1:1",
                "domain": "",
                "version": "0.1.0",
                "state": "live",
                "used_bytes": 6 << 20,
                "capacity_bytes": 1 << 30,
                "corrupt_count": 1,
            }
        ],
        "runs": [degraded, other],
        "timeline": [
            {"time_unix_s": 1_800_000_000.0, "run": "", "kind": "node_lost", "message": "node-03: no word for 3 s"},
            {"time_unix_s": 1_800_000_000.1, "run": "default/gpt", "kind": "decided", "message": "step 12"},
        ],
    }


def test_columns_are_aligned_and_numbers_stand_to_the_right() -> None:
    text = tables.table(("NAME", "STEP"), [("a", 7), ("long-name", 1200), ("", None)])
    assert text.splitlines() == ["NAME       STEP", "a             7", "long-name  1200", "-             -"]


def test_an_empty_table_says_so() -> None:
    assert tables.table(("NAME",), []) == "(none)"


def test_status_shows_redundancy_reason_quarantine_and_the_last_events(document: dict[str, Any]) -> None:
    text = status.describe(document, events=1)
    assert "default/gpt" in text
    assert "DEGRADED(1)" in text
    assert "default/gpt: node-03 was lost 2 s ago" in text
    assert "recovery in phase prepare: waiting for node-02" in text
    assert "shard rank 1 of step 12 on node-01 is quarantined: chunk 3 crc" in text
    assert "decided" in text
    assert "node_lost" not in text, "only the last event was asked for"


def test_what_happens_at_every_snapshot_does_not_push_events_out(document: dict[str, Any]) -> None:
    routine = {"time_unix_s": 1_800_000_001.0, "run": "default/gpt", "kind": "protected", "message": "step 13"}
    document["timeline"] += [routine] * 20
    text = status.describe(document, events=2)
    assert "node_lost" in text
    assert "decided" in text
    assert "step 13" not in text


def test_watching_tells_every_event_of_one_moment_and_of_a_clock_that_is_behind(document: dict[str, Any]) -> None:
    def event(kind: str, message: str, time_unix_s: float) -> dict[str, Any]:
        return {"time_unix_s": time_unix_s, "run": "default/gpt", "kind": kind, "message": message}

    seen = status_watch.Changes()
    seen.take(document)
    at_once = [event("quarantined", "rank 1", 1_800_000_010.0), event("quarantined", "rank 2", 1_800_000_010.0)]
    document["timeline"] += at_once
    assert seen.take(document) == ["default/gpt: quarantined: rank 1", "default/gpt: quarantined: rank 2"]
    assert seen.take(document) == []
    document["timeline"] = [
        event("quarantined", "rank 3", 1_799_999_990.0),
        event("protected", "step 9", 1_799_999_999.0),
    ]
    assert seen.take(document) == ["default/gpt: quarantined: rank 3"], "another coordinator's clock; no routine"


HOSTILE = "\x1b]0;owned\x07nan\x9b2J\ndefault/gpt: all is well\u202e"


def test_words_of_a_trainer_neither_command_a_terminal_nor_pass_for_lines_of_ours(document: dict[str, Any]) -> None:
    run = document["runs"][0]
    run["distrusted"] = [{"snapshot_id": "x", "attempt": 2, "step": 12, "reason": HOSTILE}]
    run["verdict"]["reason"] = run["explain"]["message"] = run["decision"]["message"] = HOSTILE
    run["quarantined"][0]["reason"] = run["snapshots"][0]["missing"] = document["timeline"][1]["message"] = HOSTILE
    texts = [status.describe(document, events=9), explain.describe(run), snapshots.describe(run)]
    for text in [*texts, tables.as_json(document)]:
        assert all(line.isprintable() for line in text.split("\n"))
        assert "default/gpt: all is well" not in text.split("\n")
    assert r"distrusted: \x1b]0;owned\x07nan\x9b2J\ndefault/gpt: all is well\u202e" in texts[0]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_watching_shows_the_words_of_others_as_words(
    is_terminal: bool, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return is_terminal

    answers: Iterator[Any] = iter([document, UnavailableError(HOSTILE), KeyboardInterrupt()])

    def ask() -> dict[str, Any]:
        answer = next(answers)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(status_watch, "PERIOD_S", 0.0)
    document["runs"][0]["verdict"]["reason"] = document["nodes"][0]["state"] = HOSTILE
    screen = Screen()
    with pytest.raises(KeyboardInterrupt):
        status_watch.Watch(ask, lambda shown: status.describe(shown, events=9), screen).run()
    shown = screen.getvalue()
    for ours in (status_watch.ENTER, status_watch.LEAVE, "\x1b[H", "\x1b[K\r", "\x1b[J"):
        shown = shown.replace(ours, "")
    assert "owned" in shown
    assert all(line.isprintable() for line in shown.split("\n"))


def test_an_error_is_printed_without_what_commands_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["certs", "--ca-dir", "/proc/\x1b[2J", "--operator"]) == 78
    assert r"/proc/\x1b[2J" in capsys.readouterr().err


def test_everything_a_command_prints_passes_one_place() -> None:
    printing = re.compile(r"(?<!\w)print\(|std(out|err)\.write")
    assert not [path.name for path in Path(cli.__file__).parent.glob("*.py") if printing.search(path.read_text())]


def test_status_says_what_is_distrusted_and_why(document: dict[str, Any]) -> None:
    document["runs"][0]["distrusted"] = [{"snapshot_id": "x", "attempt": 2, "step": 12, "reason": "the loss is nan"}]
    assert "default/gpt: step 12 of attempt 2 is distrusted: the loss is nan" in status.describe(document, events=0)


def test_status_says_while_the_coordinator_settles(document: dict[str, Any]) -> None:
    document["is_settled"] = False
    assert "settling" in status.describe(document, events=0)


def test_snapshots_are_listed_newest_first_with_where_each_shard_is(document: dict[str, Any]) -> None:
    lines = snapshots.describe(document["runs"][0]).splitlines()
    assert lines[2].split()[0] == "13"
    assert lines[3].split()[0] == "12"
    assert "0@node-01+node-02" in lines[3]
    assert "3.0 MiB" in lines[3]
    assert lines[4] == "step 12: rank 1 is on no live node; 4 of 4 fragments reachable"


def test_explain_tells_source_of_each_shard_and_the_decision_in_force(document: dict[str, Any]) -> None:
    text = explain.describe(document["runs"][0])
    assert "EXACT from step 12 (attempt 2): every shard has a source" in text
    assert "rebuild  node-01, node-02" in text
    assert "phase prepare" in text


def test_a_run_is_found_by_its_full_name_or_by_a_run_id_that_is_alone(document: dict[str, Any]) -> None:
    assert find_run(document, "default/gpt") is document["runs"][0]
    assert find_run(document, "resnet") is document["runs"][1]


def test_a_run_id_of_two_jobs_must_be_said_in_full(document: dict[str, Any]) -> None:
    document["runs"][1]["run"] = "vision/gpt"
    with refuses(UsageError, "usage", "default/gpt", "vision/gpt"):
        find_run(document, "gpt")


def test_an_unknown_run_names_the_known_ones(document: dict[str, Any]) -> None:
    with refuses(SnapshotNotFoundError, "unknown_run", "default/gpt", "vision/resnet"):
        find_run(document, "gtp")


@pytest.mark.parametrize("command", [["status"], ["snapshots"], ["explain", "r"], ["forget", "default/r"]])
def test_without_a_coordinator_a_command_says_what_to_do_and_exits_69(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as bound:  # bound but not listening: connections are refused
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        assert cli.main([*command, "--coordinator", address, "--timeout-s", "2"]) == 69
    captured = capsys.readouterr()
    assert f"no coordinator answers at {address}" in captured.err
    assert "--coordinator HOST:PORT or BACKSTAY_COORDINATOR" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: COMMAND"),
        (["stauts"], "invalid choice: 'stauts'"),
        (["explain"], "required: RUN"),
        (["status", "--coordinator", "nowhere"], "--coordinator 'nowhere' is not HOST:PORT"),
        (["status", "--timeout-s", "0"], "'0' is not a positive number of seconds"),
        (["forget", "a/b/c"], "'b/c'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_64(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 64
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_document_round_trips_as_json(document: dict[str, Any]) -> None:
    assert json.loads(tables.as_json(document)) == document


def test_a_call_with_neither_certificates_nor_insecure_says_how_to_have_either(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("BACKSTAY_INSECURE")
    assert cli.main(["status"]) == 78
    message = capsys.readouterr().err
    assert "backstay certs --ca-dir DIR --operator" in message
    assert "--insecure" in message
    assert cli.main(["status", "--tls-cert", "/c.pem"]) == 78
    assert "missing: --tls-key, --tls-ca" in capsys.readouterr().err
