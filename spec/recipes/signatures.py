"""Signatures that are none, by keys that everybody knows and nobody may trust."""

from __future__ import annotations

import functools
import json
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lopd_store import layout, signatures, strictjson
from lopd_store.digest import digest_bytes
from lopd_store.signatures import Signature
from recipes.artifact import Link, Tree, data_of, edited
from recipes.artifact import tokens_only as make_tokens_only

SIGNER, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2))
tokens_only = functools.cache(make_tokens_only)


def signature(tree: Tree, key: Ed25519PrivateKey = SIGNER) -> Signature:
    """The signature of an artifact's fingerprint."""
    return signatures.sign_fingerprint(digest_bytes(data_of(tree, layout.MANIFEST)), key)


def signed(tree: Tree, *keys: Ed25519PrivateKey) -> Tree:
    """The artifact with the signatures of these keys, in this order."""
    return tree | {layout.SIGNATURES: signatures.render(signature(tree, key) for key in keys)}


SIGNED_BY = signature(tokens_only()).public_key  # whose signature is asked for


def malformed() -> dict[str, Tree]:
    """A100: what is no array of signatures."""
    tree = tokens_only()
    good = signed(tree, SIGNER)
    data = data_of(good, layout.SIGNATURES)
    (element,) = json.loads(data)

    def holding(value: Any) -> Tree:
        return tree | {layout.SIGNATURES: strictjson.pretty(value)}

    trees = {
        slug: tree | {layout.SIGNATURES: text}
        for slug, text in {
            "empty": b"",
            "cut": data[: len(data) // 2],
            "byte_order_mark": b"\xef\xbb\xbf" + data,
            "name_twice": data.replace(b"{", b'{"signed": "lopd artifact",', 1),
            "nan": b"[NaN]",
            "too_large": data + b" " * signatures.MAX_BYTES,
        }.items()
    }
    trees |= {
        slug: holding([element | changes])
        for slug, changes in {
            "unknown_member": {"path": "/home/somebody"},
            "another_format": {"format": "lopd"},
            "another_algorithm": {"algorithm": "rsa"},
            "something_else_signed": {"signed": "lopd view"},
            "fingerprint_in_capitals": {"fingerprint": element["fingerprint"].upper()},
            "key_with_a_comment": {"public_key": element["public_key"] + " somebody@host"},
            "key_of_another_kind": {"public_key": element["public_key"].replace("ed25519", "rsa")},
            "key_of_another_length": {"public_key": element["public_key"].replace("AAAAI", "AAAAY")},
            "signature_too_short": {"signature": element["signature"][:-2]},
            "signature_in_capitals": {"signature": "AB" * 64},
            "signature_null": {"signature": None},
        }.items()
    }
    return trees | {
        "object": holding(element),
        "not_an_object_inside": holding([element, "signature"]),
        "without_signature": holding([{name: value for name, value in element.items() if name != "signature"}]),
        "two_by_one_key": holding([element, element | {"signature": "00" * 64}]),
        "link": tree | {layout.SIGNATURES: Link("real.json"), "real.json": data},
        "directory": tree | {f"{layout.SIGNATURES}/signatures.json": data},
    }


def not_signed() -> dict[str, Tree]:
    """A101: no valid signature of this artifact by `SIGNED_BY`."""
    tree = tokens_only()
    mine, other = signature(tree), signature(tree, OTHER)

    def holding(*changed: Signature) -> Tree:
        return tree | {layout.SIGNATURES: signatures.render(changed)}

    flipped = f"{int(mine.signature[0], 16) ^ 1:x}{mine.signature[1:]}"
    without_first_line = SIGNER.sign(mine.fingerprint.encode()).hex()
    changed = edited(tree, "annotations", {"note": "changed and sealed again"})
    return {
        "no_signatures": tree,
        "empty_array": holding(),
        "by_another_key": holding(other),
        "by_another_key_under_this_name": holding(_with(mine, other.signature)),
        "flipped_bit": holding(_with(mine, flipped)),
        "of_the_fingerprint_alone": holding(_with(mine, without_first_line)),
        "of_zeros": holding(_with(mine, "00" * 64)),
        "changed_after_it_was_signed": changed | {layout.SIGNATURES: signed(tree, SIGNER)[layout.SIGNATURES]},
        "signature_of_another_artifact": holding(_with(mine, signature(changed).signature)),
    }


def _with(one: Signature, other: str) -> Signature:
    return Signature(fingerprint=one.fingerprint, public_key=one.public_key, signature=other)
