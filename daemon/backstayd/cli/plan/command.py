"""`backstay plan`: computes which protection a cluster and a job need. Talks to no daemon.

A model is measured in a separate process, because nothing here imports torch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any, Final

from backstay.errors import UsageError
from backstayd.cli.tables import as_json, duration, table
from backstayd.core.sentences import amount
from backstayd.printable import say
from backstayd.sizing import failures
from backstayd.sizing.plan import Answer, Choice, Question, answer
from backstayd.units import format_size

MEASURE_TIMEOUT_S: Final = 600.0
LEGEND: Final = (
    "k+m: of the smallest group · P(f): memory survives the loss of any f nodes at once · P(T): from one durable copy to the "
    "next\nMEMORY: per node before training starts · PEAK: with one more shard staged · SENT: per node and snapshot,\n"
    "within the time IN · EVERY: the interval that GOODPUT assumes · *: recommended"
)


def run(arguments: argparse.Namespace) -> int:
    question = _question(arguments)
    found = answer(question)
    if arguments.plot:
        from backstayd.cli.plan.plot import draw

        draw(found, arguments.plot)
    if arguments.json:
        say(as_json(document(found)))
    else:
        say(describe(found))
    return 0


def _question(arguments: argparse.Namespace) -> Question:
    state_bytes = arguments.state or 0
    if arguments.state_per_node:
        state_bytes = arguments.state_per_node * arguments.nodes
    if arguments.measure:
        state_bytes = measure(arguments.measure)
    return Question(
        nodes=arguments.nodes,
        ranks=arguments.ranks,
        state_bytes=state_bytes,
        memory_bytes=arguments.memory,
        bandwidth_bytes_per_s=float(arguments.bandwidth),
        step_s=arguments.step_s,
        interval_steps=arguments.interval,
        survive=arguments.survive,
        group_size=arguments.group_size,
        keep=arguments.keep,
        node_losses_per_day=arguments.node_losses_per_day,
        trainer_failures_per_day=arguments.trainer_failures_per_day,
        domain_failures_per_day=arguments.domain_failures_per_day,
        nodes_per_domain=arguments.nodes_per_domain,
        repair_s=arguments.repair_s,
        restart_s=arguments.restart_s,
        blocked_s=arguments.blocked_s,
        checkpoint_s=arguments.checkpoint_s,
        durable_every_s=arguments.durable_every_s,
        target=arguments.target,
    )


def measure(function: str) -> int:
    """Bytes of state of what ``MODULE:FUNCTION`` returns; UsageError with that process's message if it fails."""
    paths = [os.getcwd(), *([os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else [])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "backstay.testing.measure_state", function]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=MEASURE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise UsageError(
            f"{function} was not measured within {MEASURE_TIMEOUT_S:g} s; give --state instead", reason="not_measured"
        ) from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise UsageError(f"{function} could not be measured: {lines[-1]}", reason="not_measured")
    return int(json.loads(done.stdout.splitlines()[-1])["state_bytes"])


def document(found: Answer) -> dict[str, Any]:
    """Everything as plain values."""
    return {
        "question": asdict(found.question),
        "rates_source": failures.SOURCE,
        "choices": [asdict(choice) | {"survive": dict(choice.survive)} for choice in found.choices],
        "chosen": {"name": found.chosen.name, "parity": found.chosen.m, "group_size": found.chosen.group_size},
        "reason": found.reason,
        "checkpoint_interval_s": found.checkpoint_interval_s,
        "checkpoint_goodput": found.checkpoint_goodput,
    }


def describe(found: Answer) -> str:
    """The table of choices and the recommendation as text."""
    lines = [_head(found.question), "", _table(found), "", LEGEND, "", *_recommendation(found)]
    return "\n".join(lines)


def _head(question: Question) -> str:
    q = question
    parts = [f"{q.nodes} nodes, {format_size(q.state_bytes)} of state, {format_size(q.node_state_bytes)} on each"]
    if q.ranks:
        parts.append(f"{format_size(q.state_bytes / q.ranks)} per rank")
    between = 86400.0 / (q.failures_per_s * 86400.0) if q.failures_per_s else 0.0
    if between:
        parts.append(f"a failure every {duration(between)}, a node lost every {_every(q.node_losses_per_s)}")
    return "; ".join(parts)


def _every(rate_per_s: float) -> str:
    return duration(1.0 / rate_per_s) if rate_per_s else "never"


def _table(found: Answer) -> str:
    losses = [lost for lost, _ in found.choices[0].survive]
    hours = found.question.durable_every_s / 3600
    headers = ["CHOICE", "k+m", *(f"P({lost})" for lost in losses), f"P({hours:.3g} h)"]
    headers += ["MEMORY", "PEAK", "FITS", "SENT", "IN", "EVERY", "GOODPUT"]
    return table(headers, [_row(choice, is_chosen=choice is found.chosen) for choice in found.choices])


def _row(choice: Choice, *, is_chosen: bool) -> list[str]:
    name = f"{choice.name} of {choice.group_size}" if choice.m else choice.name
    row = [f"{name} *" if is_chosen else name]
    row += [
        f"{choice.k}+{choice.m}",
        *(_probability(p) for _, p in choice.survive),
        _probability(choice.survive_window),
    ]
    row += [format_size(choice.admission_bytes), format_size(choice.peak_bytes), "yes" if choice.fits else "no"]
    row += [format_size(choice.network_bytes), f"{choice.protect_s:.2f} s" if choice.protect_s else ""]
    row += [f"{choice.interval_steps} steps" if choice.interval_steps else ""]
    row += [f"{choice.goodput:.4f}" if choice.goodput is not None else ""]
    return row


def _probability(value: float) -> str:
    """Three digits, or how far from certain."""
    if value < 1e-12 or value > 1 - 1e-12:
        return f"{value:.0f}"
    if 0.0005 <= value < 0.9995:
        return f"{value:.3f}"
    return f"1-{1 - value:.0e}" if value > 0.5 else f"{value:.0e}"


def _recommendation(found: Answer) -> list[str]:
    chosen, question = found.chosen, found.question
    lines = [
        f"Recommended: {chosen.name}{f' of {chosen.group_size}' if chosen.m else ''}: {found.reason}",
        f"  [coordinator] parity = {chosen.m}, group_size = {chosen.group_size}, keep = {question.keep}",
        f"  memory_dir of at least {format_size(chosen.peak_bytes)} on each node",
    ]
    if chosen.fatal_domains:
        lines.append(
            f"  {chosen.fatal_domains} of the domains of {question.nodes_per_domain} nodes hold more than "
            f"{amount(chosen.m, 'node')} of a group: if one of these domains fails, memory is lost. Use more "
            "parity or fewer nodes per group to survive that"
        )
    lines += _pace(found)
    if found.checkpoint_goodput is not None and found.checkpoint_interval_s is not None:
        lines.append(
            f"  checkpoints alone: best interval {duration(found.checkpoint_interval_s)} (Young), goodput "
            f"{found.checkpoint_goodput:.4f}"
        )
    return lines


def _pace(found: Answer) -> list[str]:
    """Sentences about the interval."""
    chosen, question = found.chosen, found.question
    if not chosen.interval_steps or chosen.goodput is None:
        return []
    steps = f"every {chosen.interval_steps} steps" if chosen.interval_steps > 1 else "every step"
    lines = [f"  a snapshot {steps}: goodput {chosen.goodput:.4f}"]
    if chosen.interval_steps > 1 and chosen.interval_steps == chosen.least_interval_steps:
        lines[0] += f"; the network needs {chosen.protect_s:.2f} s per snapshot and a step takes {question.step_s:g} s"
    elif found.least_goodput is not None and chosen.interval_steps != chosen.least_interval_steps:
        least = chosen.least_interval_steps
        often = f"every {least} steps" if least > 1 else "every step"
        lines[0] += f"; {often}, as often as the network allows, it is {found.least_goodput:.4f}"
    return lines
