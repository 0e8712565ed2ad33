"""Plots the choices of `backstay plan`. The only module that imports matplotlib, which is optional."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backstay.errors import ConfigError, UsageError
from backstayd.sizing.plan import Answer


def draw(found: Answer, path: Path) -> None:
    """Write the plot to ``path``; ConfigError without matplotlib, UsageError if the file cannot be written."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed: run `pip install matplotlib`, or omit --plot",
            reason="no_matplotlib",
        ) from None
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    _survival(left, found)
    _cost(right, found)
    figure.suptitle(f"{found.question.nodes} nodes, {found.question.node_state_bytes / 2**30:.1f} GiB of state on each")
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write --plot {path}: {error}", reason="bad_arguments") from None
    finally:
        plt.close(figure)


def _name(choice: Any) -> str:
    return f"{choice.name} of {choice.group_size}, {choice.k}+{choice.m}" if choice.m else choice.name


def _survival(axes: Any, found: Answer) -> None:
    for choice in found.choices:
        if choice.m:
            width = 2.6 if choice is found.chosen else 1.2
            lost, shares = zip(*choice.survive, strict=True)
            axes.plot(lost, shares, marker="o", linewidth=width, label=_name(choice))
    axes.set_xlabel("nodes lost at once")
    axes.set_ylabel("probability that memory survives")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _cost(axes: Any, found: Answer) -> None:
    names = [_name(choice) for choice in found.choices]
    colours = ["tab:blue" if choice is found.chosen else "tab:gray" for choice in found.choices]
    axes.barh(names, [choice.admission_bytes / 2**30 for choice in found.choices], color=colours)
    if found.question.memory_bytes:
        axes.axvline(found.question.memory_bytes / 2**30, color="tab:red", linestyle="--", label="memory of a node")
        axes.legend(fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("memory per node, GiB")
    axes.tick_params(axis="y", labelsize=7)
