"""Fault points in real processes: each action, at its position, its count, its once, and never by mistake."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

DEADLINE_S = 60


def run(faults: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` with ``reach`` in scope, in a process group of its own."""
    environment = dict(os.environ) | {"BACKSTAY_FAULTS": faults}
    command = [sys.executable, "-c", f"from backstay.faults import reach\n{code}\nprint('went on')"]
    return subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        start_new_session=True,
    )


@pytest.mark.parametrize(("action", "status"), [("kill", -signal.SIGKILL), ("killgroup", -signal.SIGKILL), ("exit", 1)])
def test_each_action_ends_the_process_at_the_point(action: str, status: int) -> None:
    done = run(f"mid_copy:{action}", "print('before', flush=True)\nreach('mid_copy', rank=0)")
    assert (done.returncode, done.stdout) == (status, "before\n")


def test_a_hanging_thread_never_goes_on_and_the_others_do() -> None:
    code = """
import os, threading
thread = threading.Thread(target=reach, args=('pulse',), daemon=True)
thread.start()
thread.join(0.1)
print('hangs' if thread.is_alive() else 'went on', flush=True)
os._exit(0)
"""
    assert run("pulse:hang", code).stdout == "hangs\n"


def test_killing_the_group_takes_its_children_along() -> None:
    code = """
import os, signal
reader, writer = os.pipe()
if os.fork() == 0:
    signal.pause()
os.close(writer)
reach('mid_copy')
"""
    done = run("mid_copy:killgroup", code)  # returns once nobody holds the output pipe: the child is dead too
    assert done.returncode == -signal.SIGKILL


def test_a_stopped_process_goes_on_when_it_is_continued() -> None:
    environment = dict(os.environ) | {"BACKSTAY_FAULTS": "after_commit:stop"}
    code = "from backstay.faults import reach\nreach('after_commit')\nprint('went on')"
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=DEADLINE_S)[0] == "went on\n"


@pytest.mark.parametrize(
    "reached",
    [
        "'mid_copy', rank=3, step=11",
        "'mid_copy', rank=4, step=12",
        "'mid_copy', step=12",
        "'after_slot', rank=3, step=12",
    ],
)
def test_a_point_at_another_position_does_nothing(reached: str) -> None:
    assert run("mid_copy,rank=3,step=12:kill", f"reach({reached})").stdout == "went on\n"


def test_keys_that_the_fault_does_not_name_do_not_matter() -> None:
    assert run("mid_copy,rank=3:kill", "reach('mid_copy', rank=3, step=1)").returncode == -signal.SIGKILL


def test_the_nth_reach_counts_matching_ones_only() -> None:
    code = """
for step in range(9):
    reach('mid_copy', rank=step % 2)
    print(step, flush=True)
"""
    done = run("mid_copy,rank=1,nth=3:kill", code)
    assert (done.returncode, done.stdout.split()) == (-signal.SIGKILL, ["0", "1", "2", "3", "4"])


def test_a_fault_that_may_fire_once_spares_the_next_process(tmp_path: Path) -> None:
    faults = f"mid_encode,once={tmp_path}/fired:kill"
    code = "reach('mid_encode')"
    assert run(faults, code).returncode == -signal.SIGKILL
    assert (tmp_path / "fired").exists()
    assert run(faults, code).stdout == "went on\n"


def test_several_faults_wait_at_their_own_points() -> None:
    faults = "mid_copy,rank=1:kill; after_slot:exit ;"
    assert run(faults, "reach('after_slot')").returncode == 1
    assert run(faults, "reach('mid_copy', rank=1)").returncode == -signal.SIGKILL
    assert run(faults, "reach('before_commit')").stdout == "went on\n"


@pytest.mark.parametrize(
    "faults", ["mid_cpoy:kill", "mid_copy:explode", "mid_copy", "mid_copy,rank:kill", "mid_copy,nth=x:kill"]
)
def test_a_fault_that_could_never_fire_is_refused_at_the_start(faults: str) -> None:
    done = run(faults, "")
    assert done.returncode == 1
    assert "ConfigError" in done.stderr
    assert faults in done.stderr
