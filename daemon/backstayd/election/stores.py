"""Opens the store that the setting ``election`` names. Imports an engine, and the package it needs, only on demand."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, urlsplit

from backstay.errors import ConfigError
from backstayd.addresses import split_addresses
from backstayd.election.lease import LeaseStore

_PACKAGES: Final = {"etcd": "etcd3gw", "kubernetes": "kubernetes"}
_OPTIONS: Final = {"etcd": frozenset({"ca", "cert", "key"}), "kubernetes": frozenset[str]()}
_DNS_LABEL: Final = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the record is. ``hosts`` are etcd's endpoints or empty; ``path`` is a key or NAMESPACE/NAME."""

    engine: str
    hosts: tuple[str, ...]
    path: str
    options: dict[str, str] = field(default_factory=dict)


def parse(url: str) -> Place:
    """A place from ``etcd://HOST:PORT[,HOST:PORT]/PREFIX`` or ``kubernetes://NAMESPACE/NAME``; raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in _PACKAGES:
        raise ValueError("is neither empty nor etcd://HOST:PORT[,HOST:PORT]/PREFIX nor kubernetes://NAMESPACE/NAME")
    options, path = dict(parse_qsl(parts.query, keep_blank_values=True)), parts.path.strip("/")
    unknown = sorted(set(options) - _OPTIONS[parts.scheme])
    if unknown:
        raise ValueError(f"has an unknown option {unknown[0]} for {parts.scheme}")
    if parts.scheme == "etcd":
        if not path:
            raise ValueError("has no PREFIX: etcd://HOST:PORT/PREFIX, such as etcd://etcd-0:2379/backstay")
        return Place(engine="etcd", hosts=split_addresses(parts.netloc), path=path, options=options)
    if not (_DNS_LABEL.match(parts.netloc) and _DNS_LABEL.match(path)):
        raise ValueError("is not kubernetes://NAMESPACE/NAME with names that Kubernetes allows")
    return Place(engine="kubernetes", hosts=(), path=f"{parts.netloc}/{path}")


def open_store(url: str, *, call_timeout_s: float) -> LeaseStore:
    """The store that ``url`` names.

    Raises:
        ConfigError: a package is missing, or the engine lacks something it needs.
    """
    place = parse(url)
    package = _PACKAGES[place.engine]
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"election = {url} needs the package {package}: pip install 'backstay[{place.engine}]' ({error})",
            reason="missing_package",
        ) from None
    if place.engine == "etcd":
        from backstayd.election.etcd import EtcdStore

        return EtcdStore(place.hosts, place.path, options=place.options, call_timeout_s=call_timeout_s)
    from backstayd.election.kubernetes_lease import KubernetesStore

    return KubernetesStore(place.path, call_timeout_s=call_timeout_s)
