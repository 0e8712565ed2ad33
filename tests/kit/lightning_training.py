"""Small trainings under Lightning, for the adapter's test: a run that never attached, one that is killed, its restart."""

from __future__ import annotations

import logging
import random
import sys
import warnings
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from tests.kit.adapter_runs import Noisy, Run, Stream, digest, run_all

CASES = {  # world size, step to die after
    "plain": (1, 5), "epoch_end": (1, 5), "validated": (1, 6), "stateful": (1, 6), "stream": (1, 6), "manual": (1, 8),
    "ddp": (2, 5), "fsdp2": (2, 6),
}  # fmt: skip
ITEMS, EPOCHS = 36, 3


class Net(LightningModule):
    """With all that a module does: dropout, batch statistics, hooks that draw, a counter of its own."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))
        self.automatic_optimization = run.case != "manual"
        self.told = 0
        self.loss = torch.zeros(())
        self.batch = torch.zeros(())

    def configure_model(self) -> None:
        if self.run.case == "fsdp2" and not isinstance(self.net[0].weight, DTensor):
            mesh = self.device_mesh["data_parallel"]
            for part in (self.net[0], self.net[3], self.net):
                fully_shard(part, mesh=mesh)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.batch = batch
        loss = self.net(batch).square().mean() * (1 + random.random()) + batch_idx
        self.loss = loss.detach()
        if not self.automatic_optimization:
            optimizers: Any = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in optimizers:
                optimizer.step()
            schedulers: Any = self.lr_schedulers()
            for scheduler in schedulers:
                scheduler.step()
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.net(batch).square().mean() + random.random())

    def on_train_start(self) -> None:
        torch.randn(3 + (self.run.part == "second"))  # what a start draws is not in the way of a restart

    def on_train_epoch_start(self) -> None:
        self.told += int(torch.randint(5, ()).item())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        random.random()
        self.run.log(
            step=self.trainer.global_step + batch_idx / 1000, batch=batch.sum().item(), told=self.told,
            epoch=self.trainer.current_epoch, stepped=self.trainer.fit_loop.epoch_loop._batches_that_stepped,
            digest=digest(
                self.net, self.trainer.optimizers, self.loss,
                *[config.scheduler.state_dict() for config in self.trainer.lr_scheduler_configs],
            ),
        )  # fmt: skip

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.run.log(
                evaluated=self.trainer.global_step,
                loss=self.trainer.callback_metrics.get("val_loss", torch.zeros(())).item(),
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["told"] = self.told

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.told = checkpoint["told"]

    def configure_optimizers(self) -> Any:
        if not self.automatic_optimization:
            first = torch.optim.SGD(self.net[0].parameters(), lr=0.001, momentum=0.9)
            second = torch.optim.AdamW(self.net[1:].parameters(), lr=0.01)
            return [first, second], [
                torch.optim.lr_scheduler.StepLR(first, 3),
                torch.optim.lr_scheduler.StepLR(second, 5),
            ]
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.01)
        if self.run.case == "validated":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}
        steps = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": steps, "interval": "step"}}


class Killer(Callback):
    """After Lightning's hooks of a batch: the step before it is committed."""

    def __init__(self, run: Run, keeper: Any) -> None:
        self.run, self.callback, self.last = run, keeper, 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != self.last:
            self.last = trainer.global_step
            self.run.settle(self.last, self.callback.keeper)


def loader_of(run: Run) -> Any:
    if run.case == "stateful":
        from torchdata.stateful_dataloader import StatefulDataLoader

        return StatefulDataLoader(Noisy(ITEMS), batch_size=4, shuffle=True, num_workers=0)
    if run.case == "stream":
        return DataLoader(Stream(ITEMS), batch_size=4)
    return DataLoader(
        Noisy(ITEMS), batch_size=4 // run.world_size, shuffle=True, num_workers=2 if run.case == "plain" else 0
    )


def train(run: Run) -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    seed_everything(3 + run.rank, verbose=False)
    callbacks: list[Any] = []
    options: dict[str, Any] = {"accumulate_grad_batches": 2 if run.case in ("plain", "epoch_end", "ddp") else 1}
    validation = None
    if run.case == "validated":
        options["val_check_interval"] = 3
        options["num_sanity_val_steps"] = 1
        callbacks += [EarlyStopping("val_loss", patience=50)]
        validation = DataLoader(Noisy(ITEMS), batch_size=18)
    if run.case in ("validated", "manual"):
        callbacks += [ModelCheckpoint(dirpath=run.out / f"{run.case}-files", every_n_train_steps=4)]
    else:
        options["enable_checkpointing"] = False
    if run.is_attached:
        from backstay.lightning import BackstayCallback

        mine = BackstayCallback(run_id=run.run_id, deadline_s=60)
        callbacks += [mine, Killer(run, mine)]
    strategy: Any = "ddp" if run.world_size > 1 else "auto"
    if run.case == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer = Trainer(
        max_epochs=EPOCHS, accelerator="cpu", devices=run.world_size, strategy=strategy,
        logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
        default_root_dir=str(run.out), **options,
    )  # fmt: skip
    trainer.fit(Net(run), loader_of(run), validation)
    if run.is_attached:
        run.log(restored=mine.restored.step, outcome=mine.restored.outcome)


if __name__ == "__main__":
    sys.exit(run_all(train, CASES))
