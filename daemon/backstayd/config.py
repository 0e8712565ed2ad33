"""What an operator can set: TOML < environment < flags, into frozen dataclasses.

One file may hold both tables, ``[node]`` and ``[coordinator]``; the environment says ``BACKSTAYD_NODE_LEASE_S`` for
``lease_s`` of ``[node]``. Each field carries its own explanation, from which ``--help`` and the sample file are made.
Starts nothing and touches no path.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import math
import re
import socket
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar

from backstay.errors import ConfigError, UsageError
from backstay.ids import check_name
from backstay.protocol.messages import DEFAULT_SOCKET

MAX_PARITY: Final = 4
MAX_GROUP_NODES: Final = 16

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTP]i?B|B)?\Z")
_UNITS: Final = {"B": 1} | {
    f"{letter}{infix}B": base**power
    for infix, base in (("i", 1024), ("", 1000))
    for power, letter in enumerate("KMGTP", start=1)
}
_DOMAIN = re.compile(r"[A-Za-z0-9._/:-]{0,100}\Z")
_TRUST_DOMAIN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,254}\Z")
# Kubernetes writes these for every Service of its namespace; they are not ours.
_SERVICE_VARIABLE = re.compile(r"(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT(_\d+_(TCP|UDP|SCTP)(_.+)?)?)\Z")

Parser = Callable[[Any], Any]


def parse_size(value: Any) -> int:
    """Bytes from ``8GiB``, ``500 MB`` or a plain number; raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.match(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("is not a size such as 8GiB, 500MB or a number of bytes")
    size = float(match[1]) * _UNITS[match[2] or "B"]
    if size == float("inf"):
        raise ValueError("is more than any machine has")
    return int(size)


def format_size(size_bytes: float) -> str:
    """A size for people, in binary units with one decimal: ``1.5 GiB``."""
    amount = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(amount) < 1024 or unit == "TiB":
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    raise AssertionError("unreachable")


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT`` or ``[IPV6]:PORT``; raises ValueError.

    ``IPV6:PORT`` is taken as well, for Kubernetes knows no brackets: ``$(POD_IP):7071``.
    """
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or " " in host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError("is not HOST:PORT with a port from 0 to 65535")
    if ":" in host:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ValueError("is neither HOST:PORT nor [IPV6]:PORT with a port from 0 to 65535") from None
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """``HOST:PORT``, with brackets where the host is a number of IPv6: gRPC and others take none without."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_wildcard(host: str) -> bool:
    """Whether ``host`` means every address of a machine, in any spelling that sockets take (``0`` and ``0::0`` do)."""
    try:
        number = ipaddress.IPv6Address(host)
    except ValueError:
        pass
    else:
        return (number.ipv4_mapped or number).is_unspecified
    try:
        return not any(socket.inet_aton(host))
    except (OSError, UnicodeEncodeError):
        return host == "*"


def split_addresses(text: str) -> tuple[str, ...]:
    """The addresses of ``HOST:PORT,HOST:PORT``, each once; raises ValueError."""
    return tuple(dict.fromkeys(join_address(*split_address(part.strip())) for part in text.split(",")))


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("is not a text")
    return value


def _name(value: Any) -> str:
    try:
        return check_name("name", _text(value))
    except UsageError:
        message = "is not 1 to 100 letters, digits, '.', '_' or '-', starting with a letter or digit"
        raise ValueError(message) from None


def _domain(value: Any) -> str:
    if not isinstance(value, str) or not _DOMAIN.match(value):
        raise ValueError("is not at most 100 letters, digits, '.', '_', '/', ':' or '-'")
    return value


def parse_trust_domain(value: Any) -> str:
    """``value`` if it can be a trust domain; raises ValueError."""
    if not isinstance(value, str) or not _TRUST_DOMAIN_NAME.match(value):
        raise ValueError("is not 1 to 255 lower-case letters, digits, '.', '_' or '-', starting with a letter or digit")
    return value


def _path(value: Any) -> Path:
    path = Path(_text(str(value) if isinstance(value, Path) else value))
    if not path.is_absolute():
        raise ValueError("is not an absolute path")
    return path


def _socket_path(value: Any) -> Path:
    path = _path(value)
    if len(str(path).encode()) > 107:
        raise ValueError("is longer than the 107 bytes that a Unix socket's path may have")
    return path


def _address(value: Any) -> str:
    return join_address(*split_address(_text(value)))


def _addresses(value: Any) -> str:
    return ",".join(split_addresses(_text(value)))


def _reachable_address(value: Any) -> str:
    host, _ = split_address(_text(value))
    if is_wildcard(host):
        raise ValueError("is a wildcard: peers are told this address, so name one they can reach")
    return _address(value)


def _optional_address(value: Any) -> str:
    return _reachable_address(value) if value != "" else ""


def _election(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("is not a text")
    if value:
        from backstayd.election.stores import parse  # it needs the addresses of this module

        parse(value)
    return value


def _seconds(value: Any) -> float:
    seconds = _number(float, value)
    if not (math.isfinite(seconds) and 0.1 <= seconds <= 3600):
        raise ValueError("is not a number of seconds from 0.1 to 3600")
    return seconds


def _ttl(value: Any) -> float:
    seconds = _number(float, value)
    if not (seconds == 0 or 1 <= seconds <= 366 * 86400):
        raise ValueError("is neither 0 nor a number of seconds from 1 to a year")
    return seconds


def _count(low: int, high: int) -> Parser:
    def parse(value: Any) -> int:
        count = _number(int, value)
        if not low <= count <= high:
            raise ValueError(f"is not a number from {low} to {high}")
        return count

    return parse


def _parity(value: Any) -> int | None:
    if value == "auto":
        return None
    try:
        return int(_count(0, MAX_PARITY)(value))
    except ValueError:
        raise ValueError(f"is neither 'auto' nor a number from 0 to {MAX_PARITY}") from None


def _url(value: Any) -> str:
    if not isinstance(value, str) or (value and not re.match(r"([a-z][a-z0-9+.-]*://|/).+\Z", value)):
        raise ValueError("is neither empty nor a URL such as file:///mnt/ckpt or s3://bucket/prefix")
    return value.rstrip("/") if value else ""


def _switch(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if not isinstance(value, str) or value.lower() not in words:
        raise ValueError("is neither true nor false")
    return words[value.lower()]


def _optional_path(value: Any) -> Path | None:
    return None if value == "" else _path(value)


def _choice(*names: str) -> Parser:
    def parse(value: Any) -> str:
        if value not in names:
            raise ValueError(f"is none of {', '.join(names)}")
        return str(value)

    return parse


_Number = TypeVar("_Number", int, float)


def _number(kind: type[_Number], value: Any) -> _Number:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError("is not a number")
    if kind is int and isinstance(value, float):
        raise ValueError("is not a whole number")
    try:
        return kind(value)
    except ValueError:
        raise ValueError("is not a number") from None


def _setting(default: Any, parse: Parser, explanation: str, *, flag: str = "", metavar: str = "") -> Any:
    """A configuration field: default value (as in TOML, or a function making it), parser, explanation."""
    metadata = {"parse": parse, "explanation": explanation, "flag": flag, "metavar": metavar, "default": default}
    if callable(default):
        return dataclasses.field(default_factory=lambda: _computed(default, parse), metadata=metadata)
    return dataclasses.field(default=parse(default), metadata=metadata)


def _computed(make: Callable[[], Any], parse: Parser) -> Any:
    value = make()
    try:
        return parse(value)
    except ValueError as error:
        raise ConfigError(f"the host name {value!r} {error}; give --name", reason="bad_value") from None


_CERT = (
    "This daemon's certificate (PEM, with its chain); read again when the file changes. All three tls_ paths, or none."
)
_KEY = "Private key of tls_cert (PEM), readable by this daemon alone."
_CA = "Certificate authorities whose certificates are accepted from others (PEM)."
_TRUST_DOMAIN = "Trust domain of identities: certificates say spiffe://TRUST_DOMAIN/backstay/node/NAME and the like."
_INSECURE = "Speak plaintext with everybody who reaches the ports: only on a network that nobody else can reach."
_HTTP_TLS = "Serve http over TLS, with tls_cert; watchers need no certificate of their own."

_LEASE = "Seconds without a word after which a peer counts as lost; a heartbeat is sent every sixth of it."


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """Settings of ``backstayd node``: the daemon that holds the memory of one machine."""

    section: ClassVar[str] = "node"
    live: ClassVar[frozenset[str]] = frozenset(
        {"log_format", "log_level", "quota_bytes", "user_quota_bytes"}
    )  # taken over at SIGHUP

    name: str = _setting(
        socket.gethostname, _name, "Name of this node, unique in the cluster (default: the host name)."
    )
    memory_dir: Path = _setting(
        "/run/backstay/memory",
        _path,
        "Directory on a tmpfs of its own that holds the snapshots; one daemon per directory.",
    )
    socket: Path = _setting(DEFAULT_SOCKET, _socket_path, "Unix socket on which trainers of this machine are served.")
    socket_group: str = _setting(
        "",
        _domain,
        "Group whose members may use the socket (default: the daemon's own). Give trainers one that cannot read keys.",
        metavar="NAME",
    )
    coordinator: str = _setting(
        "127.0.0.1:7070",
        _addresses,
        "The coordinator; with standbys all of them, separated by commas, or a name that resolves to all.",
        metavar="HOST:PORT[,...]",
    )
    bulk: str = _setting(
        "127.0.0.1:7071",
        _reachable_address,
        "Address that other nodes read and write shards at; they are told it, so they must reach it. Port 0: any.",
        metavar="HOST:PORT",
    )
    http: str = _setting(
        "127.0.0.1:7072", _address, "Where /metrics, /livez, /readyz and /status.json are served.", metavar="HOST:PORT"
    )
    domain: str = _setting("", _domain, "Failure domain, such as a rack: groups are spread over domains.")
    kubernetes_node: str = _setting(
        "",
        _domain,
        "Name of the Kubernetes node this daemon runs on (spec.nodeName): it drains while that is cordoned.",
        metavar="NAME",
    )
    quota_bytes: int = _setting(
        0,
        parse_size,
        "Most memory to hold, such as '8GiB'; 0 is what tmpfs and cgroup allow.",
        flag="--quota",
        metavar="SIZE",
    )
    user_quota_bytes: int = _setting(
        0, parse_size, "Most of it that the runs of one user may hold; 0 is no limit of its own.", metavar="SIZE"
    )
    coders: int = _setting(1, _count(1, 64), "Processes that encode, rebuild, verify and move bytes.")
    lease_s: float = _setting(3.0, _seconds, _LEASE)
    tls_cert: Path | None = _setting("", _optional_path, _CERT, metavar="FILE")
    tls_key: Path | None = _setting("", _optional_path, _KEY, metavar="FILE")
    tls_ca: Path | None = _setting("", _optional_path, _CA, metavar="FILE")
    trust_domain: str = _setting("backstay", parse_trust_domain, _TRUST_DOMAIN, metavar="NAME")
    insecure: bool = _setting(False, _switch, _INSECURE)
    http_tls: bool = _setting(False, _switch, _HTTP_TLS)
    log_format: str = _setting("text", _choice("text", "json"), "Form of the log on stderr: text or json.")
    log_level: str = _setting("info", _choice("debug", "info", "warning", "error"), "debug, info, warning or error.")


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorConfig:
    """Settings of ``backstayd coordinator``. ``parity`` is None for ``auto``."""

    section: ClassVar[str] = "coordinator"
    # taken over at SIGHUP
    live: ClassVar[frozenset[str]] = frozenset(
        {"job_ttl_s", "keep", "log_format", "log_level", "persist_bandwidth_bytes_per_s", "persist_every_s"}
        | {"persist_every_steps", "persist_keep_every", "persist_keep_last", "probation_steps", "restore_loop_limit"}
    )

    listen: str = _setting("127.0.0.1:7070", _address, "Where nodes and operators are served.", metavar="HOST:PORT")
    http: str = _setting(
        "127.0.0.1:7073",
        _address,
        "Where the status page, /metrics, /livez, /readyz and /status.json are served.",
        metavar="HOST:PORT",
    )
    advertise: str = _setting(
        "",
        _optional_address,
        "With an election: where nodes and operators reach this coordinator (default: what it listens at).",
        metavar="HOST:PORT",
    )
    election: str = _setting(
        "",
        _election,
        "Where coordinators agree which one leads: 'etcd://HOST:PORT[,HOST:PORT]/PREFIX' or 'kubernetes://NAMESPACE/NAME'; "
        "empty: this is the only one.",
        metavar="URL",
    )
    election_lease_s: float = _setting(
        9.0,
        _seconds,
        "Seconds without a renewal after which another coordinator takes over; if they differ the longest counts.",
    )
    parity: int | None = _setting(
        "auto",
        _parity,
        "Node losses each group survives (m), 0 to 4; auto: 2 from six nodes on, else 1.",
        metavar="auto|0..4",
    )
    group_size: int = _setting(8, _count(1, MAX_GROUP_NODES), "Nodes per erasure-coding group, about.")
    keep: int = _setting(1, _count(1, 100), "Protected snapshots kept per run.")
    job_ttl_s: float = _setting(
        86400.0, _ttl, "Seconds after its last trainer left until a run's memory is freed everywhere; 0: never."
    )
    probation_steps: int = _setting(
        3, _count(0, 10_000), "Steps after a restore in which NaN or infinity distrusts what was restored; 0: none."
    )
    restore_loop_limit: int = _setting(
        10, _count(0, 10_000), "Restores of the same snapshot without progress after which a run stops; 0: no limit."
    )
    persist_url: str = _setting(
        "",
        _url,
        "Durable storage that nodes copy protected snapshots to and restore from: an fsspec URL such as "
        "'file:///mnt/ckpt' or 's3://bucket/prefix'; empty: none. Credentials come from the nodes' environment.",
        metavar="URL",
    )
    persist_every_s: float = _setting(1800.0, _ttl, "Seconds between persisted snapshots of a run; 0: not by time.")
    persist_every_steps: int = _setting(
        0, _count(0, 1_000_000_000), "Steps between persisted snapshots of a run; 0: not by steps."
    )
    persist_keep_last: int = _setting(3, _count(1, 1_000_000), "Newest persisted snapshots kept per run.")
    persist_keep_every: int = _setting(
        0, _count(0, 1_000_000), "Besides, every n-th persisted snapshot is kept for good; 0: none."
    )
    persist_bandwidth_bytes_per_s: int = _setting(
        0,
        parse_size,
        "Most bytes a second that a node sends to durable storage, such as '200MB'; 0: no cap.",
        flag="--persist-bandwidth",
        metavar="SIZE",
    )
    lease_s: float = _setting(3.0, _seconds, _LEASE)
    tls_cert: Path | None = _setting("", _optional_path, _CERT, metavar="FILE")
    tls_key: Path | None = _setting("", _optional_path, _KEY, metavar="FILE")
    tls_ca: Path | None = _setting("", _optional_path, _CA, metavar="FILE")
    trust_domain: str = _setting("backstay", parse_trust_domain, _TRUST_DOMAIN, metavar="NAME")
    insecure: bool = _setting(False, _switch, _INSECURE)
    http_tls: bool = _setting(False, _switch, _HTTP_TLS)
    log_format: str = _setting("text", _choice("text", "json"), "Form of the log on stderr: text or json.")
    log_level: str = _setting("info", _choice("debug", "info", "warning", "error"), "debug, info, warning or error.")


Config = TypeVar("Config", NodeConfig, CoordinatorConfig)
SECTIONS: Final[tuple[type[NodeConfig | CoordinatorConfig], ...]] = (NodeConfig, CoordinatorConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One field as the operator meets it. ``default`` is as written in TOML."""

    name: str
    flag: str
    metavar: str
    explanation: str
    default: Any
    is_computed: bool
    is_switch: bool


def settings(cls: type[NodeConfig | CoordinatorConfig]) -> Iterator[Setting]:
    """The settings of a section, in order."""
    for field in dataclasses.fields(cls):
        default = field.metadata["default"]
        yield Setting(
            name=field.name,
            flag=field.metadata["flag"] or "--" + field.name.replace("_", "-"),
            metavar=field.metadata["metavar"] or field.name.rpartition("_")[2].upper(),
            explanation=field.metadata["explanation"],
            default="" if callable(default) else default,
            is_computed=callable(default),
            is_switch=isinstance(default, bool),
        )


def load(cls: type[Config], *, file: Path | None, environ: Mapping[str, str], flags: Mapping[str, str]) -> Config:
    """Settings of one role from a TOML file (or None), the environment and flags (field name to text); the later wins.

    Raises:
        ConfigError: for an unreadable file, an unknown key, a value that is not of its kind (names source and key), or
            neither TLS nor ``insecure``.
    """
    found: dict[str, tuple[Any, str]] = {}
    if file is not None:
        found |= {
            name: (value, f"{file}: [{cls.section}] {name}") for name, value in _read_file(file, cls.section).items()
        }
    found |= _read_environment(environ, cls)
    names = {setting.name: setting.flag for setting in settings(cls)}
    found |= {name: (value, names[name]) for name, value in flags.items()}
    values = {}
    for field in dataclasses.fields(cls):
        if field.name in found:
            value, where = found[field.name]
            try:
                values[field.name] = field.metadata["parse"](value)
            except ValueError as error:
                raise ConfigError(f"{where} = {value!r} {error}", reason="bad_value") from None
    loaded = cls(**values)
    check_security(loaded)
    return loaded


def check_security(config: NodeConfig | CoordinatorConfig) -> None:
    """Raise ConfigError unless either all of TLS is set or ``insecure`` says that plaintext is meant."""
    paths = {"tls_cert": config.tls_cert, "tls_key": config.tls_key, "tls_ca": config.tls_ca}
    missing = [name for name, path in paths.items() if path is None]
    if len(missing) == len(paths) and not config.insecure:
        role = f"--node {config.name}" if isinstance(config, NodeConfig) else "--coordinator"
        raise ConfigError(
            f"neither TLS nor insecure is set in [{config.section}]: make certificates with `backstay certs --ca-dir DIR "
            f"{role}` and set tls_cert, tls_key and tls_ca, or say --insecure to speak plaintext",
            reason="no_security",
        )
    if len(missing) < len(paths) and config.insecure:
        raise ConfigError(
            f"both TLS and insecure are set in [{config.section}]: take one of them away", reason="two_securities"
        )
    if 0 < len(missing) < len(paths):
        raise ConfigError(
            f"TLS needs tls_cert, tls_key and tls_ca in [{config.section}]; not set: {', '.join(missing)}",
            reason="half_security",
        )
    if config.http_tls and missing:
        raise ConfigError(
            f"http_tls in [{config.section}] needs tls_cert, tls_key and tls_ca; set them, or take http_tls away",
            reason="half_security",
        )


def sample(*classes: type[NodeConfig | CoordinatorConfig]) -> str:
    """A TOML file with every setting at its default, each explained; computed ones stand commented out."""
    lines = ["# backstayd configuration. Environment (BACKSTAYD_<SECTION>_<NAME>) and flags win over this file."]
    for cls in classes:
        lines += ["", f"[{cls.section}]"]
        for setting in settings(cls):
            lines.append(f"# {setting.explanation}")
            lines.append(
                f"# {setting.name} = ..." if setting.is_computed else f"{setting.name} = {_toml(setting.default)}"
            )
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _read_file(file: Path, section: str) -> dict[str, Any]:
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {file}: {error.strerror}", reason="unreadable_file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file} is not TOML: {error}", reason="bad_file") from None
    for cls in SECTIONS:
        table = document.get(cls.section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{file}: {cls.section} is not a table; write [{cls.section}]", reason="bad_file")
        known = [setting.name for setting in settings(cls)]
        for key in table:
            if key not in known:
                raise _misplaced(f"{file}: [{cls.section}] {key}", key) or _unknown(
                    f"{file}: [{cls.section}] {key}", key, known
                )
    sections = [cls.section for cls in SECTIONS]
    for key in document:
        if key not in sections:
            raise _misplaced(f"{file}: {key}", key) or _unknown(f"{file}: {key}", key, sections)
    return dict(document.get(section, {}))


def _read_environment(
    environ: Mapping[str, str], cls: type[NodeConfig | CoordinatorConfig]
) -> dict[str, tuple[Any, str]]:
    prefix = f"BACKSTAYD_{cls.section.upper()}_"
    known = {setting.name.upper(): setting.name for setting in settings(cls)}
    found: dict[str, tuple[Any, str]] = {}
    for variable, value in environ.items():
        key = variable.removeprefix(prefix)
        if not variable.startswith(prefix) or (key not in known and _SERVICE_VARIABLE.match(key)):
            continue
        if key not in known:
            raise _unknown(f"environment: {variable}", key, list(known), prefix)
        found[known[key]] = (value, f"environment: {variable}")
    return found


def _misplaced(where: str, key: str) -> ConfigError | None:
    """The mistake of a setting that stands in a section that is not its own, or in none."""
    owners = [f"[{cls.section}]" for cls in SECTIONS if key in {setting.name for setting in settings(cls)}]
    if not owners:
        return None
    return ConfigError(f"{where} is a setting of {' and '.join(owners)}: write it there", reason="wrong_section")


def _unknown(where: str, key: str, known: list[str], prefix: str = "") -> ConfigError:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return ConfigError(f"{where} is not a setting; the nearest one is {prefix}{nearest[0]}", reason="unknown_key")


if __name__ == "__main__":
    print(sample(*SECTIONS), end="")
