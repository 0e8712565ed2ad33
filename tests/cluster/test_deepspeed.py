"""backstay.deepspeed with real DeepSpeed engines on CPU, on real daemons."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from backstay.errors import SnapshotNotFoundError, UsageError
from backstay.testing import LocalCluster
from tests.kit.documented import write_example
from tests.kit.loops import start_loop
from tests.kit.wording import refuses

CLUSTER = {"nodes": 1, "parity": 0, "lease_s": 1.0}
pytestmark = [pytest.mark.usefixtures("deepspeed_compiled"), pytest.mark.timeout(1200)]

FAULT = "mid_copy,step=10:kill"


@pytest.mark.parametrize(("stage", "half", "ranks"), [(0, False, 1), (1, True, 2), (2, False, 2), (3, False, 1)])
def test_a_trainer_killed_in_the_middle_of_a_save_goes_on_from_the_one_before(
    cluster: LocalCluster, tmp_path: Path, stage: int, half: bool, ranks: int
) -> None:
    script = write_example("integrations/deepspeed.md", "ds_train.py", tmp_path)
    folder = tmp_path / "checkpoints"
    run_id = f"zero-{stage}"
    env = {"RUN_ID": run_id, "DUMP": str(folder), "STAGE": str(stage), "HALF": str(int(half))}
    first = start_loop(cluster, script, f"{run_id}-first", ranks=ranks, STEPS="100", BACKSTAY_FAULTS=FAULT, **env)
    assert set(first.wait_ended()) == {-signal.SIGKILL}, cluster.evidence()
    for path in sorted(folder.rglob("*"), reverse=True):  # as on another machine
        path.rmdir() if path.is_dir() else path.unlink()
    again = start_loop(cluster, script, f"{run_id}-again", ranks=ranks, STEPS="9", **env)
    assert again.wait_ended() == [0] * ranks, cluster.evidence()
    for rank in range(ranks):
        assert again.loaded(rank) == 5
        before, found = first.digests(rank), again.digests(rank)
        assert sorted(found) == [6, 7, 8, 9]
        assert found == {step: before[step] for step in found}
    assert (folder / "latest").read_text() == "global_step5"
    assert all(path.read_bytes().startswith(b"backstay:") for path in (folder / "global_step5").iterdir())


class Info:
    """What DeepSpeed gives to create() and commit()."""

    def __init__(self, tag: str, save_dir: Path) -> None:
        self.tag, self.save_dir, self.save_latest = tag, str(save_dir), True


def attach(cluster: LocalCluster, folder: Path, run_id: str) -> Any:
    from backstay.deepspeed import BackstayCheckpointEngine

    return BackstayCheckpointEngine(
        run_id=run_id, save_dir=folder, socket=str(cluster.nodes[0].socket), restore_deadline_s=60.0
    )


def save(engine: Any, folder: Path, step: int, state: Any) -> None:
    info = Info(f"global_step{step}", folder)
    engine.create(info)
    engine.save(state, str(folder / info.tag / "mp_rank_00_model_states.pt"))
    assert engine.commit(info)


def test_one_checkpoint_is_kept_and_the_folder_shows_that_one(cluster: LocalCluster, tmp_path: Path) -> None:
    engine = attach(cluster, tmp_path, "folder")
    assert engine.tag == ""
    own = tmp_path / "global_step1" / "notes.txt"
    own.parent.mkdir()
    own.write_text("mine")
    for step in (1, 2, 3):
        save(engine, tmp_path, step, {"weight": torch.full((3,), float(step))})
    newest = str(tmp_path / "global_step3" / "mp_rank_00_model_states.pt")
    assert torch.equal(engine.load(newest)["weight"], torch.full((3,), 3.0)), "in the process that saved it, too"
    engine.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step1", "global_step3"]
    assert own.read_text() == "mine", "files that are not ours stay"
    again = attach(cluster, tmp_path, "folder")
    assert again.tag == "global_step3"
    loaded = again.load(newest, map_location="cpu")
    assert torch.equal(loaded["weight"], torch.full((3,), 3.0))
    with refuses(SnapshotNotFoundError, "no_checkpoint", "global_step2", "global_step3"):
        again.load(str(tmp_path / "global_step2" / "mp_rank_00_model_states.pt"))
    again.finish()
    assert not (tmp_path / "global_step3").exists()


def test_deepspeeds_own_objects_come_back_and_others_are_refused_by_path(cluster: LocalCluster, tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    scaler = DynamicLossScaler(2**8, 7, 1, 2, consecutive_hysteresis=False)
    scaler.cur_scale, scaler.cur_iter = 64.0, 3
    state = {
        "loss_scaler": scaler,
        "static": LossScaler(4.0),
        "zero_stage": ZeroStageEnum.gradients,
        "mappings": [{"0.weight": fragment_address(numel=3, start=1)}],
        "shapes": {"0.weight": torch.Size([2, 3])},
    }
    engine = attach(cluster, tmp_path, "objects")
    save(engine, tmp_path, 1, state)
    engine.close()
    again = attach(cluster, tmp_path, "objects")
    found = again.load(str(tmp_path / "global_step1" / "mp_rank_00_model_states.pt"))
    assert vars(found["loss_scaler"]) == vars(scaler)
    assert type(found["loss_scaler"]) is DynamicLossScaler
    assert vars(found["static"]) == vars(state["static"])
    assert found["zero_stage"] is ZeroStageEnum.gradients
    assert found["mappings"] == state["mappings"]
    assert found["shapes"] == state["shapes"]
    with refuses(UsageError, "unsupported_state", "state.client.thing", "Info"):
        save(again, tmp_path, 2, {"client": {"thing": Info("x", tmp_path)}})
    save(again, tmp_path, 3, {"fine": 1})
    again.close()


def test_misuse_is_refused_by_name(cluster: LocalCluster, tmp_path: Path) -> None:
    engine = attach(cluster, tmp_path, "misuse")
    with refuses(UsageError, "bad_tag", "best"):
        engine.create(Info("best", tmp_path))
    with refuses(UsageError, "wrong_folder", tmp_path / "other"):
        engine.create(Info("global_step1", tmp_path / "other"))
    engine.create(Info("global_step4", tmp_path))
    with refuses(UsageError, "unsupported_call", "save_16bit_model"):
        engine.save({}, str(tmp_path / "pytorch_model.bin"))
    save(engine, tmp_path, 5, {"a": 1})
    with refuses(UsageError, "step_not_increasing", "global_step5"):
        engine.create(Info("global_step5", tmp_path))
    with refuses(UsageError, "wrong_folder", "/elsewhere/global_step5"):
        engine.load("/elsewhere/global_step5/mp_rank_00_model_states.pt")
    engine.close()
