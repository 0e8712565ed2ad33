"""Small trainings under Accelerate, for the adapter's test: a run that never attached, one that is killed, its restart."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.utils.data import DataLoader

from tests.kit.adapter_runs import Noisy, Run, Stream, digest, run_all
from tests.kit.fsdp_on_cpu import shard_on_cpu

CASES = {  # world size, step to die after
    "plain": (1, 5), "epoch_end": (1, 8), "workers": (1, 5), "stateful": (1, 5), "stream": (1, 5), "two_loaders": (1, 5),
    "ddp": (2, 6), "dispatched": (2, 6),
}  # fmt: skip
ITEMS, EPOCHS, ACCUMULATE = 30, 3, 2


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))


def train(run: Run) -> None:
    set_seed(1 + run.rank)
    stateful = run.case == "stateful"
    config = DataLoaderConfiguration(
        use_stateful_dataloader=stateful, dispatch_batches=False if run.world_size > 1 else None
    )
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE, dataloader_config=config)
    if run.case == "fsdp2":
        shard_on_cpu(accelerator, "Linear")
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    data: Any = Stream(ITEMS) if run.case in ("stream", "dispatched") else Noisy(ITEMS)
    loader: Any = DataLoader(
        data, batch_size=3 // run.world_size + 1, shuffle=None if run.case in ("stream", "dispatched") else True,
        num_workers=2 if run.case == "workers" else 0,
    )  # fmt: skip
    evaluation: Any = DataLoader(Noisy(ITEMS), batch_size=10)
    other: Any = DataLoader(Noisy(ITEMS), batch_size=4, shuffle=True)
    model, optimizer, loader, evaluation, scheduler = accelerator.prepare(
        model, optimizer, loader, evaluation, scheduler
    )
    if run.case == "two_loaders":
        other = accelerator.prepare(other)
    keeper: Any = None
    step = first_epoch = 0
    if run.is_attached:
        import backstay.accelerate

        keeper = backstay.accelerate.attach(accelerator, run_id=run.run_id)
        found = keeper.restore(deadline_s=60)
        step, first_epoch = found.step, keeper.epoch
        run.log(restored=found.step, outcome=found.outcome)
    for epoch in range(first_epoch, EPOCHS):
        model.train()
        for batch in map(torch.add, loader, other) if run.case == "two_loaders" else loader:
            with accelerator.accumulate(model):
                loss = model(batch).square().mean() * (1 + random.random())
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                run.log(
                    step=step, epoch=epoch, batch=batch.sum().item(),
                    digest=digest(model, [optimizer.optimizer], scheduler.state_dict(), loss, batch),
                )  # fmt: skip
            if keeper is not None:
                keeper.snapshot(step if accelerator.sync_gradients else step + 1)
                run.settle(step if accelerator.sync_gradients else 0, keeper)
        model.eval()
        with torch.no_grad():
            total = torch.zeros(())
            for index, batch in enumerate(evaluation):
                if index == 1:
                    break  # a loader that is left in its middle starts anew
                total += model(batch).sum() + random.random()
        run.log(evaluated=epoch, total=total.item())
    if keeper is not None:
        keeper.finish()


if __name__ == "__main__":
    sys.exit(run_all(train, CASES))
