"""The last commit before operations were built, checked out beside: what a cluster in the middle of an upgrade runs.

Skips with a reason where the clone does not have that commit.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

COMMIT = "a0e8b1b"  # the state of main that the last release was cut from
HOUSE = Path(__file__).parents[2]
# what this release needs said and that one does not know
LIGHT_RANK = "tests/kit/light_rank.py"
UNKNOWN_SETTINGS = ("BACKSTAYD_NODE_INSECURE", "BACKSTAYD_COORDINATOR_INSECURE")


def check_out(directory: Path) -> Path:
    """Its sources below ``directory``; skips the test if they cannot be had."""
    found = subprocess.run(
        ["git", "-C", str(HOUSE), "cat-file", "-e", f"{COMMIT}^{{commit}}"], capture_output=True, check=False
    )
    if found.returncode:
        pytest.skip(f"this clone does not have commit {COMMIT} (the release before), so its daemons cannot be started")
    archive = directory / "older.tar"
    with archive.open("wb") as out:
        subprocess.run(
            ["git", "-C", str(HOUSE), "archive", COMMIT, "client", "daemon", LIGHT_RANK], stdout=out, check=True
        )
    subprocess.run(["tar", "-x", "-f", str(archive), "-C", str(directory)], check=True)
    return directory


def python_path(sources: Path) -> str:
    return f"{sources / 'client'}:{sources / 'daemon'}"


def environment_of(sources: Path) -> dict[str, str | None]:
    """What LocalCluster is to add to the environment of a daemon of that release, and to take away."""
    return {"PYTHONPATH": python_path(sources), **dict.fromkeys(UNKNOWN_SETTINGS)}
