"""Certificates as backstay reads them: like a library that knows X.509 whole, and refused where that is in doubt."""

from __future__ import annotations

import contextlib
import datetime as dt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("cryptography")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from backstay.errors import ConfigError
from backstayd.security.certificate import read_der, read_pem

KEY = ec.generate_private_key(ec.SECP256R1())
TEXT = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=300)
BEGIN = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def made(
    names: list[x509.GeneralName], *, serial: int = 1, subject: str = "", has_others: bool = False
) -> x509.Certificate:
    attributes = [x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)] if subject else []
    builder = x509.CertificateBuilder().subject_name(x509.Name(attributes)).issuer_name(x509.Name([]))
    builder = builder.public_key(KEY.public_key()).serial_number(serial)
    builder = builder.not_valid_before(BEGIN).not_valid_after(BEGIN + dt.timedelta(days=1))
    if has_others:
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier(b"\x86\x03abc"), critical=False)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    return builder.sign(KEY, hashes.SHA256())


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


WHOLE = der(made([x509.UniformResourceIdentifier("spiffe://a/backstay/operator")], has_others=True))


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXT, max_size=4), st.integers(1, (1 << 159) - 1), st.text("ab\u0000é\x86", max_size=20), st.booleans())
def test_serial_and_uris_are_those_that_a_whole_library_reads(
    uris: list[str], serial: int, subject: str, has_others: bool
) -> None:
    names: list[x509.GeneralName] = [x509.DNSName("node-1.example")]
    names += [x509.UniformResourceIdentifier(uri) for uri in uris]
    certificate = made(names, serial=serial, subject=subject, has_others=has_others)
    found = read_pem(certificate.public_bytes(serialization.Encoding.PEM))
    extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(found.uris) == extension.get_values_for_type(x509.UniformResourceIdentifier) == uris
    assert int(found.serial, 16) == certificate.serial_number


@pytest.mark.parametrize("uri", ["spiffe://a/backstay/operator\x00.evil", "spiffe://a/ b", "", "\x7f", "a\n"])
def test_a_uri_that_is_no_plain_text_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_der(der(made([x509.UniformResourceIdentifier(uri)])))
    assert caught.value.reason == "no_identity"


def test_a_certificate_without_names_has_no_uri() -> None:
    assert read_der(der(made([]))).uris == ()


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_bytes_that_are_no_certificate_are_refused_and_nothing_else_happens(data: st.DataObject) -> None:
    raw = bytearray(WHOLE)
    for at in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=8)):
        raw[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    with contextlib.suppress(ConfigError):  # any other error fails this test
        read_der(bytes(raw[:cut]))
