"""Two models side by side: whether they are the same, and where they differ, in words.

Digests say that two models differ; only the files say how. Nothing is loaded but configs and tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopd_store import models
from lopd_store.identity import TOKENIZER_PARTS, ModelIdentity, identify, meaningful_config
from lopd_store.weights import OnBytes, TensorDigest, tensor_digests

_SHOWN = 3  # examples of each kind of difference


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two identities, and their differences as sentences by field; none where they are the same model."""

    identities: tuple[ModelIdentity, ModelIdentity]
    differences: dict[str, tuple[str, ...]]

    @property
    def same(self) -> bool:
        """Whether both are the same model."""
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "same": self.same,
            "differences": {field: list(words) for field, words in self.differences.items()},
            "identities": [identity.to_json() for identity in self.identities],
        }


def compare(first: str | Path, second: str | Path, *, on_bytes: OnBytes | None = None) -> Comparison:
    """Identify two models and say in words where they differ."""
    identities = identify(first, on_bytes=on_bytes), identify(second, on_bytes=on_bytes)
    files = models.find(first), models.find(second)
    explain: dict[str, Callable[[], Iterator[str]]] = {
        "weights": lambda: _weights(*identities, *(tensor_digests(one.weights) for one in files)),
        "config": lambda: _members(*(meaningful_config(models.load_config(one)) for one in files)),
        "tokenizer": lambda: _tokenizers(*(models.load_tokenizer(one) for one in files)),
        "chat_template": lambda: _templates(*(models.load_tokenizer(one).chat_template for one in files)),
    }

    def fields(name: str) -> tuple[str, ...]:
        if name in explain:
            return tuple(explain[name]())
        return (f"{getattr(identities[0], name)} and {getattr(identities[1], name)}",)

    return Comparison(
        identities=identities, differences={name: fields(name) for name in identities[0].differences(identities[1])}
    )


def _weights(
    first: ModelIdentity, second: ModelIdentity, a: Mapping[str, TensorDigest], b: Mapping[str, TensorDigest]
) -> Iterator[str]:
    if first.is_rounding_of(second):
        yield "the same values in another precision: rounded to bfloat16 they are equal"
        yield f"stored as {_kinds(a)} and as {_kinds(b)}"
        return
    yield from _only("tensors", sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys()))
    shared = sorted(a.keys() & b.keys())
    if reshaped := [name for name in shared if a[name].shape != b[name].shape]:
        examples = [f"`{name}` {list(a[name].shape)} and {list(b[name].shape)}" for name in reshaped[:_SHOWN]]
        yield f"{len(reshaped)} of {len(shared)} tensors have other shapes, such as {', '.join(examples)}"
    changed = [name for name in shared if name not in reshaped and a[name].rounded != b[name].rounded]
    if changed:
        yield f"{len(changed)} of {len(shared)} tensors have other values, such as {_list(changed)}"


def _kinds(tensors: Mapping[str, TensorDigest]) -> str:
    return " and ".join(sorted({one.dtype for one in tensors.values()}))


def _members(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(a.keys() | b.keys()):
        if a.get(name) != b.get(name):
            yield f"`{name}` is {_short(a.get(name, 'absent'))} and {_short(b.get(name, 'absent'))}"


def _tokenizers(a: Any, b: Any) -> Iterator[str]:
    first, second = a.get_vocab(), b.get_vocab()
    yield from _only("tokens", sorted(first.keys() - second.keys()), sorted(second.keys() - first.keys()))
    moved = sorted(
        (first[token], second[token], token) for token in first.keys() & second.keys() if first[token] != second[token]
    )
    if moved:
        examples = [f"{token!r} is {one} and {other}" for one, other, token in moved[:_SHOWN]]
        yield f"{len(moved)} tokens have other ids, such as {', '.join(examples)}"
    if sorted(a.all_special_ids) != sorted(b.all_special_ids):
        yield f"special ids are {_short(sorted(a.all_special_ids))} and {_short(sorted(b.all_special_ids))}"
    parts = [
        {} if (backend := getattr(one, "backend_tokenizer", None)) is None else json.loads(backend.to_str())
        for one in (a, b)
    ]
    for name in TOKENIZER_PARTS:
        left, right = (part.get(name) for part in parts)
        if name == "model":
            merges = [[] if not one else one.get("merges") or [] for one in (left, right)]
            if merges[0] != merges[1]:
                yield f"the merges differ: {len(merges[0])} and {len(merges[1])} of them"
        elif left != right:
            yield f"`{name}` is {_short(left)} and {_short(right)}"


def _templates(a: str | None, b: str | None) -> Iterator[str]:
    if a is None or b is None:
        yield "only one of them has a chat template"
        return
    lines = list(zip(a.splitlines() + [""] * len(b), b.splitlines() + [""] * len(a), strict=False))
    number, (left, right) = next((at, pair) for at, pair in enumerate(lines, start=1) if pair[0] != pair[1])
    yield f"from line {number} on: {_short(left)} and {_short(right)}"


def _only(what: str, first: list[str], second: list[str]) -> Iterator[str]:
    for which, names in (("first", first), ("second", second)):
        if names:
            yield f"{len(names)} {what} only in the {which}, such as {_list(names)}"


def _list(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:_SHOWN])


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return f"`{text[:80]}…`" if len(text) > 80 else f"`{text}`"
