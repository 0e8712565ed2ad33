"""Identities in certificates: what is taken for one, and that nothing which looks like one is."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backstay.errors import ConfigError
from backstayd.security.identity import Identity, Role, authorise, identify, parse
from tests.kit.wording import refuses

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fullmatch=True)
domains = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,60}", fullmatch=True)
identities = st.one_of(
    st.builds(lambda domain, name: Identity(trust_domain=domain, role=Role.NODE, name=name), domains, names),
    st.builds(
        lambda domain, role: Identity(trust_domain=domain, role=role),
        domains,
        st.sampled_from([Role.COORDINATOR, Role.OPERATOR]),
    ),
)
CHARACTERS = string.ascii_letters + string.digits + "/:._-%#?@ \\\n\0é"


def parsed(uri: str) -> Identity | None:
    """The identity, or None where there is none."""
    found, text = None, ""
    try:
        found = parse(uri)
    except ConfigError as error:
        text = str(error)
    assert found is not None or "is not a backstay identity" in text
    assert text.isprintable(), "what a stranger sent is shown in ASCII, on one line"
    return found


@given(identities)
def test_what_an_identity_states_is_read_back_as_the_same(identity: Identity) -> None:
    assert parse(identity.uri) == identity
    assert identify([identity.uri], trust_domain=identity.trust_domain) == identity


@given(identities, st.text(CHARACTERS, min_size=1, max_size=5), st.booleans())
def test_a_prefix_or_an_ending_makes_it_another_or_none(identity: Identity, extra: str, is_before: bool) -> None:
    changed = extra + identity.uri if is_before else identity.uri + extra
    found = parsed(changed)
    assert found != identity
    assert found is None or found.uri == changed


@given(identities, st.data())
def test_another_case_is_another_identity_or_none(identity: Identity, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(identity.uri) - 1))
    changed = identity.uri[:position] + identity.uri[position].swapcase() + identity.uri[position + 1 :]
    if changed == identity.uri:
        return
    assert parsed(changed) != identity


@given(st.text(CHARACTERS, max_size=80))
def test_whatever_is_read_states_exactly_what_was_written(text: str) -> None:
    for uri in (
        text,
        f"spiffe://{text}",
        f"spiffe://backstay/backstay/{text}",
        f"spiffe://backstay/backstay/node/{text}",
    ):
        found = parsed(uri)
        assert found is None or found.uri == uri


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "spiffe://backstay/backstay/node",
        "spiffe://backstay/backstay/node/",
        "spiffe://backstay/backstay/node/n1/",
        "spiffe://backstay/backstay/node/n1/n2",
        "spiffe://backstay/backstay/node//n1",
        "spiffe://backstay/backstay/node/../operator",
        "spiffe://backstay/backstay/node/n1?x",
        "spiffe://backstay/backstay/node/n%31",
        "spiffe://backstay/backstay/operator/",
        "spiffe://backstay/backstay/operator/me",
        "spiffe://backstay/backstay/operators",
        "spiffe://backstay/backstay/coordinator2",
        "spiffe://backstay/backstay/admin",
        "spiffe://backstay/operator",
        "spiffe://backstay/other/operator",
        "spiffe://backstay:8443/backstay/operator",
        "spiffe://me@backstay/backstay/operator",
        "spiffe:///backstay/operator",
        "https://backstay/backstay/operator",
        "SPIFFE://backstay/backstay/operator",
        "spiffe://backstay/backstay/Operator",
        "spiffe://Backstay/backstay/operator",
        " spiffe://backstay/backstay/operator",
        "spiffe://backstay/backstay/operator\n",
    ],
)
def test_what_only_looks_like_an_identity_is_none(uri: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(uri)
    assert caught.value.reason == "no_identity"


@given(st.lists(identities, min_size=2, max_size=4))
def test_several_identities_in_one_certificate_are_refused(several: list[Identity]) -> None:
    with refuses(ConfigError, "several_identities") as caught:
        identify([one.uri for one in several], trust_domain=several[0].trust_domain)
    assert caught.value.reason == "several_identities"


def test_a_certificate_without_a_uri_is_told_what_it_should_have() -> None:
    with refuses(ConfigError, "no_identity", "backstay/node/NAME"):
        identify([], trust_domain="backstay")


@given(identities, domains)
def test_another_trust_domain_is_refused_and_both_are_named(identity: Identity, domain: str) -> None:
    if domain == identity.trust_domain:
        return
    with pytest.raises(ConfigError) as caught:
        identify([identity.uri], trust_domain=domain)
    assert caught.value.reason == "other_trust_domain"
    assert repr(domain) in str(caught.value)
    assert repr(identity.trust_domain) in str(caught.value)


@given(identities, st.frozensets(st.sampled_from(list(Role))), names)
def test_only_the_listed_roles_and_only_the_named_node_are_let_through(
    identity: Identity, roles: frozenset[Role], name: str
) -> None:
    if identity.role not in roles:
        with refuses(ConfigError, "wrong_role", identity.role.value) as caught:
            authorise(identity, roles, doing="report")
        assert caught.value.reason == "wrong_role"
        return
    authorise(identity, roles, doing="report")
    if identity.name != name:
        with pytest.raises(ConfigError) as caught:
            authorise(identity, roles, doing="report", name=name)
        assert caught.value.reason == "wrong_name"
