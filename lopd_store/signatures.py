"""Signatures: somebody vouches for a fingerprint, and whoever has the public key can see it.

    make_key("alice")                                        # alice, alice.pub
    sign("artifact", key="alice")
    verify("artifact", signed_by="alice.pub").require_ok()

`signatures.json` lies beside the manifest and changes nothing of it: an artifact has one name with any number of
signatures. It says nothing about where they were made, or by whom but a key. Ed25519 comes from the package
`cryptography`, which is imported where a key is used.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopd_store import layout, strictjson
from lopd_store import manifest as manifests
from lopd_store.digest import digest_bytes, is_digest
from lopd_store.durable import sync_directory, write_durably
from lopd_store.errors import ArtifactError, InputError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

MAX_BYTES = 64 << 10  # of signatures.json: about 150 signatures
_FORMAT = "lopd-signature"
_ALGORITHM = "ed25519"
_SIGNED = "lopd artifact"  # the first line of what is signed, so that no signature of anything else passes for one
_KEY_BYTES = 32
# The one text of a key in OpenSSH's form: its type twice, the second time in base64 with the length of the key.
_PUBLIC_KEY = re.compile(r"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI[A-P][A-Za-z0-9+/]{42}")
_SIGNATURE = re.compile(r"[0-9a-f]{128}")
_MAX_KEY_FILE_BYTES = 16 << 10
_LITERAL_KEY = re.compile(r"\S+ AAAA")


@dataclass(frozen=True, kw_only=True)
class Signature:
    """The signature of one fingerprint by one key."""

    fingerprint: str
    public_key: str  # "ssh-ed25519 AAAA…" without a comment, which would name a person and a host
    signature: str  # 128 hex digits

    @property
    def is_valid(self) -> bool:
        """Whether it verifies."""
        _require_cryptography()
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        key = base64.b64decode(self.public_key.partition(" ")[2])[-_KEY_BYTES:]
        try:
            Ed25519PublicKey.from_public_bytes(key).verify(bytes.fromhex(self.signature), message(self.fingerprint))
        except InvalidSignature:
            return False
        return True

    def to_json(self) -> dict[str, str]:
        """An element of signatures.json."""
        return {"format": _FORMAT, "algorithm": _ALGORITHM, "signed": _SIGNED, **vars(self)}


# Bytes and values


def message(fingerprint: str) -> bytes:
    """The bytes that are signed."""
    return f"{_SIGNED}\n{fingerprint}\n".encode()


def sign_fingerprint(fingerprint: str, key: Ed25519PrivateKey) -> Signature:
    """The signature of a fingerprint, the same each time."""
    signature = key.sign(message(fingerprint)).hex()
    return Signature(fingerprint=fingerprint, public_key=_text_of(key.public_key()), signature=signature)


def parse(data: bytes) -> tuple[Signature, ...]:
    """What the bytes of signatures.json hold; raises ArtifactError, A100, where they are none."""
    try:
        value = strictjson.loads(data, where=layout.SIGNATURES, max_bytes=MAX_BYTES)
    except ArtifactError as error:
        error.code = "A100"
        raise
    if not isinstance(value, list):
        raise ArtifactError(f"`{layout.SIGNATURES}` is not an array", code="A100", actual=type(value).__name__)
    found = tuple(_signature(element) for element in value)
    if len({(one.fingerprint, one.public_key) for one in found}) != len(found):
        raise ArtifactError(f"`{layout.SIGNATURES}` has two signatures of one artifact by one key", code="A100")
    return found


def render(found: Iterable[Signature]) -> bytes:
    """The bytes of signatures.json."""
    return strictjson.pretty([one.to_json() for one in found])


def require(found: Iterable[Signature], fingerprint: str, public_key: str) -> None:
    """Raise ArtifactError, A101, unless a valid signature of the fingerprint by the key is among those found."""
    found = tuple(found)
    of_it = [one for one in found if one.fingerprint == fingerprint]
    if by_it := [one for one in of_it if one.public_key == public_key]:
        if by_it[0].is_valid:
            return
        raise ArtifactError(
            f"`{layout.SIGNATURES}`: the signature does not verify",
            code="A101",
            expected=f"a signature of {fingerprint} by {public_key}",
            actual=f"{by_it[0].signature[:12]}…, which is none",
        )
    if others := [one.fingerprint for one in found if one.public_key == public_key]:
        raise ArtifactError(
            f"`{layout.SIGNATURES}`: the key has signed another artifact, or this one before it was changed",
            code="A101",
            expected=f"a signature of {fingerprint}",
            actual=f"one of {', '.join(others[:3])}",
        )
    raise ArtifactError(
        f"`{layout.SIGNATURES}`: there is no signature by the key",
        code="A101",
        expected=public_key,
        actual=", ".join(one.public_key for one in of_it[:3]) or "no signature of this artifact",
    )


def _signature(value: Any) -> Signature:
    if isinstance(value, dict):
        fingerprint, public_key, signature = (value.get(name) for name in Signature.__annotations__)
        if (
            is_digest(fingerprint)
            and isinstance(public_key, str)
            and _PUBLIC_KEY.fullmatch(public_key)
            and isinstance(signature, str)
            and _SIGNATURE.fullmatch(signature)
        ):
            found = Signature(fingerprint=str(fingerprint), public_key=public_key, signature=signature)
            if found.to_json() == value:
                return found
    raise ArtifactError(
        f"`{layout.SIGNATURES}` has an element that is no signature",
        code="A100",
        expected=f"an object of `algorithm`, `fingerprint`, `format`, `public_key`, `signature` and `signed`, "
        f"for {_ALGORITHM}",
        actual=repr(value)[:300],
    )


# Files


def read(directory: Path) -> tuple[Signature, ...]:
    """The signatures beside a manifest, none where there is no file; raises ArtifactError, A100."""
    path = directory / layout.SIGNATURES
    if not path.exists() and not path.is_symlink():
        return ()
    if path.is_symlink() or not path.is_file():
        raise ArtifactError(f"`{layout.SIGNATURES}` is not a plain file", code="A100")
    with path.open("rb") as file:
        return parse(file.read(MAX_BYTES + 1))


def sign(path: str | Path, *, key: str | Path) -> Signature:
    """Sign the fingerprint of an artifact with a private key, and keep the signature in its signatures.json.

    Signatures of others stay; signing again with the same key changes nothing. It says that this artifact is the one
    that is meant, not that it is whole, which is for `verify`.
    """
    directory, private = Path(path), read_private_key(Path(key))
    file = directory / layout.MANIFEST
    if file.is_symlink() or not file.is_file():
        raise layout.no_artifact(directory)
    data = manifests.read_bytes(file)
    manifests.parse(data, where=str(file))
    made, before = sign_fingerprint(digest_bytes(data), private), read(directory)
    after = tuple({(one.fingerprint, one.public_key): one for one in (*before, made)}.values())
    if after != before:
        rendered = render(after)
        parse(rendered)
        write_durably(directory / layout.SIGNATURES, rendered)
        sync_directory(directory)
    return made


def make_key(name: str | Path) -> str:
    """Make a key pair: NAME, which only its owner can read, and NAME.pub, whose text is returned. Never overwrites."""
    _require_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private, public = Path(name), Path(f"{name}.pub")
    for file in (private, public):
        if file.exists() or file.is_symlink():
            raise InputError(f"`{file}` exists", hint="choose another name: a key is never overwritten")
    key = Ed25519PrivateKey.generate()
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    text = _text_of(key.public_key())
    _write_new(private, key.private_bytes(*form), 0o600)
    try:
        _write_new(public, f"{text}\n".encode(), 0o644)
    except OSError:
        private.unlink()
        raise
    return text


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """An Ed25519 private key in PEM (PKCS#8) or as ssh-keygen writes it; raises InputError for anything else."""
    _require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

    data, expected = _read_key(path), "an Ed25519 private key, in PEM (PKCS#8) or OpenSSH's form"
    try:
        load = load_ssh_private_key if b"BEGIN OPENSSH PRIVATE KEY" in data else load_pem_private_key
        key = load(data, password=None)
    except TypeError as error:  # what the library raises for want of a password
        raise InputError(
            f"`{path}` is encrypted",
            expected="a private key without a passphrase",
            hint="make a key for signing with `lopd-store key NAME`",
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"`{path}` is not a private key", expected=expected) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"`{path}` is a key of another kind", expected=expected, actual=_kind(key))
    return key


def read_public_key(key: str | Path) -> str:
    """The text of an Ed25519 public key, from a file in OpenSSH's form or PEM, or from that text itself."""
    _require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key, load_ssh_public_key

    is_literal = isinstance(key, str) and _LITERAL_KEY.match(key) is not None
    data, name = (str(key).encode(errors="replace") if is_literal else _read_key(Path(key))).strip(), str(key)[:200]
    if b"PRIVATE KEY" in data:
        raise InputError(f"`{name}` is a private key", expected="the public key", hint=f"name `{name}.pub`")
    expected = "one Ed25519 public key, `ssh-ed25519 AAAA…` or PEM"
    try:
        public = load_pem_public_key(data) if data.startswith(b"-----") else load_ssh_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"`{name}` is not a public key", expected=expected) from error
    if not isinstance(public, Ed25519PublicKey):
        raise InputError(f"`{name}` is a key of another kind", expected=expected, actual=_kind(public))
    if not data.startswith(b"-----") and b"\n" in data:  # the library reads the first line alone
        raise InputError(f"`{name}` has more than one line", expected=expected)
    return _text_of(public)


def _text_of(key: Any) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    text = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode("ascii")
    assert _PUBLIC_KEY.fullmatch(text)
    return str(text)


def _kind(key: object) -> str:
    """`RSA` for an RSAPublicKey."""
    return type(key).__name__.removesuffix("PublicKey").removesuffix("PrivateKey")


def _read_key(path: Path) -> bytes:
    if not path.is_file():
        raise InputError(f"no key at `{path}`", hint="make one with `lopd-store key NAME`")
    with path.open("rb") as file:
        return file.read(_MAX_KEY_FILE_BYTES)


def _write_new(path: Path, data: bytes, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            path.unlink()  # half a key is none, and in the way of the next
            raise


def _require_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise InputError("signatures need the package `cryptography`", hint='pip install "lopd[sign]"') from error
