"""Checks of the installed software for `backstay doctor`: versions, and whether the codec decodes what it encoded.

Versions come from package metadata: torch is never imported.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import random
import re
import sys
from typing import Final

from backstay import __version__
from backstayd.cli.doctor.findings import Finding, fail, ok, warn

_MINIMUM: Final = {
    "grpcio": (1, 74),
    "protobuf": (6, 31),
    "pyeclib": (1, 7),
    "crc32c": (2, 7),
    "prometheus-client": (0, 21),
}
_MINIMUM_TORCH: Final = (2, 6)
_SHAPES: Final = ((1, 1), (4, 2), (6, 2), (8, 4))


def check_versions() -> list[Finding]:
    """One finding for Python, each runtime dependency, and torch if it is installed."""
    python = sys.version_info[:3]
    text = ".".join(map(str, python))
    findings = [ok("backstay", f"{__version__} on Python {text}")]
    if python < (3, 11):
        findings = [fail("backstay", f"{__version__} on Python {text}; 3.11 or newer is required")]
    for package, minimum in _MINIMUM.items():
        version = _version(package)
        wanted = ".".join(map(str, minimum))
        if version is None:
            findings.append(fail(package, f"is not installed; {wanted} or newer is required"))
        elif _numbers(version) < minimum:
            findings.append(fail(package, f"{version} is older than the required {wanted}"))
        else:
            findings.append(ok(package, version))
    torch = _version("torch")
    if torch is None:
        findings.append(ok("torch", "not installed here; only trainers need it"))
    elif _numbers(torch) < _MINIMUM_TORCH:
        findings.append(fail("torch", f"{torch} is older than the required {'.'.join(map(str, _MINIMUM_TORCH))}"))
    else:
        findings.append(ok("torch", torch))
    return findings


def check_codec() -> Finding:
    """Encode, lose fragments in several ways, rebuild, compare; a few milliseconds."""
    from backstayd.erasure.pyeclib_codec import PyeclibCodec

    source = random.Random(7)  # noqa: S311 - test bytes, the same every time
    try:
        for k, m in _SHAPES:
            codec = PyeclibCodec(k, m)
            data = [source.randbytes(4096) for _ in range(k)]
            fragments = [*data, *(bytes(parity) for parity in codec.encode(data))]
            losses = itertools.islice(itertools.combinations(range(k + m), m), 8)
            for lost in losses:
                available = {index: piece for index, piece in enumerate(fragments) if index not in lost}
                rebuilt = [bytes(piece) for piece in codec.reconstruct(available, lost)]
                if rebuilt != [fragments[index] for index in lost]:
                    return fail("codec", f"{k}+{m} rebuilt wrong bytes (fragments {lost}); do not use this build")
    except Exception as error:  # noqa: BLE001 - the boundary to a native library: whatever it raises is the finding
        return fail("codec", f"does not work here: {type(error).__name__}: {error}")
    shapes = ", ".join(f"{k}+{m}" for k, m in _SHAPES)
    return ok("codec", f"isa_l_rs_cauchy rebuilt every tested loss ({shapes})")


def check_versions_agree(document_versions: dict[str, str]) -> Finding:
    """Whether the nodes (name to version) run this version."""
    others = sorted({version for version in document_versions.values() if version != __version__})
    if others:
        return warn("versions of the nodes", f"{', '.join(others)}, but {__version__} here; finish the upgrade")
    return ok("versions of the nodes", f"{len(document_versions)} nodes, all {__version__}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
