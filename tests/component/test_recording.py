"""A node that cannot write a decision to its memory says so, and writes it once it can."""

from __future__ import annotations

from pathlib import Path

from backstayd.core.messages.decisions import DecisionPhase, StagingState
from backstayd.core.messages.desired import RunDesired
from tests.kit.node import NodeThread, fresh_decision, running_node
from tests.kit.shards import RUN
from tests.kit.trainer import PlainTrainer, wait_until


def obstruct(node: NodeThread) -> Path:
    """Something lies where the decision belongs."""
    path = node.call(lambda: node.node.state.store.paths(RUN).decision)
    path.mkdir(parents=True)
    return path


def test_a_decision_that_cannot_be_recorded_is_reported_as_failed_with_the_reason(tmpfs_dir: Path) -> None:
    with running_node(tmpfs_dir) as node:
        trainer = PlainTrainer(node.socket)
        trainer.attach()
        obstruct(node)
        decision = fresh_decision("n1", world_id="world", attempt=1, world_size=1)
        node.desire(RunDesired(run=RUN, world_id="world", decision=decision, decision_phase=DecisionPhase.RECORD))

        def staging() -> StagingState | None:
            found = [run.staging for run in node.report().runs if run.staging is not None]
            return found[0].state if found else None

        wait_until(lambda: staging() is StagingState.FAILED, why="the coordinator must decide anew")
        found = node.report().runs[0].staging
        assert found is not None
        assert "decision.json" in found.reason
        assert node.report().runs[0].decision is None
        trainer.close()


def test_a_recorder_that_cannot_record_tries_again_until_it_can(tmpfs_dir: Path) -> None:
    with running_node(tmpfs_dir) as node:
        path = obstruct(node)
        decision = fresh_decision("elsewhere", world_id="world", attempt=1, world_size=1)
        node.desire(RunDesired(run=RUN, world_id="world", decision=decision, decision_phase=DecisionPhase.RELEASE))
        wait_until(
            lambda: bool(node.call(lambda: node.node.reconciler.tasks.settled(RUN))), why="a try failed and rests"
        )
        path.rmdir()
        wait_until(lambda: [run.decision for run in node.report().runs] == [decision], why="it is recorded now")
