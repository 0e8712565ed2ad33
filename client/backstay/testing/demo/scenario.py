"""The scenario of a demo run: sizes, and faults addressed by training step. Pure except for the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from backstay.errors import UsageError

MODELS: Final = {"small": (128, 2), "medium": (192, 4), "large": (256, 4), "xlarge": (320, 8)}  # d_model, layers
KINDS: Final = ("trainer", "daemon", "node", "nodes", "coordinator", "upgrade", "handover")
DEFAULT_STEPS: Final = 56
GATE_MARGIN: Final = 6  # steps
_STEPS_AFTER_LAST_FAULT: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One planned loss. ``targets`` are rank numbers for kinds trainer and coordinator (whose recovery it interrupts),
    node numbers for the others."""

    kind: str
    step: int
    targets: tuple[int, ...]

    @property
    def is_node_loss(self) -> bool:
        return self.kind in ("node", "nodes")

    def __str__(self) -> str:
        who = ", ".join(map(str, self.targets))
        return {
            "trainer": f"SIGKILL of the trainer of rank {who}",
            "daemon": f"SIGKILL of the daemon of node {who}",
            "node": f"destruction of node {who}",
            "nodes": f"destruction of nodes {who} at once",
            "coordinator": f"SIGKILL of the coordinator during the recovery of rank {who}",
            "upgrade": f"drain and restart of the daemon of node {who}",
            "handover": "restart of the coordinator",
        }[self.kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A checked demo run."""

    nodes: int
    k: int
    m: int
    ranks_per_node: int
    d_model: int
    layers: int
    tokens: int
    batch: int
    steps: int
    faults: tuple[Fault, ...]
    lease_s: float
    deadline_s: float
    lose: int = 0
    shrink: bool = False
    rolling: bool = False
    json_path: Path | None = None
    keep_logs: Path | None = None

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def last_nodes(self) -> int:
        """Nodes left at the end: with ``shrink``, destroyed nodes are not replaced."""
        lost = sum(len(fault.targets) for fault in self.faults if fault.is_node_loss)
        return self.nodes - lost if self.shrink else self.nodes

    @property
    def is_beyond_redundancy(self) -> bool:
        """Whether the run is meant to be lost for good."""
        return self.lose > self.m

    def last_permitted_step(self, survived: int) -> int:
        """The step trainers may go up to when the first ``survived`` faults are behind them: a little past the next one.

        Without it a run of quick steps could be over before its faults are, or run far ahead while a daemon is away.
        """
        return (
            min(self.faults[survived].step + GATE_MARGIN, self.steps - 1) if survived < len(self.faults) else self.steps
        )


def parse(argv: Sequence[str] | None) -> Scenario:
    """The scenario the flags ask for; raises UsageError for one that cannot be run."""
    flags = _parser().parse_args(argv)
    m = flags.m if flags.m is not None else (2 if flags.nodes >= 6 else min(1, flags.nodes - 1))
    k = flags.k if flags.k is not None else flags.nodes - m
    d_model, layers = MODELS[flags.model or ("small" if flags.shrink else "medium")]
    steps = flags.steps if flags.steps is not None else (24 if flags.lose else DEFAULT_STEPS)
    text = flags.faults
    if text is None and flags.shrink:
        text = _default_shrinking(flags.nodes, steps=steps)
    elif text is None and flags.rolling:
        text = _default_rolling(flags.nodes, steps=steps)
    elif text is None:
        text = _default_faults(flags.nodes, m, steps=steps, world_size=flags.nodes * flags.ranks_per_node)
    scenario = Scenario(
        nodes=flags.nodes,
        k=k,
        m=m,
        ranks_per_node=flags.ranks_per_node,
        d_model=flags.d_model or d_model,
        layers=flags.layers or layers,
        tokens=flags.tokens,
        batch=flags.batch,
        steps=steps,
        faults=parse_faults(
            f"nodes:{flags.lose}@{max(2, steps // 3)}" if flags.lose else text,
            nodes=flags.nodes,
            world_size=flags.nodes * flags.ranks_per_node,
        ),
        lease_s=flags.lease_s,
        deadline_s=flags.deadline_s,
        lose=flags.lose,
        shrink=flags.shrink,
        rolling=flags.rolling,
        json_path=flags.json,
        keep_logs=flags.keep_logs,
    )
    _check(scenario)
    return scenario


def parse_faults(text: str, *, nodes: int, world_size: int) -> tuple[Fault, ...]:
    """``kind[:count][#target[+target...]]@step`` separated by commas, by step; "" or "none" is no fault."""
    faults = []
    for index, entry in enumerate(filter(None, (part.strip() for part in text.split(",")))):
        if entry == "none":
            continue
        what, _, step = entry.partition("@")
        what, _, targets = what.partition("#")
        kind, _, count = what.partition(":")
        if kind not in KINDS or not step.isdigit() or (count and not count.isdigit()):
            raise UsageError(f"fault {entry!r} is not KIND[:COUNT][#TARGET]@STEP with a kind of {', '.join(KINDS)}")
        limit = world_size if kind in ("trainer", "coordinator") else nodes
        chosen = tuple(int(target) for target in targets.split("+")) if targets else ()
        chosen = chosen or _choose(int(count or (2 if kind == "nodes" else 1)), index=index, limit=limit)
        if any(target >= limit for target in chosen) or len(set(chosen)) != len(chosen) or not chosen:
            raise UsageError(f"fault {entry!r} names targets {chosen}; there are {limit}, counted from 0")
        faults.append(Fault(kind=kind, step=int(step), targets=chosen))
    return tuple(sorted(faults, key=lambda fault: fault.step))


def _choose(count: int, *, index: int, limit: int) -> tuple[int, ...]:
    """``count`` targets spread over the numbers below ``limit``, others for each fault."""
    if count > limit:
        raise UsageError(f"{count} targets were asked for; there are {limit}")
    stride = limit // max(1, count)
    return tuple(sorted((2 + 5 * index + number * stride) % limit for number in range(count)))


def _default_faults(nodes: int, m: int, *, steps: int, world_size: int) -> str:
    """The five promised faults at proportional steps, except those m does not cover; also hits rank 0's node."""
    at = [max(2, round(steps * share)) for share in (0.16, 0.30, 0.44, 0.60, 0.76)]
    faults = [f"trainer#{2 % world_size}@{at[0]}", f"daemon#{3 % nodes}@{at[1]}"]
    faults += [f"node#{1 % nodes}@{at[2]}"] if m >= 1 and nodes > 1 else []
    faults += [f"nodes#0+{nodes - 2}@{at[3]}"] if m >= 2 and nodes > 3 else []
    return ",".join([*faults, f"coordinator#{world_size - 1}@{at[4]}"])


def _default_shrinking(nodes: int, *, steps: int) -> str:
    """A trainer that dies, then two nodes, one after the other: with six nodes FSDP2 over 6, over 5, then FSDP2 × TP over 4."""
    at = [max(2, round(steps * share)) for share in (0.15, 0.35, 0.65)]
    return ",".join([f"trainer#2@{at[0]}", f"node#1@{at[1]}", *([f"node#{nodes - 2}@{at[2]}"] if nodes > 3 else [])])


def _default_rolling(nodes: int, *, steps: int) -> str:
    """Every daemon, one after the other, then the coordinator; none of this costs a step."""
    # Leaves steps to snapshot once the next coordinator leads.
    first, last = (
        max(2, steps // 8),
        steps - GATE_MARGIN - 6,
    )
    at = [first + (last - first) * index // max(1, nodes) for index in range(nodes + 1)]
    return ",".join([*(f"upgrade#{node}@{at[node]}" for node in range(nodes)), f"handover@{at[nodes]}"])


def _check(scenario: Scenario) -> None:
    if scenario.shrink and (scenario.lose or scenario.ranks_per_node != 1):
        raise UsageError("--shrink goes with one rank per node and without --lose")
    if scenario.rolling and (scenario.lose or scenario.shrink):
        raise UsageError("--rolling goes with neither --lose nor --shrink: it loses nothing")
    if scenario.shrink and scenario.last_nodes < 2:
        raise UsageError(f"--shrink from {scenario.nodes} nodes leaves {scenario.last_nodes}; at least 2 are needed")
    if scenario.nodes < 1 or scenario.m < 0 or scenario.m > 4 or scenario.k < 1:
        raise UsageError(
            f"{scenario.nodes} nodes with k={scenario.k} and m={scenario.m}: k ≥ 1 and 0 ≤ m ≤ 4 are needed"
        )
    if scenario.k + scenario.m > scenario.nodes:
        raise UsageError(
            f"k={scenario.k} and m={scenario.m} need {scenario.k + scenario.m} nodes; there are {scenario.nodes}"
        )
    if scenario.d_model % 32:
        raise UsageError(f"--d-model {scenario.d_model} is not a multiple of 32 (the width of a head)")
    for fault in scenario.faults:
        if fault.step < 1 or fault.step > scenario.steps - _STEPS_AFTER_LAST_FAULT:
            raise UsageError(
                f"a fault at step {fault.step} needs --steps {fault.step + _STEPS_AFTER_LAST_FAULT} or more"
                f" and step 1 or later; there are {scenario.steps} steps"
            )
        if fault.is_node_loss and len(fault.targets) > scenario.m and not scenario.lose:
            raise UsageError(
                f"losing {len(fault.targets)} nodes at once is more than m={scenario.m} covers;"
                f" --lose {len(fault.targets)} shows what happens then"
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="backstay demo",
        description="Train a byte-level GPT over real daemons, break things, compare with an undisturbed run.",
    )
    add = parser.add_argument
    add("--nodes", type=int, default=6, help="nodes, each with a daemon and a torchrun agent (6)")
    add("--k", type=int, help="data blocks of a group (nodes - m)")
    add("--m", type=int, help="node losses a group survives (2 from six nodes on, else 1)")
    add("--ranks-per-node", type=int, default=1, help="trainers on each node (1)")
    add(
        "--model",
        choices=sorted(MODELS),
        help="size of the model (medium: 1.9 million parameters; small with --shrink)",
    )
    add("--d-model", type=int, help="width, instead of the model's")
    add("--layers", type=int, help="layers, instead of the model's")
    add("--tokens", type=int, default=64, help="length of a training window in bytes (64)")
    add("--batch", type=int, default=1, help="windows per rank and step (1)")
    add("--steps", type=int, help=f"optimizer steps ({DEFAULT_STEPS}; 24 with --lose)")
    add("--faults", help="e.g. trainer@10,daemon@16,node@22,nodes:2@34,coordinator@46; with targets: node#0@22; none")
    add("--lose", type=int, default=0, metavar="N", help="lose N nodes at once, instead of the faults")
    add("--shrink", action="store_true", help="replace no node: the run continues with the remaining nodes")
    add("--rolling", action="store_true", help="lose nothing: drain and restart each daemon, then the coordinator")
    add("--lease-s", type=float, default=3.0, help="lease of the daemons (3)")
    add("--deadline-s", type=float, default=900.0, help="give up after this many seconds (900)")
    add("--json", type=Path, metavar="FILE", help="write the full report to FILE")
    add("--keep-logs", type=Path, metavar="DIR", help="keep all logs and notes in DIR")
    return parser
