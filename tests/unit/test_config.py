"""Configuration: precedence, and that each mistake names its place and the way out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from backstay.errors import ConfigError
from backstayd import addresses, units
from backstayd.config.load import load_config
from backstayd.config.reference import sample
from backstayd.config.schema import SECTIONS, CoordinatorConfig, NodeConfig, settings
from tests.kit.wording import refuses

PLAINTEXT = {"insecure": "true"}
TLS = {"tls_cert": "/c.pem", "tls_key": "/k.pem", "tls_ca": "/ca.pem"}


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_win_over_environment_and_environment_over_the_file(tmp_path: Path) -> None:
    file = _write(tmp_path / "c.toml", '[node]\nname = "from-file"\ndomain = "from-file"\ncoders = 3\n')
    loaded = load_config(
        NodeConfig,
        file=file,
        environ={"BACKSTAYD_NODE_NAME": "from-environment", "BACKSTAYD_NODE_DOMAIN": "from-environment"},
        flags={"name": "from-flag"} | PLAINTEXT,
    )
    assert (loaded.name, loaded.domain, loaded.coders) == ("from-flag", "from-environment", 3)


def test_what_nobody_sets_keeps_its_default() -> None:
    assert load_config(CoordinatorConfig, file=None, environ={}, flags=PLAINTEXT) == CoordinatorConfig(insecure=True)


@pytest.mark.parametrize("cls", SECTIONS)
def test_the_sample_of_each_role_loads_to_the_defaults(cls: type[NodeConfig], tmp_path: Path) -> None:
    file = _write(tmp_path / "sample.toml", sample(cls))
    assert load_config(cls, file=file, environ={}, flags=PLAINTEXT) == cls(insecure=True)


def test_each_setting_explains_itself_and_has_a_flag_of_its_own() -> None:
    for cls in SECTIONS:
        found = list(settings(cls))
        assert {setting.name for setting in found} == {field.name for field in dataclasses.fields(cls)}
        assert all(len(setting.explanation) > 10 for setting in found)
        assert len({setting.flag for setting in found}) == len(found)


@pytest.mark.parametrize(
    ("text", "reason", "facts"),
    [
        ('[node]\nmemory_directory = "/x"\n', "unknown_key", ("[node] memory_directory", "memory_dir")),
        ("[coordinator]\nleases = 3\n", "unknown_key", ("[coordinator] leases", "lease_s")),  # of the other role
        ("[cordinator]\nkeep = 1\n", "unknown_key", ("cordinator", "coordinator")),
        ("[node]\nparity = 2\n", "wrong_section", ("[node] parity", "[coordinator]")),
        ('coders = 2\n[node]\nname = "n1"\n', "wrong_section", ("coders", "[node]")),
        ("[node]\ncoders = \n", "bad_file", ("TOML", "line 2, column 10")),
        ("node = 3\n", "bad_file", ("[node]",)),
        ("[node]\ncoders = true\n", "bad_value", ("[node] coders = True",)),
    ],
)
def test_a_mistake_in_the_file_names_its_place(text: str, reason: str, facts: tuple[str, ...], tmp_path: Path) -> None:
    file = _write(tmp_path / "c.toml", text)
    with refuses(ConfigError, reason, file, *facts):
        load_config(NodeConfig, file=file, environ={}, flags={})


def test_an_unknown_variable_names_the_nearest_known_one() -> None:
    with refuses(ConfigError, "unknown_key"):
        load_config(NodeConfig, file=None, environ={"BACKSTAYD_NODE_LEASE": "3"}, flags={})


def test_variables_that_kubernetes_writes_for_a_service_are_not_taken_for_settings() -> None:
    environ = {
        "BACKSTAYD_COORDINATOR_SERVICE_HOST": "10.0.0.1",
        "BACKSTAYD_COORDINATOR_SERVICE_PORT": "7070",
        "BACKSTAYD_COORDINATOR_PORT_7070_TCP_ADDR": "10.0.0.1",
        "BACKSTAYD_COORDINATOR_PORT": "tcp://10.0.0.1:7070",
    }
    assert load_config(CoordinatorConfig, file=None, environ=environ, flags=PLAINTEXT) == CoordinatorConfig(
        insecure=True
    )


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        ({"lease_s": "soon"}, ["--lease-s", "soon"]),
        ({"lease_s": "0"}, ["--lease-s", "0", 0.1]),
        ({"lease_s": "nan"}, ["--lease-s", "nan"]),
        ({"coders": "1.5"}, ["--coders", "1.5"]),
        ({"coders": "0"}, ["--coders", "0", 64]),
        ({"quota_bytes": "8 gigs"}, ["--quota", "8 gigs", "8GiB"]),
        ({"quota_bytes": "-1"}, ["--quota", "-1"]),
        ({"name": "a/b"}, ["--name", "a/b"]),
        ({"memory_dir": "relative"}, ["--memory-dir", "relative"]),
        ({"socket": "/" + "x" * 120}, [107]),
        ({"coordinator": "node-1"}, ["--coordinator", "node-1", "HOST:PORT"]),
        ({"coordinator": "node-1:99999"}, [65535]),
        ({"bulk": "0.0.0.0:7071"}, ["0.0.0.0:7071"]),
        ({"bulk": "0:7071"}, ["0:7071"]),
        ({"bulk": "[0::0]:7071"}, ["[0::0]:7071"]),
        ({"bulk": "[::ffff:0.0.0.0]:7071"}, ["[::ffff:0.0.0.0]:7071"]),
        ({"log_format": "xml"}, ["text", "json"]),
    ],
)
def test_a_bad_value_names_its_flag_and_what_would_do(flags: dict[str, str], facts: list[object]) -> None:
    with refuses(ConfigError, "bad_value", *facts):
        load_config(NodeConfig, file=None, environ={}, flags=flags)


@pytest.mark.parametrize(("text", "parity"), [("auto", None), ("0", 0), ("4", 4)])
def test_parity_is_auto_or_a_number(text: str, parity: int | None) -> None:
    assert load_config(CoordinatorConfig, file=None, environ={}, flags={"parity": text} | PLAINTEXT).parity == parity


@pytest.mark.parametrize("text", ["5", "-1", "two", ""])
def test_parity_beyond_what_the_codec_does_is_refused(text: str) -> None:
    with refuses(ConfigError, "bad_value", 0, 4):
        load_config(CoordinatorConfig, file=None, environ={}, flags={"parity": text})


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("8GiB", 8 << 30),
        ("1.5 KiB", 1536),
        ("500MB", 500_000_000),
        ("17", 17),
        ("3B", 3),
        (4096, 4096),
        ("1TB", 10**12),
    ],
)
def test_sizes_are_read_in_binary_and_decimal_units(text: str | int, size_bytes: int) -> None:
    assert units.parse_size(text) == size_bytes


def test_sizes_for_people_have_one_decimal() -> None:
    assert [units.format_size(size) for size in (0, 1023, 1536, 5 << 40, 5 << 60)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 TiB",
        "5242880.0 TiB",
    ]


def test_what_kubernetes_makes_of_an_ipv6_pod_is_understood_and_gets_its_brackets() -> None:
    made = load_config(
        NodeConfig,
        file=None,
        environ={
            "BACKSTAYD_NODE_BULK": "fd00::1:7071",
            "BACKSTAYD_NODE_COORDINATOR": "fd00::2:7070,[fd00::2]:7070,a:1",
        },
        flags=PLAINTEXT,
    )
    assert (made.bulk, made.coordinator) == ("[fd00::1]:7071", "[fd00::2]:7070,a:1")
    for text in ("fd00::7071", "fd00::1", "1:2:3:4:5:6:7:8", "a:b:7071", "::g:1"):
        with pytest.raises(ValueError, match=r"neither HOST:PORT nor \[IPV6\]:PORT"):
            addresses.split_address(text)


def test_addresses_may_be_ipv6_in_brackets() -> None:
    assert addresses.split_address("[::1]:80") == ("::1", 80)


def test_a_file_that_is_not_there_is_one_clear_line() -> None:
    with refuses(ConfigError, "unreadable_file", "nowhere/c.toml"):
        load_config(NodeConfig, file=Path("/nowhere/c.toml"), environ={}, flags={})


def test_a_file_that_is_not_toml_says_where(tmp_path: Path) -> None:
    with refuses(ConfigError, "bad_file", 1):
        load_config(NodeConfig, file=_write(tmp_path / "c.toml", "[node\n"), environ={}, flags={})
    nested = "[node]\nname = " + "[" * 20_000
    with refuses(ConfigError, "bad_file"):
        load_config(NodeConfig, file=_write(tmp_path / "d.toml", nested), environ={}, flags={})


def test_neither_tls_nor_insecure_is_refused_and_says_how_to_have_either() -> None:
    with refuses(ConfigError, "no_security") as caught:
        load_config(NodeConfig, file=None, environ={}, flags={"name": "n1"})
    assert caught.value.reason == "no_security"
    with refuses(ConfigError, "no_security"):
        load_config(CoordinatorConfig, file=None, environ={}, flags={})


def test_a_part_of_tls_is_refused_and_names_what_is_missing() -> None:
    with refuses(ConfigError, "half_security", "tls_ca"):
        load_config(NodeConfig, file=None, environ={}, flags={**TLS, "tls_ca": ""})


@pytest.mark.parametrize("cls", SECTIONS)
def test_tls_and_insecure_together_are_refused(cls: type[NodeConfig]) -> None:
    with refuses(ConfigError, "two_securities"):
        load_config(cls, file=None, environ={}, flags=TLS | PLAINTEXT)


def test_http_over_tls_needs_certificates() -> None:
    with refuses(ConfigError, "half_security", "http_tls", "tls_cert"):
        load_config(NodeConfig, file=None, environ={}, flags=PLAINTEXT | {"http_tls": "true"})


def test_all_of_tls_is_taken() -> None:
    loaded = load_config(NodeConfig, file=None, environ={}, flags=TLS | {"http_tls": "true", "insecure": "false"})
    assert (loaded.tls_cert, loaded.tls_key, loaded.tls_ca) == (Path("/c.pem"), Path("/k.pem"), Path("/ca.pem"))
    assert loaded.http_tls


@pytest.mark.parametrize("name", ["", "Backstay", "a/b", "-a", "a b"])
def test_a_trust_domain_is_one_name_in_lower_case(name: str) -> None:
    with refuses(ConfigError, "bad_value", 1, 255):
        load_config(NodeConfig, file=None, environ={}, flags=TLS | {"trust_domain": name})


def test_a_switch_is_true_or_false() -> None:
    with refuses(ConfigError, "bad_value"):
        load_config(NodeConfig, file=None, environ={}, flags={"insecure": "maybe"})
