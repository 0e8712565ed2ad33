"""The possible protections of one cluster and job, each with what it survives and what it costs, and a recommendation.

Pure. Bytes, seconds and rates per second; probabilities from ``survival``, goodput from ``intervals``, groups and memory from
the core's own rules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from backstay.errors import CapacityError, UsageError
from backstayd.config.values import MAX_PARITY
from backstayd.core.policy import CorePolicy
from backstayd.core.protect import groups
from backstayd.core.sentences import any_nodes
from backstayd.sizing import failures, survival
from backstayd.sizing.failures import DAY_S, NODE_LOSSES_PER_NODE_DAY, TRAINER_FAILURES_PER_NODE_DAY
from backstayd.units import format_size

SIMULTANEOUS = (1, 2, 3, 4, 8)  # losses at once that are shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Facts about the cluster and the job; 0 means unknown or none."""

    nodes: int
    state_bytes: int  # of the whole job: parameters, optimizer state, buffers, each once
    ranks: int = 0
    memory_bytes: int = 0  # that a node can provide
    bandwidth_bytes_per_s: float = 0.0  # of a node, in each direction
    step_s: float = 0.0
    interval_steps: int = 0  # 0: the best one
    survive: int | None = (
        None  # simultaneous losses that must always be survived; None: as the coordinator chooses parity
    )
    group_size: int = 8
    keep: int = 1
    node_losses_per_day: float = NODE_LOSSES_PER_NODE_DAY  # of one node
    trainer_failures_per_day: float = TRAINER_FAILURES_PER_NODE_DAY  # per node, memory intact
    domain_failures_per_day: float = 0.0  # of one domain
    nodes_per_domain: int = 0
    repair_s: float = 600.0  # from a loss until redundancy is restored
    restart_s: float = 60.0  # from a failure until the trainers call restore()
    blocked_s: float = 0.01  # how long a snapshot blocks the trainer
    checkpoint_s: float = 0.0  # how long a checkpoint to durable storage stops training
    durable_every_s: float = 3600.0  # between durable copies
    target: float = 0.9999  # required probability that memory survives from one durable copy to the next

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.state_bytes < 1:
            raise UsageError("a plan needs at least one node and the size of the job's state", reason="bad_arguments")

    @property
    def node_state_bytes(self) -> int:
        """S: the state that one node contributes; ranks are spread evenly."""
        return -(-self.state_bytes // self.nodes)

    @property
    def certain_losses(self) -> int:
        return CorePolicy().wanted_parity(self.nodes) if self.survive is None else self.survive

    @property
    def node_losses_per_s(self) -> float:
        return self.nodes * self.node_losses_per_day / DAY_S

    @property
    def failures_per_s(self) -> float:
        return self.node_losses_per_s + self.nodes * self.trainer_failures_per_day / DAY_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One protection. ``admission_bytes``: memory a node needs; ``peak_bytes``: with one more shard staged."""

    name: str
    group_size: int
    k: int  # of the smallest group
    m: int
    groups: int
    survive: tuple[tuple[int, float], ...]  # losses at once, probability
    survive_window: float  # from one durable copy to the next
    fatal_domains: int
    admission_bytes: int
    peak_bytes: int
    network_bytes: int  # per snapshot and node, sent and received each
    protect_s: float  # 0: bandwidth unknown
    least_interval_steps: int  # that the network keeps up with; 0: step time unknown
    interval_steps: int  # the best one, or the requested one if the network keeps up; 0: unknown
    goodput: float | None  # with that interval
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """All choices, the recommended one and why; the checkpoint baseline if its cost is known."""

    question: Question
    choices: tuple[Choice, ...]
    chosen: Choice
    reason: str
    least_goodput: float | None = None  # of the recommended choice, snapshotting as often as the network allows
    checkpoint_interval_s: float | None = None
    checkpoint_goodput: float | None = None


def answer(question: Question) -> Answer:
    """Evaluate every choice and recommend one; CapacityError if none fits into memory."""
    choices = tuple(_choice(question, name, size, m) for name, size, m in _candidates(question))
    chosen, reason = _recommend(question, choices)
    least = _goodput(
        question,
        interval_steps=chosen.least_interval_steps,
        protect_s=chosen.protect_s,
        survive_window=chosen.survive_window,
    )
    interval = goodput = None
    if question.checkpoint_s > 0 and question.failures_per_s > 0:
        mean_s = 1.0 / question.failures_per_s
        interval = failures.best_interval_s(save_s=question.checkpoint_s, mean_between_failures_s=mean_s)
        goodput = failures.losses(
            save_s=question.checkpoint_s,
            interval_s=interval,
            failures_per_s=question.failures_per_s,
            restart_s=question.restart_s + question.checkpoint_s,
        ).goodput
    return Answer(
        question=question,
        choices=choices,
        chosen=chosen,
        reason=reason,
        least_goodput=least,
        checkpoint_interval_s=interval,
        checkpoint_goodput=goodput,
    )


def _candidates(question: Question) -> list[tuple[str, int, int]]:
    """Name, target group size and m of every protection possible with this many nodes."""
    found = [("local memory only", question.group_size, 0)]
    if question.nodes >= 2:
        found.append(("pair copies", 2, 1))
    if question.nodes >= 3:
        found.append(("three copies", 3, 2))
    for m in range(1, MAX_PARITY + 1):
        size = min(survival.group_sizes(question.nodes, group_size=question.group_size, m=m))
        if size > m + 1:
            found.append(("XOR parity" if m == 1 else "parity", question.group_size, m))
    return found


def _choice(question: Question, name: str, group_size: int, m: int) -> Choice:
    nodes, size_bytes = question.nodes, question.node_state_bytes
    sizes = survival.group_sizes(nodes, group_size=group_size, m=m)
    k = min(sizes) - m
    fraction = groups.parity_fraction(nodes, group_size=group_size, m=m)
    admission = groups.admission_bytes(size_bytes, keep=question.keep, fraction=fraction)
    network = size_bytes * (k + m - 1) // k if m else 0
    protect_s = network / question.bandwidth_bytes_per_s if question.bandwidth_bytes_per_s else 0.0
    fatal = survival.fatal_domains(nodes, nodes_per_domain=question.nodes_per_domain, group_size=group_size, m=m)
    window = _survive(question, sizes, m=m, fatal=fatal)
    least, interval = _intervals(question, protect_s)
    return Choice(
        name=name,
        group_size=group_size,
        k=k,
        m=m,
        groups=len(sizes),
        survive=tuple((lost, survival.survive_losses(sizes, m, lost)) for lost in SIMULTANEOUS if lost <= nodes),
        survive_window=window,
        fatal_domains=fatal,
        admission_bytes=admission,
        peak_bytes=admission + size_bytes,
        network_bytes=network,
        protect_s=protect_s,
        least_interval_steps=least,
        interval_steps=interval,
        goodput=_goodput(question, interval_steps=interval, protect_s=protect_s, survive_window=window),
        fits=question.memory_bytes == 0 or admission + size_bytes <= question.memory_bytes,
    )


def _survive(question: Question, sizes: tuple[int, ...], *, m: int, fatal: int) -> float:
    """Probability that in the window no group loses more than m nodes, and no domain with more than m of a group fails.

    Failures of domains that a group tolerates are not combined with node losses: a first-order figure, slightly optimistic.
    """
    rate, window_s = question.node_losses_per_day / DAY_S, question.durable_every_s
    survived = survival.survive_window(sizes, m, rate_per_s=rate, repair_s=question.repair_s, window_s=window_s)
    domains = fatal * question.domain_failures_per_day / DAY_S
    return survived * math.exp(-domains * window_s)


def _intervals(question: Question, protect_s: float) -> tuple[int, int]:
    """The shortest interval in steps that the network keeps up with, and the recommended one."""
    if question.step_s <= 0:
        return 0, 0
    least = max(1, math.ceil(protect_s / question.step_s))
    if question.interval_steps or not question.failures_per_s:
        return least, max(least, question.interval_steps)
    mean_s = 1.0 / question.failures_per_s
    best_s = failures.best_interval_s(save_s=question.blocked_s, mean_between_failures_s=mean_s)
    return least, max(least, round(best_s / question.step_s))


def _goodput(question: Question, *, interval_steps: int, protect_s: float, survive_window: float) -> float | None:
    """Expected share of productive time; None if the step time is unknown."""
    if interval_steps == 0:
        return None
    bandwidth = question.bandwidth_bytes_per_s
    rebuild_s = 2.0 * question.node_state_bytes / bandwidth if protect_s else 0.0
    found = failures.snapshot_losses(
        blocked_s=question.blocked_s,
        interval_s=interval_steps * question.step_s,
        lag_s=protect_s,
        failures_per_s=question.failures_per_s,
        restart_s=question.restart_s,
        rebuild_s=rebuild_s,
        node_failures_per_s=question.node_losses_per_s,
    )
    # if memory is lost after all, half a durable interval is recomputed
    return max(0.0, found.goodput - (1.0 - survive_window) / 2.0)


def _recommend(question: Question, choices: tuple[Choice, ...]) -> tuple[Choice, str]:
    fitting = [choice for choice in choices if choice.fits]
    if not fitting:
        raise _too_small(question, choices)
    sure = [choice for choice in fitting if choice.m >= question.certain_losses]
    good = [choice for choice in sure if choice.survive_window >= question.target]
    if good:
        chosen = min(good, key=lambda choice: (choice.admission_bytes, choice.network_bytes))
    else:
        chosen = max(sure or fitting, key=lambda choice: (choice.survive_window, -choice.admission_bytes))
    return chosen, _reason(question, chosen, is_good=bool(good))


def _reason(question: Question, chosen: Choice, *, is_good: bool) -> str:
    lost = 1.0 - chosen.survive_window
    window = question.durable_every_s / 3600.0
    often = f"memory is lost in {lost:.0e} of the {window:g} h periods between durable copies" if lost > 1e-12 else ""
    survives = f"tolerates the loss of {any_nodes(chosen.m)}" if chosen.m else "tolerates no loss of a node"
    facts = f"{survives}; {often or 'memory is practically never lost between durable copies'}"
    count = question.certain_losses
    wanted = f"{count} loss{'' if count == 1 else 'es'} at once and reach {question.target:g}"
    if is_good:
        return f"{facts}; needs the least memory of the choices that survive {wanted}"
    return (
        f"{facts}. No choice that fits survives {wanted}: write durable copies more often, repair faster than in "
        f"{question.repair_s:g} s, or give nodes more memory"
    )


def _too_small(question: Question, choices: tuple[Choice, ...]) -> CapacityError:
    """The error that says what does not fit, and what would."""
    least = min(choices, key=lambda choice: choice.peak_bytes)
    per_byte = least.peak_bytes / question.node_state_bytes
    nodes = math.ceil(per_byte * question.state_bytes / question.memory_bytes)
    return CapacityError(
        f"the state does not fit: each of {question.nodes} nodes holds {format_size(question.node_state_bytes)} of it and "
        f"needs at least {format_size(least.peak_bytes)} ({least.name}, {slots(question.keep)} and one staged shard), but can "
        f"provide {format_size(question.memory_bytes)}; provide {format_size(least.peak_bytes)} per node, or use about {nodes} "
        "nodes",
        reason="state_does_not_fit",
    )


def slots(keep: int) -> str:
    """The number of copies of its own state that a node has room for, as text."""
    return f"{groups.slots_of(keep)} slots"
