"""``python docs/images/shrink_loss.py REPORT.json PLOT.png``: losses of a run that shrank over those of one that did not."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def draw(report: Path, target: Path) -> None:
    """Draw the ``shrunk`` part of a demo report; needs matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shrunk = json.loads(report.read_text())["shrunk"]
    steps, ranks, losses, control = (list(column) for column in zip(*shrunk["losses"], strict=True))
    difference = [abs(a - b) / abs(b) for a, b in zip(losses, control, strict=True)]
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 5.5), height_ratios=(3, 2))
    above.plot(steps, control, color="0.7", linewidth=5, label=f"undisturbed, {shrunk['worlds'][0]} ranks")
    above.plot(
        steps, losses, color="tab:blue", linewidth=1.2, label="shrinking: " + " → ".join(map(str, shrunk["worlds"]))
    )
    above.set_ylabel("loss")
    above.legend()
    below.semilogy(steps, [max(d, 1e-17) for d in difference], color="tab:red", marker=".", linestyle="none")
    below.set_ylabel("relative difference")
    below.set_xlabel("optimizer step")
    for before, step in ((i, s) for i, s in enumerate(steps[1:]) if ranks[i] != ranks[i + 1]):
        for axes in (above, below):
            axes.axvline(step - 0.5, color="0.5", linestyle=":")
        above.annotate(f"{ranks[before + 1]} ranks", (step, max(losses)), fontsize=8, va="top")
    figure.tight_layout()
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
