"""What an operator can set for a node daemon and for the coordinator, as frozen dataclasses.

Each field carries its parser and its explanation, from which ``--help``, the sample file and the documentation are made.
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar

from backstay.errors import ConfigError
from backstay.protocol.messages import DEFAULT_SOCKET
from backstayd.config.values import (
    Parser,
    count_between,
    one_of,
    parse_address,
    parse_addresses,
    parse_election_url,
    parse_label,
    parse_name,
    parse_optional_address,
    parse_optional_path,
    parse_parity,
    parse_path,
    parse_reachable_address,
    parse_seconds,
    parse_socket_path,
    parse_switch,
    parse_trust_domain,
    parse_ttl,
    parse_url,
)
from backstayd.units import parse_size

MAX_GROUP_NODES: Final = 16


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


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonConfig:
    """Settings that both roles have."""

    section: ClassVar[str]
    live: ClassVar[frozenset[str]] = frozenset({"log_format", "log_level"})  # reloaded at SIGHUP

    lease_s: float = _setting(
        3.0,
        parse_seconds,
        "Seconds without a heartbeat after which a peer counts as lost; six heartbeats are sent per lease.",
    )
    tls_cert: Path | None = _setting(
        "",
        parse_optional_path,
        "This daemon's certificate (PEM, with its chain); reloaded when the file changes. Set all three tls_ paths or none.",
        metavar="FILE",
    )
    tls_key: Path | None = _setting(
        "",
        parse_optional_path,
        "Private key of tls_cert (PEM); only this daemon should be able to read it.",
        metavar="FILE",
    )
    tls_ca: Path | None = _setting(
        "",
        parse_optional_path,
        "Certificate authorities whose certificates are accepted from peers (PEM).",
        metavar="FILE",
    )
    trust_domain: str = _setting(
        "backstay",
        parse_trust_domain,
        "Trust domain of identities: certificates carry a URI such as spiffe://TRUST_DOMAIN/backstay/node/NAME.",
        metavar="NAME",
    )
    insecure: bool = _setting(
        False,
        parse_switch,
        "Speak plaintext with everyone who can reach the ports: only for a network that nobody else can reach.",
    )
    http_tls: bool = _setting(
        False, parse_switch, "Serve http over TLS with tls_cert; HTTP clients need no certificate of their own."
    )
    log_format: str = _setting("text", one_of("text", "json"), "Format of the log on stderr: text or json.")
    log_level: str = _setting(
        "info",
        one_of("debug", "info", "warning", "error"),
        "Lowest level that is logged: debug, info, warning or error.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig(DaemonConfig):
    """Settings of ``backstayd node``: the daemon that holds the memory of one machine."""

    section: ClassVar[str] = "node"
    live: ClassVar[frozenset[str]] = DaemonConfig.live | {"quota_bytes", "user_quota_bytes"}

    name: str = _setting(
        socket.gethostname, parse_name, "Name of this node, unique in the cluster (default: the host name)."
    )
    memory_dir: Path = _setting(
        "/run/backstay/memory",
        parse_path,
        "Directory on its own tmpfs that holds the snapshots; one daemon per directory.",
    )
    socket: Path = _setting(DEFAULT_SOCKET, parse_socket_path, "Unix socket that serves the trainers of this machine.")
    socket_group: str = _setting(
        "",
        parse_label,
        "Group whose members may use the socket (default: the daemon's own). Give trainers a group that cannot read keys.",
        metavar="NAME",
    )
    coordinator: str = _setting(
        "127.0.0.1:7070",
        parse_addresses,
        "The coordinator; with standbys, all of them separated by commas, or one name that resolves to all.",
        metavar="HOST:PORT[,...]",
    )
    bulk: str = _setting(
        "127.0.0.1:7071",
        parse_reachable_address,
        "Address at which other nodes read and write shards; announced to them, so they must reach it. Port 0: any free port.",
        metavar="HOST:PORT",
    )
    http: str = _setting(
        "127.0.0.1:7072",
        parse_address,
        "Where /metrics, /livez, /readyz and /status.json are served.",
        metavar="HOST:PORT",
    )
    domain: str = _setting("", parse_label, "Failure domain, such as a rack; groups are spread over domains.")
    kubernetes_node: str = _setting(
        "",
        parse_label,
        "Name of the Kubernetes node this daemon runs on (spec.nodeName); the daemon drains while that node is cordoned.",
        metavar="NAME",
    )
    quota_bytes: int = _setting(
        0,
        parse_size,
        "Most memory to hold, such as '8GiB'; 0: as much as tmpfs and cgroup allow.",
        flag="--quota",
        metavar="SIZE",
    )
    user_quota_bytes: int = _setting(
        0, parse_size, "Most of that memory that the runs of one user may hold; 0: no separate limit.", metavar="SIZE"
    )
    coders: int = _setting(1, count_between(1, 64), "Processes that encode, rebuild, verify and transfer shards.")


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorConfig(DaemonConfig):
    """Settings of ``backstayd coordinator``. ``parity`` is None for ``auto``."""

    section: ClassVar[str] = "coordinator"
    live: ClassVar[frozenset[str]] = DaemonConfig.live | {
        "job_ttl_s",
        "keep",
        "persist_bandwidth_bytes_per_s",
        "persist_every_s",
        "persist_every_steps",
        "persist_keep_every",
        "persist_keep_last",
        "probation_steps",
        "restore_loop_limit",
    }

    listen: str = _setting(
        "127.0.0.1:7070", parse_address, "Address that serves nodes and operators.", metavar="HOST:PORT"
    )
    http: str = _setting(
        "127.0.0.1:7073",
        parse_address,
        "Where the status page, /metrics, /livez, /readyz and /status.json are served.",
        metavar="HOST:PORT",
    )
    advertise: str = _setting(
        "",
        parse_optional_address,
        "With an election: address at which nodes and operators reach this coordinator (default: the listen address).",
        metavar="HOST:PORT",
    )
    election: str = _setting(
        "",
        parse_election_url,
        "Where coordinators elect their leader: 'etcd://HOST:PORT[,HOST:PORT]/PREFIX' or 'kubernetes://NAMESPACE/NAME'; "
        "empty: this is the only coordinator.",
        metavar="URL",
    )
    election_lease_s: float = _setting(
        9.0,
        parse_seconds,
        "Seconds without a renewal after which another coordinator takes over; if coordinators differ, the longest applies.",
    )
    parity: int | None = _setting(
        "auto",
        parse_parity,
        "Node losses each group survives (m), 0 to 4; auto: 2 with six or more nodes, else 1.",
        metavar="auto|0..4",
    )
    group_size: int = _setting(
        8, count_between(1, MAX_GROUP_NODES), "Approximate number of nodes per erasure-coding group."
    )
    keep: int = _setting(1, count_between(1, 100), "Protected snapshots kept per run.")
    job_ttl_s: float = _setting(
        86400.0, parse_ttl, "Seconds after a run's last trainer left until its memory is freed on every node; 0: never."
    )
    probation_steps: int = _setting(
        3,
        count_between(0, 10_000),
        "Steps after a restore during which NaN or infinity makes the restored snapshot distrusted; 0: none.",
    )
    restore_loop_limit: int = _setting(
        10,
        count_between(0, 10_000),
        "Restores of the same snapshot without progress after which the run is stopped; 0: no limit.",
    )
    persist_url: str = _setting(
        "",
        parse_url,
        "Durable storage to which nodes copy protected snapshots and from which they restore: an fsspec URL such as "
        "'file:///mnt/ckpt' or 's3://bucket/prefix'; empty: none. Credentials come from the nodes' environment.",
        metavar="URL",
    )
    persist_every_s: float = _setting(
        1800.0, parse_ttl, "Seconds between persisted snapshots of a run; 0: not by time."
    )
    persist_every_steps: int = _setting(
        0, count_between(0, 1_000_000_000), "Steps between persisted snapshots of a run; 0: not by steps."
    )
    persist_keep_last: int = _setting(
        3, count_between(1, 1_000_000), "How many of the newest persisted snapshots are kept per run."
    )
    persist_keep_every: int = _setting(
        0, count_between(0, 1_000_000), "In addition, every n-th persisted snapshot is kept forever; 0: none."
    )
    persist_bandwidth_bytes_per_s: int = _setting(
        0,
        parse_size,
        "Most bytes per second that a node sends to durable storage, such as '200MB'; 0: no limit.",
        flag="--persist-bandwidth",
        metavar="SIZE",
    )


Config = TypeVar("Config", bound=DaemonConfig)
SECTIONS: Final[tuple[type[DaemonConfig], ...]] = (NodeConfig, CoordinatorConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One field as the operator sees it. ``default`` is as written in TOML."""

    name: str
    flag: str
    metavar: str
    explanation: str
    default: Any
    is_computed: bool
    is_switch: bool


def settings(cls: type[DaemonConfig]) -> Iterator[Setting]:
    """The settings of a section in the order of the sample file: those of the role, then those of both."""
    shared = {field.name for field in dataclasses.fields(DaemonConfig)}
    for field in sorted(dataclasses.fields(cls), key=lambda field: field.name in shared):
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


def check_security(config: DaemonConfig) -> None:
    """Raise ConfigError unless either all of TLS is set, or ``insecure`` allows plaintext."""
    paths = {"tls_cert": config.tls_cert, "tls_key": config.tls_key, "tls_ca": config.tls_ca}
    missing = [name for name, path in paths.items() if path is None]
    if len(missing) == len(paths) and not config.insecure:
        role = f"--node {config.name}" if isinstance(config, NodeConfig) else "--coordinator"
        raise ConfigError(
            f"neither TLS nor insecure is set in [{config.section}]: make certificates with `backstay certs --ca-dir DIR "
            f"{role}` and set tls_cert, tls_key and tls_ca, or set --insecure to speak plaintext",
            reason="no_security",
        )
    if len(missing) < len(paths) and config.insecure:
        raise ConfigError(
            f"both TLS and insecure are set in [{config.section}]; remove one of them", reason="two_securities"
        )
    if 0 < len(missing) < len(paths):
        raise ConfigError(
            f"TLS needs tls_cert, tls_key and tls_ca in [{config.section}]; not set: {', '.join(missing)}",
            reason="half_security",
        )
    if config.http_tls and missing:
        raise ConfigError(
            f"http_tls in [{config.section}] needs tls_cert, tls_key and tls_ca; set them or remove http_tls",
            reason="half_security",
        )
