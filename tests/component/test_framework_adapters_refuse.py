"""What the adapters for Lightning, Transformers and Accelerate refuse, by name; and checkpoint files without pickle."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from backstay.errors import IntegrityError, UnavailableError, UsageError
from tests.kit.local_daemon import LocalDaemon

accelerate = pytest.importorskip("accelerate")
lightning = pytest.importorskip("pytorch_lightning")
transformers = pytest.importorskip("transformers")

import backstay.accelerate  # noqa: E402
import backstay.transformers  # noqa: E402
from backstay.lightning import BackstayCallback, BackstayCheckpointIO  # noqa: E402
from backstay.trainer.state import packing  # noqa: E402
from tests.kit.wording import refuses  # noqa: E402


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Net(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, width)
        self.steps: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.steps.append(self.trainer.global_step)
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _trainer(directory: Path, *callbacks: Any, **options: Any) -> Any:
    return lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), default_root_dir=str(directory), **options,
    )  # fmt: skip


def _loader() -> Any:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(12, 4)), batch_size=4)


def test_two_lightning_callbacks_are_refused(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, BackstayCallback(run_id="a"), BackstayCallback(run_id="b"))
    with refuses((UsageError, RuntimeError), "attached_twice"):
        trainer.fit(Net(), _loader())


def test_a_lightning_callback_serves_one_fit(tmp_path: Path) -> None:
    with LocalDaemon() as daemon:
        callback = BackstayCallback(run_id="once", socket=daemon.socket_path)
        trainer = _trainer(tmp_path, callback)
        trainer.fit(Net(), _loader())
        trainer.fit_loop.max_epochs = 2
        with pytest.raises(UsageError, match="served a fit"):
            trainer.fit(Net(), _loader())


def test_a_strategy_that_lightning_shards_by_itself_is_refused_by_name(tmp_path: Path) -> None:
    class FSDPStrategy(lightning.strategies.SingleDeviceStrategy):  # type: ignore[misc]
        """Only named so: the real one needs a GPU."""

    trainer = _trainer(tmp_path, BackstayCallback(run_id="a"), strategy=FSDPStrategy(device="cpu"))
    with refuses(UsageError, "unsupported_strategy"):
        trainer.fit(Net(), _loader())


class _Unfreezing(lightning.callbacks.BaseFinetuning):  # type: ignore[misc]
    def freeze_before_training(self, pl_module: Any) -> None:
        pass

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("make", "facts"),
    [
        (lightning.callbacks.EMAWeightAveraging, ("EMAWeightAveraging", "extra=")),
        (
            lambda: lightning.callbacks.StochasticWeightAveraging(swa_lrs=0.1),
            ("StochasticWeightAveraging", "SWALR"),
        ),
        (lightning.callbacks.BackboneFinetuning, ("BackboneFinetuning", "configure_optimizers")),
        (_Unfreezing, ("_Unfreezing", "configure_optimizers")),
    ],
)
def test_a_lightning_callback_that_a_restart_could_not_follow_is_refused_at_the_start(
    make: Any, facts: tuple[str, str], tmp_path: Path
) -> None:
    net = Net()
    net.backbone = torch.nn.Linear(2, 2)
    for callbacks in ([make(), BackstayCallback(run_id="a")], [BackstayCallback(run_id="a"), make()]):
        with refuses(UsageError, "unsupported_callback", *facts):
            _trainer(tmp_path, *callbacks).fit(net, _loader())
    assert net.steps == []


def test_gradients_are_accumulated_as_before_after_a_restart_in_mid_epoch(tmp_path: Path) -> None:
    def fit(*callbacks: Any) -> Net:
        torch.manual_seed(1)
        net = Net()
        schedule = lightning.callbacks.GradientAccumulationScheduler({0: 1, 1: 2})
        trainer = _trainer(tmp_path, schedule, *callbacks)
        trainer.fit_loop.max_epochs = 3
        trainer.fit(net, torch.utils.data.DataLoader(torch.arange(72.0).reshape(18, 1, 4) / 72, batch_size=2))
        return net

    expected = fit()
    with LocalDaemon() as daemon:
        with pytest.raises(RuntimeError, match="stopped"):  # 9 batches an epoch: 9 steps, then 5 each
            fit(BackstayCallback(run_id="r", socket=daemon.socket_path), StopAt(11))
        again = BackstayCallback(run_id="r", socket=daemon.socket_path)
        net = fit(again)
    assert again.restored is not None
    assert again.restored.step in (10, 11)
    assert expected.steps[-len(net.steps) :] == net.steps
    assert bool(expected.net.weight.isfinite().all())
    assert torch.equal(expected.net.weight, net.net.weight)


def test_lightning_without_a_daemon_raises_before_a_batch_is_trained(tmp_path: Path) -> None:
    net = Net()
    trainer = _trainer(tmp_path, BackstayCallback(run_id="a", socket=str(tmp_path / "none"), deadline_s=0.2))
    with pytest.raises(UnavailableError):
        trainer.fit(net, _loader())
    assert net.steps == []


def test_another_model_under_lightning_is_refused_by_the_tensors_that_differ(tmp_path: Path) -> None:
    with LocalDaemon() as daemon:
        first = BackstayCallback(run_id="r", socket=daemon.socket_path)
        trainer = _trainer(tmp_path, first, StopAt(2))
        with pytest.raises(RuntimeError, match="stopped"):
            trainer.fit(Net(), _loader())
        with pytest.raises(IntegrityError, match=r"net\.weight"):
            _trainer(tmp_path, BackstayCallback(run_id="r", socket=daemon.socket_path)).fit(Net(width=3), _loader())


class StopAt(lightning.Callback):  # type: ignore[misc]
    """An exception in the middle: what is in memory stays."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("stopped")


def test_a_checkpoint_file_older_than_memory_is_passed_over_and_a_newer_one_refused(tmp_path: Path) -> None:
    file, newer = str(tmp_path / "one.ckpt"), str(tmp_path / "newer.ckpt")
    with LocalDaemon() as daemon:
        trainer = _trainer(tmp_path, BackstayCallback(run_id="r", socket=daemon.socket_path), StopAt(2))
        with pytest.raises(RuntimeError, match="stopped"):
            trainer.fit(Net(), _loader())
        plugin = BackstayCheckpointIO()
        other = _trainer(tmp_path, plugins=[plugin])
        other.fit(Net(), _loader())
        other.save_checkpoint(newer)
        checkpoint = plugin.load_checkpoint(newer)
        plugin.save_checkpoint({**checkpoint, "global_step": 1}, file)
        again = BackstayCallback(run_id="r", socket=daemon.socket_path)
        with refuses(UsageError, "checkpoint_is_newer", 3, 2):
            _trainer(tmp_path, again, plugins=[plugin]).fit(Net(), _loader(), ckpt_path=newer)
        net, again = Net(), BackstayCallback(run_id="r", socket=daemon.socket_path)
        _trainer(tmp_path, again, plugins=[plugin]).fit(net, _loader(), ckpt_path=file)
        assert again.restored is not None
        assert (again.restored.step, net.steps) == (2, [2])


def test_a_lightning_checkpoint_is_stored_without_pickle_and_resumes(tmp_path: Path) -> None:
    path = str(tmp_path / "folder" / "c.ckpt")
    trainer = _trainer(tmp_path, plugins=[BackstayCheckpointIO()])
    net = Net()
    trainer.fit(net, _loader())
    trainer.save_checkpoint(path)
    assert f'"{packing.DOCUMENT}"' in Path(path).read_bytes()[:20_000].decode("latin-1")
    other = Net()
    more = _trainer(tmp_path, plugins=[BackstayCheckpointIO()])
    more.fit_loop.max_epochs = 2
    more.fit(other, _loader(), ckpt_path=path)
    assert other.steps[0] == 3
    trainer.strategy.remove_checkpoint(path)
    assert not Path(path).exists()


def test_a_changed_byte_of_a_checkpoint_file_is_not_loaded(tmp_path: Path) -> None:
    path, plugin = tmp_path / "c.ckpt", BackstayCheckpointIO()
    plugin.save_checkpoint({"state_dict": {"w": torch.arange(1000.0)}, "epoch": 3}, path)
    assert torch.equal(plugin.load_checkpoint(path)["state_dict"]["w"], torch.arange(1000.0))
    data = bytearray(path.read_bytes())
    for place in (len(data) - 3, len(data) - 3000, 200):
        broken = bytearray(data)
        broken[place] ^= 4
        path.write_bytes(broken)
        with pytest.raises(IntegrityError):
            plugin.load_checkpoint(path)
    path.write_bytes(data[:-5])
    with pytest.raises(IntegrityError):
        plugin.load_checkpoint(path)


def test_what_needs_pickle_is_refused_with_its_path_and_the_old_file_stays(tmp_path: Path) -> None:
    path, plugin = tmp_path / "c.ckpt", BackstayCheckpointIO()
    plugin.save_checkpoint({"epoch": 1}, path)
    with refuses(UsageError, "unsupported_state", "checkpoint.hyper_parameters.net", "torch.nn"):
        plugin.save_checkpoint({"hyper_parameters": {"net": torch.nn.Linear(1, 1)}}, path)
    assert plugin.load_checkpoint(path) == {"epoch": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.ckpt"]


def test_an_accelerator_without_prepared_objects_or_with_a_keeper_is_refused(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    with refuses(UsageError, "usage", "accelerate.Accelerator"):
        backstay.accelerate.attach(torch.nn.Linear(2, 2), run_id="a")  # type: ignore[arg-type]
    with refuses(UsageError, "usage", "transformers.Trainer"):
        backstay.transformers.attach(torch.nn.Linear(2, 2), run_id="a")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="prepared 0 models"):
        backstay.accelerate.attach(accelerator, run_id="a")
    model = torch.nn.Linear(2, 2)
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    keeper = backstay.accelerate.attach(accelerator, run_id="a")
    with refuses(UsageError, "attached_twice"):
        backstay.accelerate.attach(accelerator, run_id="a")
    keeper.close()
    backstay.accelerate.attach(accelerator, run_id="a").close()


@pytest.mark.parametrize(
    ("kind", "words"), [("FSDP", "FSDP1"), ("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron")]
)
def test_a_way_of_distributing_that_cannot_be_kept_is_refused_by_name(kind: str, words: str) -> None:
    class Accelerator:
        distributed_type = accelerate.DistributedType[kind]
        state = type("State", (), {"fsdp_plugin": None})

    with refuses(UsageError, "unsupported_strategy", words):
        backstay.accelerate.refuse_unsupported(Accelerator())  # type: ignore[arg-type]


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.net(x) - labels).square().mean()}


def _hugging_face_trainer(directory: Path, callbacks: Any = None, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(directory), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
        dataloader_pin_memory=False, num_train_epochs=1, **options,
    )  # fmt: skip
    data = [{"x": torch.ones(4), "labels": torch.ones(1)} for _ in range(16)]
    return transformers.Trainer(model=Model(), args=arguments, train_dataset=data, callbacks=callbacks)


def test_a_transformers_callback_alone_says_how_it_is_attached(tmp_path: Path) -> None:
    trainer = _hugging_face_trainer(tmp_path, [backstay.transformers.BackstayCallback(run_id="a")])
    with pytest.raises(UsageError, match=r"backstay.transformers.attach\(trainer"):
        trainer.train()


def test_a_transformers_trainer_is_attached_once_trains_once_and_keeps_its_place(tmp_path: Path) -> None:
    with LocalDaemon() as daemon:
        trainer = _hugging_face_trainer(tmp_path)
        backstay.transformers.attach(trainer, run_id="a", socket=daemon.socket_path)
        with pytest.raises(UsageError, match="attach\\(\\) once"):
            backstay.transformers.attach(trainer, run_id="a", socket=daemon.socket_path)
        trainer.train()
        with pytest.raises(UsageError, match="served a train"):
            trainer.train()
    skipping = _hugging_face_trainer(tmp_path, ignore_data_skip=True)
    with pytest.raises(UsageError, match="ignore_data_skip"):
        backstay.transformers.attach(skipping, run_id="b")


@pytest.mark.parametrize(
    ("module", "package"),
    [("lightning", "pytorch_lightning"), ("transformers", "transformers"), ("accelerate", "accelerate")],
)
def test_a_missing_package_is_named_with_the_way_to_install_it(module: str, package: str) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        f"try:\n    import backstay.{module}\nexcept ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert f"pip install 'backstay[{module}]'" in done.stdout, done.stderr


def test_a_loader_among_the_extras_of_an_adapter_is_refused_because_the_adapter_keeps_its_place() -> None:
    """Followed twice, it would pass over its batches twice."""
    extra = {"loader": _loader()}
    for kind in (BackstayCallback, backstay.transformers.BackstayCallback):
        with refuses(UsageError, "usage"):
            kind(run_id="a", extra=extra)
        with refuses(UsageError, "usage", "missing_ok"):
            kind(run_id="a", missing_ok="ema")
    accelerator = accelerate.Accelerator(cpu=True)
    with refuses(UsageError, "usage", "backstay.accelerate"):
        backstay.accelerate.attach(accelerator, run_id="a", extra=extra)


def test_an_extra_that_was_added_in_mid_run_is_left_to_the_script_under_lightning(tmp_path: Path) -> None:
    data = _loader()
    with LocalDaemon() as daemon:
        options: dict[str, Any] = {"run_id": "r", "socket": daemon.socket_path}

        def fit(*callbacks: Any) -> None:
            _trainer(tmp_path, *callbacks).fit(Net(), data)

        with pytest.raises(RuntimeError, match="stopped"):
            fit(BackstayCallback(**options), StopAt(2))
        ema = torch.nn.Linear(2, 2)
        with pytest.raises(IntegrityError, match=r"missing_ok=\['ema'\]"):
            fit(BackstayCallback(extra={"ema": ema}, **options))
        again = BackstayCallback(extra={"ema": ema}, missing_ok=["ema"], **options)
        fit(again)
    assert again.restored is not None
    assert again.restored.extras["ema"] == "not in the snapshot: as the script made it"
