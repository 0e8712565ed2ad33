"""The systemd units: accepted by systemd without a word, hardened, and in step with the daemons' own defaults."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from backstayd.config.schema import NodeConfig

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
SERVICES = ("backstayd.service", "backstay-coordinator.service")
MOST_EXPOSURE = 25  # tenths

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="no systemd-analyze: apt-get install systemd"
)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units as on a machine where backstay is installed: in the place of /opt/backstay, this environment."""
    for unit in sorted(UNITS.glob("*.service")) + sorted(UNITS.glob("*.mount")):
        (tmp_path / unit.name).write_text(unit.read_text().replace("/opt/backstay/bin/", f"{sys.prefix}/bin/"))
    return tmp_path


def analyze(directory: Path, *arguments: str) -> str:
    command = ["systemd-analyze", *arguments]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return done.stdout + done.stderr


@needs_systemd
def test_systemd_has_nothing_to_say_about_the_units(installed: Path) -> None:
    units = sorted(path.name for path in installed.iterdir())
    assert units == ["backstay-coordinator.service", "backstayd.service", "run-backstay-memory.mount"]
    said = analyze(installed, "verify", *(f"./{name}" for name in units))
    assert said == "", "an unknown key is a line here, and the exit status 0"


@needs_systemd
@pytest.mark.parametrize("service", SERVICES)
def test_a_service_is_exposed_as_little_as_its_work_allows(installed: Path, service: str) -> None:
    said = analyze(
        installed, "security", "--offline=true", f"--threshold={MOST_EXPOSURE}", "--no-pager", f"./{service}"
    )
    level = re.search(r"Overall exposure level for \S+: ([0-9.]+)", said)
    assert level is not None
    assert float(level.group(1)) <= MOST_EXPOSURE / 10


def settings_of(unit: str) -> dict[str, str]:
    lines = (UNITS / unit).read_text().splitlines()
    return dict(line.partition("=")[::2] for line in lines if "=" in line and not line.startswith("#"))


def test_the_units_serve_where_the_daemons_look() -> None:
    node = NodeConfig(name="n", insecure=True)
    service, mount = settings_of("backstayd.service"), settings_of("run-backstay-memory.mount")
    assert mount["Where"] == service["RequiresMountsFor"] == str(node.memory_dir)
    assert node.socket.parent == Path("/run", service["RuntimeDirectory"])
    assert {"mode=0700", "nosuid", "nodev", "noexec"} <= set(mount["Options"].split(","))
    assert service["RuntimeDirectoryPreserve"] == "yes", "the memory is mounted below it"
    for name in SERVICES:
        assert f"uid={settings_of(name)['User']}" in mount["Options"]


def test_the_units_keep_what_the_daemons_rest_on() -> None:
    service = settings_of("backstayd.service")
    assert (service["OOMPolicy"], service["KillMode"]) == ("continue", "mixed"), "a coder may die, the daemon lives"
    assert "78" in service["RestartPreventExitStatus"].split(), "a configuration error is not tried again"
    for forbidden in ("PrivateUsers", "ProtectProc", "PrivateNetwork"):
        assert forbidden not in service, f"{forbidden} hides the trainers from their daemon"


@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="no systemd-sysusers: apt-get install systemd")
def test_the_user_and_the_directories_are_accepted(tmp_path: Path) -> None:
    users = UNITS / "sysusers.d" / "backstay.conf"
    done = subprocess.run(
        ["systemd-sysusers", f"--root={tmp_path}", "--dry-run", str(users)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, "Creating user 'backstay'" in done.stderr + done.stdout) == (0, True), done.stderr
