"""A tiny deterministic training: one process a rank, gloo between them, a JSON line for every step with a digest of the state.

``python tests/kit/trainer_script.py OPTIONS`` where OPTIONS is JSON: rank, world_size, port, address (of rank 0;
this machine unless given), run_id, log, stop (a file that ends it), last_step, pause_s, is_attached, frozen (width of a frozen
backbone, 0: none), persist (a file: asks for a durable copy), sigterm ("": not watched; "default"; else a file, and what
SIGTERM did before is to make it). With ``is_attached`` false backstay is never imported: the control run.
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def state_digest(model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> str:
    """SHA-256 over parameters, buffers, optimizer state, scheduler and both random generators."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    for index, values in sorted(optimizer.state_dict()["state"].items()):
        for key, value in sorted(values.items()):
            digest.update(f"{index}.{key}".encode() + value.numpy().tobytes())
    digest.update(repr([group["lr"] for group in optimizer.param_groups]).encode())
    digest.update(json.dumps(scheduler.state_dict(), sort_keys=True).encode())
    digest.update(torch.get_rng_state().numpy().tobytes() + repr(random.getstate()).encode())
    return digest.hexdigest()


def note_sigterm(path: str) -> None:
    """What a job may do itself on SIGTERM."""
    signal.signal(signal.SIGTERM, lambda _number, _frame: Path(path).touch())


def main(options: dict[str, Any]) -> int:
    rank, world_size = options["rank"], options["world_size"]
    address = options.get("address", "127.0.0.1")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo", init_method=f"tcp://{address}:{options['port']}", rank=rank, world_size=world_size)
    torch.manual_seed(100 + rank)
    random.seed(100 + rank)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64), torch.nn.Dropout(0.1), torch.nn.Linear(64, 64)
    )
    if options.get("frozen"):
        backbone = [torch.nn.Linear(64, options["frozen"]), torch.nn.Linear(options["frozen"], 64)]
        model = torch.nn.Sequential(*(layer.requires_grad_(False) for layer in backbone), *model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.9)
    keeper: Any = None
    first = 0
    with open(options["log"], "a", buffering=1) as log:
        if options["is_attached"]:
            import backstay

            sigterm = options.get("sigterm", "")
            if sigterm not in ("", "default"):
                note_sigterm(sigterm)
            keeper = backstay.Snapshotter(
                model, optimizer, run_id=options["run_id"], extra={"scheduler": scheduler}, max_wait_s=1.0,
                persist_on_sigterm=bool(sigterm),
            )  # fmt: skip
            result = keeper.restore()
            first = result.step
            restored = {"event": "restored", "step": first, "outcome": str(result.outcome), "attempt": result.attempt}
            if first:
                restored["digest"] = state_digest(model, optimizer, scheduler)
            log.write(json.dumps(restored) + "\n")
        for step in range(first + 1, options["last_step"] + 1):
            begin = time.perf_counter()
            batch = torch.randn(16, 64) * (1.0 + random.random())
            loss = model(batch).square().mean()
            loss.backward()
            dist.all_reduce(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            line = {"event": "step", "step": step, "digest": state_digest(model, optimizer, scheduler)}
            if keeper is not None:
                keeper.snapshot(step)
                if options.get("persist") and Path(options["persist"]).exists():
                    keeper.persist()
                    options["persist"] = ""
            log.write(json.dumps({**line, "seconds": time.perf_counter() - begin}) + "\n")
            time.sleep(options["pause_s"])
            must_stop = torch.tensor([float(Path(options["stop"]).exists())])
            dist.all_reduce(must_stop)
            if must_stop.item():
                break
        log.write(json.dumps({"event": "done"}) + "\n")
    if keeper is not None:
        keeper.close()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
