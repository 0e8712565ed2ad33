"""Lightning, Transformers and Accelerate with the real packages and real daemons: nothing changes, and a killed run goes on
bit for bit."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backstay.testing import LocalCluster
from tests.kit import accelerate_training, lightning_training, transformers_training
from tests.kit.adapter_runs import PARTS, lines_of, steps_of
from tests.kit.documented import write_example
from tests.kit.forked_ranks import QUIET, run_script
from tests.kit.wording import facts_of

CLUSTER = {"nodes": 1, "parity": 0, "lease_s": 1.0}
KITS: dict[str, Any] = {
    "accelerate": accelerate_training,
    "lightning": lightning_training,
    "transformers": transformers_training,
}
RUNS = [
    (name, case, rank) for name, kit in KITS.items() for case, (size, _) in kit.CASES.items() for rank in range(size)
]
pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def runs(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Logs of every case of each framework, run when first asked for."""
    made: dict[str, Path] = {}

    class Runs(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            out = made.setdefault(name, tmp_path_factory.mktemp(name))
            self[name] = out
            run_script(KITS[name].__file__, str(cluster.nodes[0].socket), out)
            return out

    return Runs()


@pytest.mark.parametrize(("name", "case", "rank"), RUNS)
def test_an_attached_framework_takes_the_same_steps_as_one_alone(
    runs: dict[str, Path], name: str, case: str, rank: int
) -> None:
    """Until it is killed."""
    control, first = (steps_of(runs[name], case, part, rank) for part in ("control", "first"))
    assert 1 < len(first) < len(control)
    assert list(first.items()) == list(control.items())[: len(first)]


@pytest.mark.parametrize(("name", "case", "rank"), RUNS)
def test_a_killed_framework_goes_on_bit_for_bit(runs: dict[str, Path], name: str, case: str, rank: int) -> None:
    """The restarted run restored the step it died after and took the rest of the control's, and its evaluations."""
    lines = lines_of(runs[name], case, "second", rank)
    assert {"restored": KITS[name].CASES[case][1], "outcome": "EXACT"} in lines
    control, first, second = (steps_of(runs[name], case, part, rank) for part in PARTS)
    assert second
    assert list(second.items()) == list(control.items())[-len(second) :]
    assert len(first) + len(second) >= len(control)
    wanted = [line for line in lines_of(runs[name], case, "control", rank) if "evaluated" in line]
    evaluated = [line for line in lines if "evaluated" in line]
    assert evaluated == wanted[len(wanted) - len(evaluated) :]


def _example(cluster: LocalCluster, directory: Path, page: str) -> tuple[int, str, str]:
    """Run a page's example, kill it after five steps, run it again; the step it went on after, its end, and a control's."""
    script = write_example(f"integrations/{page}.md", f"{page}_example.py", directory)

    def start(part: str, run_id: str) -> subprocess.Popen[bytes]:
        environment = {**QUIET, "RUN_ID": run_id, "OUT": str(directory / part)}
        return cluster.run_on_node(0, [sys.executable, str(script)], environment, name=f"{page}-{part}")

    def wait(process: subprocess.Popen[bytes], part: str) -> tuple[int, str]:
        cluster.wait_until(lambda: process.poll() is not None, 120, f"the example of {page} to end")
        text = (cluster.keeper.log_dir / f"{page}-{part}.log").read_text()
        found = facts_of("example_ended", text)
        return int(found["step"]), found["end"]

    first = start("first", page)
    control = start("control", f"{page}-control")
    cluster.wait_until(lambda: cluster.run_status(f"default/{page}")["protected_step"] >= 5, 120, "five steps")
    first.kill()
    assert first.wait() == -signal.SIGKILL
    step, end = wait(start("second", page), "second")
    none, wanted = wait(control, "control")
    assert none == 0
    return step, end, wanted


@pytest.mark.parametrize("page", KITS)
def test_the_example_of_the_page_survives_a_kill(cluster: LocalCluster, tmp_path: Path, page: str) -> None:
    step, end, wanted = _example(cluster, tmp_path, page)
    assert step >= 5
    assert end == wanted
    assert page != "lightning" or (tmp_path / "second").stat().st_size > 1000


@pytest.mark.parametrize("name", ["accelerate", "deepspeed", "lightning", "torchft", "torchtitan", "transformers"])
def test_without_its_package_an_adapter_says_what_to_install(name: str) -> None:
    absent = dict.fromkeys([name, f"pytorch_{name}"])
    code = f"import sys; sys.modules.update({absent}); import backstay.{name}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert f"'backstay[{name}]'" in result.stderr.splitlines()[-1]
