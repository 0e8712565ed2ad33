"""The README's own training loop and install line: what they promise is what happens."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests.kit import bare_venv, recipe_world
from tests.kit.recipe_world import Outcome


def _assert_went_on(outcome: Outcome) -> None:
    """The second life began in the middle of an epoch, trained every batch once that was left, and ended on the same bits."""
    for control, restarted in zip(outcome.control, outcome.restarted, strict=True):
        steps = [step for step, _, _ in restarted["trained"]]
        assert steps[0] >= outcome.protected_step > 20
        assert restarted["trained"] == control["trained"][steps[0] :]
        assert restarted["digest"] == control["digest"]
    assert len({rank["digest"] for rank in outcome.control}) == len(outcome.control), "each rank has a part of its own"


def test_the_readmes_recipe_with_fsdp2_on_four_ranks_killed_and_restarted_ends_bit_for_bit() -> None:
    _assert_went_on(recipe_world.run(ranks=4, nodes=2, parity=1, loader="stateful"))


def test_the_readmes_install_line_in_a_bare_environment_is_enough_for_a_restart(tmp_path: Path) -> None:
    """Of one rank, daemons and all: numpy and whatever else torch works without is not there."""
    python = bare_venv.make(tmp_path / "venv", bare_venv.readme_extras())
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    options = {"ranks": 1, "nodes": 1, "parity": 0, "loader": "plain"}
    found = subprocess.run(
        [python, str(Path(recipe_world.__file__)), json.dumps(options)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    outcome = Outcome(**json.loads(found.stdout.splitlines()[-1]))
    assert "numpy" not in outcome.restarted[0]["modules"], "an environment with numpy shows nothing"
    _assert_went_on(outcome)
