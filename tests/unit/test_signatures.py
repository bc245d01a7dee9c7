"""Signatures: who signs names a fingerprint, and nothing but that key's valid signature of it will do."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

import lopd_store
from lopd_store import layout, signatures
from lopd_store.errors import ArtifactError, InputError
from lopd_store.signatures import make_key, message, parse, read_private_key, read_public_key, render, sign
from tests.artifacts import edit_manifest

# RFC 8032, section 7.1, test 1: the key, its public half.
RFC_SECRET = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
RFC_PUBLIC = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
# Made by `ssh-keygen -t ed25519 -N secret`, for this test alone.
ENCRYPTED = """\
-----BEGIN OPENSSH PRIVATE KEY-----
b3BlbnNzaC1rZXktdjEAAAAACmFlczI1Ni1jdHIAAAAGYmNyeXB0AAAAGAAAABCWiGrFGc
xqqfGB7yXQdJ3WAAAAEAAAAAEAAAAzAAAAC3NzaC1lZDI1NTE5AAAAIMz42B9HYPX4qAKK
UEIs0xez2wlPVjCzRRgs2lPSXC0yAAAAkEsS7lURfA15mMC2mJ3ffQ8f8wrGRgRNH4OMxM
wtnrUW8wdwJHBzJU+BAV0GJZ0mWCXHq6iiHORB0ogmI+lNWND2KzekrroEJqervtcP0h6m
/T7sv6lsDoDszI+wN+XwcSs4q9E1peX+rXHiZqhaGHgH4T2vqgMs72XQUSlakhWq92PCfT
lQAJYZ+ULrBEX7Aw==
-----END OPENSSH PRIVATE KEY-----
"""
TOKENS = "parts/00001.tokens.zarr.zip"


@pytest.fixture
def alice(tmp_path: Path) -> Path:
    """A private key; its public one has `.pub` behind the name."""
    make_key(tmp_path / "alice")
    return tmp_path / "alice"


@pytest.fixture
def bob(tmp_path: Path) -> Path:
    make_key(tmp_path / "bob")
    return tmp_path / "bob"


def pub(key: Path) -> str:
    return f"{key}.pub"


def codes(artifact: Path, key: Path) -> list[str]:
    return [found.code for found in lopd_store.verify(artifact, signed_by=pub(key)).findings]


def edit(artifact: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Change what signatures.json holds."""
    path = artifact / layout.SIGNATURES
    value = json.loads(path.read_bytes())
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def save_private(path: Path, key: Any, form: PrivateFormat, encryption: KeySerializationEncryption) -> Path:
    path.write_bytes(key.private_bytes(Encoding.PEM, form, encryption))
    return path


# Signing and checking


def test_what_somebody_signed_is_signed_by_them_alone(artifact: Path, alice: Path, bob: Path) -> None:
    made = sign(artifact, key=alice)
    assert made.fingerprint == lopd_store.open(artifact).fingerprint and made.public_key == read_public_key(pub(alice))
    report = lopd_store.verify(artifact, signed_by=pub(alice))
    assert report.ok and report.signed_by == made.public_key
    assert codes(artifact, bob) == ["A101"]


def test_the_name_of_an_artifact_is_the_same_signed_or_not(artifact: Path, alice: Path) -> None:
    before = lopd_store.open(artifact).fingerprint
    sign(artifact, key=alice)
    assert lopd_store.open(artifact).fingerprint == before and lopd_store.verify(artifact).ok


def test_several_people_sign_and_signing_again_changes_nothing(artifact: Path, alice: Path, bob: Path) -> None:
    first, second = sign(artifact, key=alice), sign(artifact, key=bob)
    path = artifact / layout.SIGNATURES
    before, when = path.read_bytes(), path.stat().st_mtime_ns
    assert sign(artifact, key=alice) == first
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (before, when)
    assert signatures.read(artifact) == (first, second) and render((first, second)) == before
    assert codes(artifact, alice) == codes(artifact, bob) == []


def test_signing_again_mends_a_damaged_signature(artifact: Path, alice: Path) -> None:
    made = sign(artifact, key=alice)
    edit(artifact, lambda value: value[0].update(signature="00" * 64))
    assert codes(artifact, alice) == ["A101"]
    sign(artifact, key=alice)
    assert signatures.read(artifact) == (made,) and codes(artifact, alice) == []


def test_signatures_hold_nothing_about_a_person_a_host_or_a_path(artifact: Path, alice: Path, tmp_path: Path) -> None:
    make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "somebody@somewhere", "-f", str(tmp_path / "theirs")]
    if subprocess.run(["sh", "-c", "command -v ssh-keygen"], capture_output=True, check=False).returncode:
        pytest.skip("ssh-keygen is not there")
    subprocess.run(make, check=True)
    sign(artifact, key=tmp_path / "theirs")
    assert codes(artifact, tmp_path / "theirs") == []
    (one,) = json.loads((artifact / layout.SIGNATURES).read_bytes())
    assert sorted(one) == ["algorithm", "fingerprint", "format", "public_key", "signature", "signed"]
    assert b"somebody" in (tmp_path / "theirs.pub").read_bytes() and "some" not in json.dumps(one)


def test_the_signed_bytes_are_those_of_the_specification(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.from_private_bytes(RFC_SECRET)
    fingerprint = "sha256:" + "0" * 64
    made = signatures.sign_fingerprint(fingerprint, key)
    assert message(fingerprint) == b"lopd artifact\nsha256:" + b"0" * 64 + b"\n"
    assert made.signature == key.sign(message(fingerprint)).hex() and made.is_valid
    text = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    assert made.public_key == text and key.public_key().public_bytes_raw() == RFC_PUBLIC
    assert parse(render([made])) == (made,)


# What is refused


def test_a_flipped_byte_of_the_manifest_is_refused(artifact: Path, alice: Path) -> None:
    sign(artifact, key=alice)
    path = artifact / layout.MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"text": true', b'"text": tru\x65 '))
    report = lopd_store.verify(artifact, signed_by=pub(alice))
    assert [found.code for found in report.findings] == ["A012"] and not report.ok


def test_a_manifest_that_was_changed_and_sealed_again_is_refused(artifact: Path, alice: Path) -> None:
    signed = sign(artifact, key=alice).fingerprint
    path = artifact / layout.MANIFEST
    path.write_bytes(edit_manifest(path.read_bytes(), "annotations", value={"note": "mine"}))
    assert lopd_store.verify(artifact).ok  # an artifact by another name
    (found,) = lopd_store.verify(artifact, signed_by=pub(alice)).findings
    assert (found.code, found.actual) == ("A101", f"one of {signed}")
    assert found.expected == f"a signature of {lopd_store.open(artifact).fingerprint}"


def test_a_flipped_byte_of_a_part_is_refused(artifact: Path, alice: Path) -> None:
    sign(artifact, key=alice)
    data = bytearray((artifact / TOKENS).read_bytes())
    data[len(data) // 2] ^= 1
    (artifact / TOKENS).write_bytes(data)
    assert codes(artifact, alice) == ["A022"]


def test_the_signatures_of_another_artifact_say_nothing_about_this_one(
    artifact: Path, unknown: Path, alice: Path, bob: Path
) -> None:
    (artifact / layout.SIGNATURES).write_bytes(
        render([signatures.sign_fingerprint(lopd_store.open(unknown).fingerprint, read_private_key(alice))])
    )
    assert codes(artifact, alice) == ["A101"]
    sign(artifact, key=bob)  # beside which they stay
    assert codes(artifact, bob) == [] and codes(artifact, alice) == ["A101"]
    sign(artifact, key=alice)
    assert codes(artifact, alice) == [] and len(signatures.read(artifact)) == 3


def test_every_flipped_bit_of_a_signature_is_seen(alice: Path) -> None:
    made = signatures.sign_fingerprint("sha256:" + "a" * 64, read_private_key(alice))
    for at in range(512):
        changed = bytearray.fromhex(made.signature)
        changed[at // 8] ^= 1 << at % 8
        assert not replace(made, signature=changed.hex()).is_valid


def test_the_signature_of_one_key_under_the_name_of_another_is_refused(artifact: Path, alice: Path, bob: Path) -> None:
    sign(artifact, key=alice)
    edit(artifact, lambda value: value[0].update(public_key=read_public_key(pub(bob))))
    (found,) = lopd_store.verify(artifact, signed_by=pub(bob)).findings
    assert found.code == "A101" and "the signature does not verify" in found.message


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"null", b"[1]", b"[{}]", b"\xff", b"[" * 40, b'[{"a": 1, "a": 1}]', b" " * 70_000 + b"[]"]
)
def test_a_damaged_file_is_a_finding_only_where_a_signature_is_asked_for(
    artifact: Path, alice: Path, data: bytes
) -> None:
    (artifact / layout.SIGNATURES).write_bytes(data)
    assert codes(artifact, alice) == ["A100"] and lopd_store.verify(artifact).ok
    with pytest.raises(ArtifactError) as caught:
        sign(artifact, key=alice)
    assert caught.value.code == "A100" and (artifact / layout.SIGNATURES).read_bytes() == data


def test_a_link_is_not_followed(artifact: Path, alice: Path, tmp_path: Path) -> None:
    sign(artifact, key=alice)
    (artifact / layout.SIGNATURES).rename(tmp_path / "elsewhere.json")
    (artifact / layout.SIGNATURES).symlink_to(tmp_path / "elsewhere.json")
    assert codes(artifact, alice) == ["A100"]


def test_more_signatures_than_can_be_read_are_not_written(artifact: Path, alice: Path) -> None:
    one = signatures.sign_fingerprint("sha256:" + "a" * 64, read_private_key(alice))
    many = [replace(one, fingerprint=f"sha256:{number:064x}") for number in range(160)]
    while len(render(many)) > signatures.MAX_BYTES:
        many.pop()
    data = render(many)
    (artifact / layout.SIGNATURES).write_bytes(data)
    with pytest.raises(ArtifactError, match=r"`signatures\.json` is too large to read"):
        sign(artifact, key=alice)
    assert (artifact / layout.SIGNATURES).read_bytes() == data


def test_a_quick_verification_does_not_speak_for_a_signature(artifact: Path, alice: Path) -> None:
    sign(artifact, key=alice)
    with pytest.raises(InputError, match="a quick verification does not reach as far as a signature"):
        lopd_store.verify(artifact, quick=True, signed_by=pub(alice))


def test_only_an_artifact_is_signed(tmp_path: Path, alice: Path) -> None:
    with pytest.raises(InputError, match="no artifact at"):
        sign(tmp_path, key=alice)
    assert not (tmp_path / layout.SIGNATURES).exists()


# A copy


def test_a_subset_keeps_the_signatures(artifact: Path, alice: Path, tmp_path: Path) -> None:
    sign(artifact, key=alice)
    copy = lopd_store.subset(artifact, output=tmp_path / "copy", only="sampled").path
    report = lopd_store.verify(copy, signed_by=pub(alice))
    assert report.ok and report.partial


# Keys


def test_a_new_key_is_for_its_owner_alone(tmp_path: Path) -> None:
    text = make_key(tmp_path / "mine")
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "mine.pub").read_text() == f"{text}\n"
    assert read_public_key(tmp_path / "mine.pub") == read_public_key(text) == text


@pytest.mark.parametrize("name", ["mine", "mine.pub"])
@pytest.mark.parametrize("link", [False, True], ids=["a file", "a link that leads nowhere"])
def test_a_new_key_overwrites_nothing(tmp_path: Path, name: str, link: bool) -> None:
    if link:
        (tmp_path / name).symlink_to("elsewhere")
    else:
        (tmp_path / name).write_text("precious")
    with pytest.raises(InputError, match=f"{name}` exists\n\nhint: choose another name"):
        make_key(tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert link or (tmp_path / name).read_text() == "precious"


@pytest.mark.parametrize("full_at", ["mine", "mine.pub"])
def test_a_full_disk_leaves_no_half_of_a_key(tmp_path: Path, full_at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def sync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == full_at:
            raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError, match="no room"):
        make_key(tmp_path / "mine")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.OpenSSH])
def test_a_private_key_is_read_in_either_form(tmp_path: Path, form: PrivateFormat) -> None:
    key = Ed25519PrivateKey.from_private_bytes(RFC_SECRET)
    path = save_private(tmp_path / "key", key, form, NoEncryption())
    assert read_private_key(path).public_key().public_bytes_raw() == RFC_PUBLIC


def test_a_public_key_is_read_as_text_as_a_line_with_a_comment_and_as_pem(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.from_private_bytes(RFC_SECRET).public_key()
    text = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    (tmp_path / "line.pub").write_text(f"{text} somebody@somewhere\n")
    (tmp_path / "key.pem").write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    for given in (text, f"{text} somebody@somewhere", tmp_path / "line.pub", str(tmp_path / "key.pem")):
        assert read_public_key(given) == text


@pytest.mark.parametrize("form", ["PKCS8", "OpenSSH"])
def test_an_encrypted_key_is_refused_in_words(tmp_path: Path, form: str) -> None:
    path, key = tmp_path / "key", Ed25519PrivateKey.from_private_bytes(RFC_SECRET)
    if form == "PKCS8":
        save_private(path, key, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    else:
        path.write_text(ENCRYPTED)
    with pytest.raises(InputError) as caught:
        read_private_key(path)
    assert str(caught.value) == (
        f"`{path}` is encrypted\n  expected  a private key without a passphrase\n\n"
        "hint: make a key for signing with `lopd-store key NAME`"
    )


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (rsa.generate_private_key(65537, 2048), "RSA"),
        (ec.generate_private_key(ec.SECP256R1()), "ECDSA"),
        (ed448.Ed448PrivateKey.generate(), "Ed448"),
    ],
    ids=["RSA", "ECDSA", "Ed448"],
)
def test_a_key_of_another_kind_is_refused(tmp_path: Path, key: Any, kind: str) -> None:
    private = save_private(tmp_path / "key", key, PrivateFormat.PKCS8, NoEncryption())
    public = tmp_path / "key.pem"
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    for read, path in ((read_private_key, private), (read_public_key, public)):
        with pytest.raises(InputError, match="is a key of another kind") as caught:
            read(path)
        assert kind[:2] in str(caught.value.actual)


@pytest.mark.parametrize("data", [b"", b"junk", b"\xff\xfe", b"-----BEGIN PRIVATE KEY-----\nAAAA\n"])
def test_what_is_no_key_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(data)
    with pytest.raises(InputError, match="is not a private key"):
        read_private_key(path)
    if b"PRIVATE" not in data:
        with pytest.raises(InputError, match="is not a public key"):
            read_public_key(path)


def test_the_halves_of_a_pair_are_not_taken_for_each_other(alice: Path) -> None:
    with pytest.raises(InputError, match="is not a private key"):
        read_private_key(Path(pub(alice)))
    with pytest.raises(InputError, match=r"is a private key(.|\n)*hint: name `.*alice\.pub`"):
        read_public_key(alice)


def test_a_file_of_many_keys_names_none(alice: Path, bob: Path, tmp_path: Path) -> None:
    both = tmp_path / "both.pub"
    both.write_text(Path(pub(alice)).read_text() + Path(pub(bob)).read_text())
    with pytest.raises(InputError, match="has more than one line"):
        read_public_key(both)


@pytest.mark.parametrize("read", [read_private_key, read_public_key])
def test_a_key_that_is_not_there_is_said_so(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(InputError, match="no key at"):
        read(tmp_path / "nothing")


def test_without_the_package_there_is_a_hint_and_all_else_works(
    sealed: Path, alice: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    assert lopd_store.verify(sealed).ok
    with pytest.raises(InputError) as caught:
        lopd_store.verify(sealed, signed_by=pub(alice))
    assert str(caught.value) == 'signatures need the package `cryptography`\n\nhint: pip install "lopd[sign]"'
