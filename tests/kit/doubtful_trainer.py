"""Two ranks of a small DDP training, several runs one after the other, each restored with something wrong about it.

``python tests/kit/doubtful_trainer.py OPTIONS``: rank, world_size, port, log, scenarios. Each scenario is a run of its own:
trained until an older and a newer snapshot are protected, restored with its fault, then restored as it should be.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

import backstay
from backstay.errors import BackstayError

FAULTS = ("bit", "steps", "moments", "load", "nan", "loss", "overflow", "loop")
TRAIN_DEADLINE_S = 60.0


class Saboteur:
    """An extra whose loading changes what was loaded, on one rank."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, fault: str) -> None:
        self.model, self.optimizer, self.fault = model, optimizer, fault

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parameter = next(self.model.parameters())
        if self.fault == "bit":
            parameter.data.view(torch.int32).view(-1)[7] ^= 1
        elif self.fault == "steps":
            self.optimizer.state[parameter]["step"] -= 1
        elif self.fault == "moments":
            del self.optimizer.state[parameter]["exp_avg"]
        elif self.fault == "load":
            raise RuntimeError("no-file-of-the-loader")


class Trial:
    """One run; each Snapshotter is made over a fresh model, as in a fresh process."""

    def __init__(self, options: dict[str, Any], scenario: str) -> None:
        self.rank, self.scenario, self.log_path = options["rank"], scenario, options["log"]
        self.run_id = f"doubt-{scenario}"

    def log(self, event: str, **values: Any) -> None:
        with open(self.log_path, "a", buffering=1) as file:
            file.write(json.dumps({"scenario": self.scenario, "event": event, **values}) + "\n")

    def build(self, fault: str) -> None:
        torch.manual_seed(3)
        inner = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Dropout(0.1), torch.nn.Linear(32, 4))
        self.model = torch.nn.parallel.DistributedDataParallel(inner)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=self.scenario == "overflow")
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=self.scenario == "overflow")
        saboteur = Saboteur(inner, self.optimizer, fault if self.rank == 1 else "")
        self.keeper = backstay.Snapshotter(
            self.model, self.optimizer, run_id=self.run_id, extra={"saboteur": saboteur}, max_wait_s=3.0
        )

    def restore(self, event: str, fault: str = "") -> int:
        """The step, or -1 if it was refused."""
        self.build(fault)
        begin = time.monotonic()
        try:
            result = self.keeper.restore(deadline_s=60.0)
        except (BackstayError, RuntimeError) as error:
            self.log(event, refused=type(error).__name__, reason=getattr(error, "reason", ""), message=str(error),
                     seconds=time.monotonic() - begin)  # fmt: skip
            return -1
        self.log(event, step=result.step, outcome=result.outcome, message=result.message)
        return result.step

    def step(self, number: int, *, poison: float | None = None) -> None:
        loss = self.model(torch.randn(8, 16)).square().mean()
        self.scaler.scale(loss).backward()
        if poison is not None:
            next(self.model.parameters()).grad.view(-1)[3] = poison
        self.scaler.step(self.optimizer)  # a fused optimizer is told of an overflow, and skips the step itself
        self.scaler.update()
        self.optimizer.zero_grad()
        self.keeper.snapshot(number)

    def train(self) -> None:
        first = self.restore("began")
        assert first == 0, f"run {self.run_id} is not new"
        number, deadline = 0, time.monotonic() + TRAIN_DEADLINE_S
        is_protected = torch.zeros(1)
        while not is_protected.item():
            assert time.monotonic() < deadline, "no snapshot became protected"
            number += 1
            self.step(number)
            time.sleep(0.05)
            is_protected = torch.tensor([float(self.keeper.stats().protected_step >= 4)])
            dist.all_reduce(is_protected, op=dist.ReduceOp.MIN)
        self.keeper.fence()
        self.keeper.wait_committed()
        self.log("trained", step=number)
        self.keeper.close()

    def run(self) -> None:
        self.train()
        if self.scenario == "loop":
            for _ in range(4):
                self.restore("restored")
                self.keeper.close()
            return
        base = self.restore("restored", self.scenario)
        if self.scenario in ("nan", "loss", "overflow"):
            self.go_on(base)
        self.keeper.close()
        self.restore("again")
        self.keeper.close()

    def go_on(self, base: int) -> None:
        """Three steps, of which the second goes wrong."""
        for number in (base + 1, base + 2, base + 3):
            is_second = number == base + 2
            if is_second and self.scenario == "loss":
                self.keeper.report_loss(torch.tensor(float("inf")))
            self.step(
                number, poison={"nan": float("nan"), "overflow": float("inf")}.get(self.scenario) if is_second else None
            )
        self.log("went_on", step=base + 3)


class LogTo(logging.Handler):
    """What backstay warned of."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(logging.WARNING)
        self.options = options

    def emit(self, record: logging.LogRecord) -> None:
        with open(self.options["log"], "a", buffering=1) as file:
            file.write(json.dumps({"scenario": "", "event": "warned", "message": record.getMessage()}) + "\n")


def main(options: dict[str, Any]) -> int:
    torch.set_num_threads(1)
    logging.getLogger("backstay").addHandler(LogTo(options))
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{options['port']}", rank=options["rank"], world_size=options["world_size"]
    )
    for scenario in options["scenarios"]:
        Trial(options, scenario).run()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
