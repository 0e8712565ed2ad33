"""Small trainings under the Trainer of Transformers, for the adapter's test: never attached, killed, started again."""

from __future__ import annotations

import logging
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from tests.kit.adapter_runs import Run, digest, run_all
from tests.kit.fsdp_on_cpu import shard_on_cpu

CASES = {  # world size, step to die after
    "plain": (1, 6), "epoch_end": (1, 5), "workers": (1, 6), "evaluated": (1, 6), "stream": (1, 6), "from_file": (1, 9),
    "ddp": (2, 6), "fsdp2": (2, 6),
}  # fmt: skip
ITEMS, EPOCHS = 36, 3


class Noisy(Dataset[dict[str, torch.Tensor]]):
    """Draws from the generators of its process for each item, as masking of tokens does."""

    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x = torch.full((4,), float(index)) + torch.randn(4) * random.random()
        return {"x": x, "labels": x.sum().reshape(1)}


class Stream(IterableDataset[dict[str, torch.Tensor]]):
    def __iter__(self) -> Any:
        for index in range(ITEMS):
            yield Noisy()[index]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.net(x)
        return {"loss": (out - labels).square().mean() * (1 + random.random()), "logits": out}


class StopAt(TrainerCallback):
    """Saves a checkpoint folder and ends."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


class Watcher(TrainerCallback):
    """Logs each step as it is before the batches after it are trained on."""

    def __init__(self, run: Run, net: Net) -> None:
        self.run, self.net, self.mine = run, net, None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        random.random()
        self.run.log(
            step=state.global_step, epoch=state.epoch,
            digest=digest(self.net, [kwargs["optimizer"].optimizer], kwargs["lr_scheduler"].state_dict()),
        )  # fmt: skip

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.mine is not None:
            self.run.settle(state.global_step, self.mine.keeper)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        told = {key: value for key, value in logs.items() if key in ("loss", "grad_norm", "learning_rate", "eval_loss")}
        if told:
            self.run.log(evaluated=state.global_step, best=state.best_metric, **told)


def train(run: Run) -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    set_seed(5)
    torch.manual_seed(5 + run.rank)
    options: dict[str, Any] = {"eval_strategy": "no"}
    if run.case == "evaluated":
        options = {"eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "eval_loss"}
    if run.case == "stream":
        options["max_steps"] = 27
    arguments = TrainingArguments(
        output_dir=str(run.out / "files"), num_train_epochs=EPOCHS, per_device_train_batch_size=4 // run.world_size,
        gradient_accumulation_steps=1 if run.case in ("evaluated", "stream") else 2, learning_rate=0.01,
        logging_steps=2, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, lr_scheduler_type="cosine",
        dataloader_num_workers=2 if run.case == "workers" else 0, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    torch.manual_seed(5)
    net = Net()
    watcher = Watcher(run, net)
    callbacks: list[Any] = [watcher]
    if run.case == "evaluated":
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=50))
    data = Stream() if run.case == "stream" else Noisy()
    folder = Path(arguments.output_dir, "checkpoint-6") if run.case == "from_file" else None
    if folder is not None and not folder.exists():
        Trainer(model=Net(), args=arguments, train_dataset=data, callbacks=[StopAt(6)]).train()
    trainer = Trainer(
        model=net, args=arguments, train_dataset=data, eval_dataset=Noisy() if run.case == "evaluated" else None,
        callbacks=callbacks,
    )  # fmt: skip
    if run.case == "fsdp2":
        shard_on_cpu(trainer.accelerator, "Linear")
        trainer.is_fsdp_enabled = True
    torch.manual_seed(50 + run.rank)
    if run.is_attached:
        import backstay.transformers

        watcher.mine = backstay.transformers.attach(trainer, run_id=run.run_id, deadline_s=60)
    trainer.train(resume_from_checkpoint=folder and str(folder))
    if watcher.mine is not None:
        run.log(restored=watcher.mine.restored.step, outcome=watcher.mine.restored.outcome)


if __name__ == "__main__":
    sys.exit(run_all(train, CASES))
