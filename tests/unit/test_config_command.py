"""The command `backstayd`: what an operator sees for a good and for a bad configuration."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from backstay.errors import ConfigError
from backstayd import app


def test_check_config_prints_every_value_and_exits_zero(tmpfs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--memory-dir", str(tmpfs_dir / "memory"), "--socket", str(tmpfs_dir / "backstayd.sock")]
    assert app.main(["node", "--name", "n1", "--quota", "8MiB", *place, "--check-config"]) == 0
    out = capsys.readouterr().out
    assert "node.name = n1" in out
    assert f"node.quota_bytes = {8 << 20}" in out
    assert list(tmpfs_dir.iterdir()) == [], "it makes nothing"


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("--memory-dir", "/usr/backstay-memory", "/usr/backstay-memory is not on a tmpfs"),
        ("--quota", "8000TiB", "does not fit"),
        ("--socket", f"/dev/shm/{'long' * 40}.sock", "socket"),
        ("--bulk", "192.0.2.7:7071", "192.0.2.7:7071: Cannot assign requested address"),
        ("--http", "192.0.2.7:7072", "192.0.2.7:7072: Cannot assign requested address"),
    ],
)
def test_check_config_refuses_what_the_start_refuses(
    setting: str, value: str, words: str, tmpfs_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--memory-dir": f"{tmpfs_dir}/memory", "--socket": f"{tmpfs_dir}/socket", "--http": "127.0.0.1:0"}
    argv = ["node", *(word for pair in (given | {setting: value}).items() for word in pair)]
    assert app.main([*argv, "--check-config"]) == ConfigError.exit_code
    checked = capsys.readouterr().err
    command = [sys.executable, "-m", "backstayd", *argv]
    started = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert started.returncode == ConfigError.exit_code, started.stderr
    for message in (checked, started.stderr.splitlines(keepends=True)[-1]):
        assert words in message
        assert message.count("\n") == 1
    assert not Path("/usr/backstay-memory").exists(), "refused before it is made"


def test_the_printed_default_config_is_toml_with_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["coordinator", "--print-default-config"]) == 0
    assert tomllib.loads(capsys.readouterr().out)["coordinator"]["parity"] == "auto"


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["node", "--lease-s", "x", "--check-config"], 78, "--lease-s = 'x' is not a number"),
        (["node", "--config", "/nowhere.toml"], 78, "cannot read the configuration /nowhere.toml"),
        (["node", "--lease", "3"], 64, "unrecognized arguments: --lease"),
        (["nod"], 64, "invalid choice: 'nod'"),
        ([], 64, "required: role"),
        (["coordinator", "--persist-url", "bucket", "--insecure"], 78, "--persist-url = 'bucket'"),
        (["coordinator", "--election", "zookeeper://a:1/x", "--insecure"], 78, "kubernetes://"),
        (["coordinator", "--advertise", "0.0.0.0:7070", "--insecure"], 78, "--advertise = '0.0.0.0:7070'"),
    ],
)
def test_a_mistake_is_one_line_and_the_exit_code_of_its_class(
    argv: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main(argv) == status
    captured = capsys.readouterr()
    assert captured.err.startswith("backstayd: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_daemon_without_tls_and_without_insecure_does_not_start(
    tmpfs_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("BACKSTAYD_NODE_INSECURE")
    assert app.main(["node", "--name", "n1"]) == 78
    assert "backstay certs --ca-dir DIR --node n1" in capsys.readouterr().err
    place = ["--memory-dir", str(tmpfs_dir), "--socket", str(tmpfs_dir / "socket")]
    assert app.main(["node", "--name", "n1", "--insecure", *place, "--check-config"]) == 0


def test_an_unwritable_memory_dir_is_a_configuration_error_without_a_stack_trace() -> None:
    command = [sys.executable, "-m", "backstayd", "node", "--memory-dir", "/proc/backstay", "--http", "127.0.0.1:0"]
    command += ["--bulk", "127.0.0.1:0", "--socket", "/proc/backstay.sock"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 78, result.stderr
    assert "/proc/backstay" in result.stderr
    assert "Traceback" not in result.stderr
