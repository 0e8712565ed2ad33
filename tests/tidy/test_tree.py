"""The shape of the tree: sizes, names, the wheel, generated files, and that documents speak of things that exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from backstayd.config import reference
from backstayd.config.schema import SECTIONS

ROOT = Path(__file__).parents[2]
MAX_LINES = 600
FORBIDDEN_NAMES = {"utils.py", "util.py", "common.py", "helpers.py", "helper.py", "misc.py"}


def _sources(*roots: str) -> list[Path]:
    found = [path for root in roots for path in sorted((ROOT / root).rglob("*.py"))]
    return [path for path in found if "__pycache__" not in path.parts and "v1" not in path.parts]


def test_no_file_is_longer_than_two_files() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for path in _sources("client", "daemon", "tests")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert not long, f"longer than {MAX_LINES} lines: {long}"


# Doors of a room: modules and folders. The core and the node are looked at most.
@pytest.mark.parametrize(("room", "most"), [("daemon/backstayd/core", 20), ("daemon/backstayd/node", 14)])
def test_a_room_has_few_doors(room: str, most: int) -> None:
    doors = [path for path in (ROOT / room).iterdir() if path.name not in ("__init__.py", "__pycache__")]
    assert len(doors) <= most, sorted(path.name for path in doors)


def test_no_folder_holds_more_than_fifteen_modules() -> None:
    counts = Counter(path.parent for path in _sources("client", "daemon", "bench"))
    assert not {str(folder.relative_to(ROOT)): count for folder, count in counts.items() if count > 15}


def test_no_module_is_named_after_nothing() -> None:
    assert not [path for path in _sources("client", "daemon", "tests") if path.name in FORBIDDEN_NAMES]


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in _sources("client", "daemon")
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent


# An unpickler that knows only the record classes of DCP's metadata (docs/decisions/0018-importing-dcp.md).
MAY_IMPORT_PICKLE = {"client/backstay/convert/foreign_checkpoints.py"}


def test_no_code_runs_a_shell_or_unpickles() -> None:
    """By syntax: no ``import pickle``, no ``shell=True``."""
    found = []
    for path in _sources("client", "daemon"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if str(path.relative_to(ROOT)) in MAY_IMPORT_PICKLE:
                names = [name for name in names if name != "pickle"]
            shell = isinstance(node, ast.keyword) and node.arg == "shell"
            if shell or {name.partition(".")[0] for name in names} & {"pickle", "marshal", "shelve", "cPickle"}:
                found.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}")
    assert not found


def test_import_roots_are_not_packages() -> None:
    for root in ("client", "daemon", "proto", "deploy"):
        assert not (ROOT / root / "__init__.py").exists()


def test_the_wheel_has_exactly_two_top_level_names(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        str(tmp_path),
    ]
    result = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("backstay-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"backstay", "backstayd"}
    assert {"backstay/py.typed", "backstayd/py.typed", "backstayd/core/messages/report.py"} <= set(names)


def test_the_sample_configuration_is_what_the_code_would_write() -> None:
    sample = ROOT / "deploy" / "config" / "backstayd.toml"
    assert sample.read_text(encoding="utf-8") == reference.sample(*SECTIONS), "run `make sample`"


def test_the_configuration_page_is_what_the_code_would_write() -> None:
    page = ROOT / "docs" / "configuration.md"
    assert page.read_text(encoding="utf-8") == reference.page(), "run `make sample`"


def test_the_readme_is_short_and_every_command_in_it_exists() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.split()) <= 1000
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    commands = re.findall(r"\bmake ([a-z-]+)", readme)
    assert {"demo", "test"} <= set(commands)
    assert set(commands) <= targets
    named = set(re.findall(r"`backstay ([a-z]+)", readme)) | set(
        re.findall(r"^    backstay ([a-z]+)", readme, re.MULTILINE)
    )
    assert "status" in named
    assert named <= _subcommands()


def _subcommands() -> set[str]:
    command = [sys.executable, "-m", "backstayd.cli", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return set(re.findall(r"^    ([a-z]+)\b", text, re.MULTILINE))


@pytest.mark.parametrize(
    "document", [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_failure_model_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "failure-model.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) >= 20, "a table that names no tests proves nothing"
    defined = {
        match
        for path in _sources("tests")
        for match in re.findall(r"^\s*(?:async )?def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert not sorted(set(named) - defined)
