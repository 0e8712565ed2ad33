"""FSDP2 under Accelerate on the CPU: it shards on accelerators alone, but runs all of its code here once it is told to."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin


def shard_on_cpu(accelerator: Accelerator, *layers: str) -> None:
    """Have ``accelerator.prepare()`` shard modules of the classes ``layers``, and the model."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=list(layers),
        cpu_ram_efficient_loading=False,
    )
    told: dict[str, Any] = {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state.update(told)
    accelerator.state.__dict__.update(told)
