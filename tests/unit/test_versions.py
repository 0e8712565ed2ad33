"""What may talk to what: one minor release apart works, more is refused by name, and identities stay what they were."""

from __future__ import annotations

from dataclasses import replace

import pytest

from backstay import __version__
from backstay.errors import ConfigError, IntegrityError
from backstay.format import versions
from backstay.format.versions import Side, is_readable, is_spoken, why_apart
from backstayd.core.messages.report import NodeIdentity
from backstayd.transport.skew import Releases
from tests.kit.wording import refuses
from tests.unit.test_contracts import a_manifest, a_plan


def a_side(name: str, release: str, protocol: int = 1) -> Side:
    return Side(name=name, release=release, protocol=protocol)


@pytest.mark.parametrize(
    ("own", "other", "first"),
    [
        (("0.2.0", 1), ("0.2.7", 1), ""),
        (("0.2.0", 1), ("0.1.0", 1), ""),
        (("0.2.0", 1), ("0.3.0", 1), ""),
        (("0.2.0", 2), ("0.1.0", 1), ""),
        (("0.2.0", 1), ("", 1), ""),
        (("0.2.0", 1), ("unknown", 1), ""),
        (("0.3.0", 1), ("0.1.0", 1), "theirs"),
        (("0.1.0", 1), ("0.3.0.dev1", 1), "ours"),
        (("0.9.0", 1), ("1.0.0", 1), "ours"),
        (("0.2.0", 3), ("0.2.0", 1), "theirs"),
        (("0.2.0", 1), ("0.2.0", 2), "ours"),
    ],
)
def test_parts_work_together_up_to_one_minor_release_apart(
    own: tuple[str, int], other: tuple[str, int], first: str
) -> None:
    said = why_apart(a_side("ours", *own), a_side("theirs", *other))
    assert bool(said) == bool(first)
    if first:
        assert f"Upgrade {first} first" in said
        assert own[0] in said
        assert other[0] in said


def test_each_protocol_is_understood_together_with_the_one_before() -> None:
    assert [found for found in range(6) if is_spoken(found, 4)] == [3, 4]
    assert [found for found in range(4) if is_readable(found)] == [1]


def a_node(name: str, release: str = __version__, protocol: int = versions.NODE_PROTOCOL) -> NodeIdentity:
    return NodeIdentity(name=name, incarnation="1", bulk_address="n:1", version=release, protocol=protocol)


def test_a_node_two_releases_from_the_coordinator_is_refused_with_both_versions() -> None:
    with refuses(ConfigError, "bad_protocol"):
        Releases().admit("stream", a_node("n1", "0.99.0"))
    with pytest.raises(ConfigError, match=r"protocol 9"):
        Releases().admit("stream", a_node("n1", protocol=9))


def test_nodes_two_releases_apart_are_refused_though_the_coordinator_is_between_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("backstayd.transport.skew.__version__", "0.2.0")
    releases = Releases()
    releases.admit("one", a_node("n1", "0.1.4"))
    with refuses(ConfigError, "bad_protocol", "0.3", 0, "0.1", 4):
        releases.admit("two", a_node("n2", "0.3.0"))
    releases.leave("one")
    releases.admit("two", a_node("n2", "0.3.0"))
    releases.admit("two", a_node("n2", "0.3.0"))


def test_the_identities_of_plans_and_manifests_are_those_of_the_releases_before() -> None:
    """A field that is added to a sealed record must not change the identity that a release without it computes."""
    assert a_plan().plan_id == "475cb174a7c03b611a31dbc3f7a7bc49"
    assert a_manifest().digest == "7bf71ae3ab00504facc2c8a37f2bc738f36813da79ff1b4319cee6fc0eb52d52"


def test_a_manifest_of_another_format_says_who_wrote_it_and_what_to_do() -> None:
    manifest = replace(a_manifest(), format=7, writer="backstay 3.1.0, pid 5")
    with refuses(IntegrityError, "bad_format", "3.1", 0, 5, 7, 1):
        manifest.check()
