"""Rollouts, parts and artifacts made by hand, honest or tampered with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import lopd_store
from lopd_store import layout
from lopd_store import manifest as manifests
from lopd_store.container import Group, pack
from lopd_store.digest import digest_contents
from lopd_store.identity import ModelIdentity
from lopd_store.manifest import Counts
from lopd_store.part import Part, rollouts_file, tokens_arrays, tokens_file, topk_arrays, topk_file
from lopd_store.provenance import RolloutsRecord
from lopd_store.rollouts import Rollout, write_rollouts
from lopd_store.topk import TopK

Ids = Sequence[int]


def random_pairs(lengths: Sequence[tuple[int, int]], *, seed: int = 0, vocab_size: int = 300) -> list[tuple[Ids, Ids]]:
    """Random (prompt ids, response ids) of the given lengths."""
    generator = np.random.default_rng(seed)

    def ids(length: int) -> list[int]:
        drawn: list[int] = generator.integers(6, vocab_size, length).tolist()
        return drawn

    return [(ids(prompt), ids(response)) for prompt, response in lengths]


def rollout(prompt: Ids, response: Ids, *, logprobs: Sequence[float] | None = None) -> Rollout:
    """A rollout in memory."""
    return Rollout(
        prompt_ids=np.array(prompt, np.uint32),
        response_ids=np.array(response, np.uint32),
        loss_mask=np.ones(len(response), np.bool_),
        logprobs=None if logprobs is None else np.array(logprobs, np.float32),
        prompt=None,
        response=None,
        finish_reason=None,
    )


def save_rollouts(
    path: Path,
    pairs: Sequence[tuple[Ids, Ids]],
    *,
    record: RolloutsRecord | None = None,
    logprob: float | None = None,
) -> Path:
    """A rollouts file of pairs of ids; every reference log-prob is `logprob`, or there are none."""
    rows = [
        {
            "prompt": "a prompt",
            "response": "a response",
            "prompt_ids": prompt,
            "response_ids": response,
            "loss_mask": [True] * len(response),
            "logprobs": None if logprob is None else [logprob] * len(response),
            "finish_reason": "length",
        }
        for prompt, response in pairs
    ]
    write_rollouts(path, rows, record)
    return path


def identity_named(name: str, /, **changes: Any) -> ModelIdentity:
    """An identity whose weights follow from its name; all share one tokenizer and config."""
    values: dict[str, Any] = {
        "weights": digest_contents(name.encode()).sha256,
        "rounded_weights": None,
        "config": digest_contents(b"config").sha256,
        "tokenizer": digest_contents(b"tokenizer").sha256,
        "chat_template": None,
        "vocab_size": 300,
        "output_width": 320,
        "adapter": None,
        "quantization": None,
        "name": name,
        "revision": None,
    }
    return ModelIdentity(**values | changes)


def make_topk(rows: Sequence[Sequence[tuple[int, float]]], tails: Sequence[float]) -> TopK:
    """A TopK from the (id, log-prob) entries of each position."""
    return TopK(
        counts=np.array([len(row) for row in rows], np.uint16),
        ids=np.array([id for row in rows for id, _ in row], np.uint32),
        logprobs=np.array([logprob for row in rows for _, logprob in row], np.float32),
        tail_logprobs=np.array(tails, np.float32),
    )


def read_first_part(directory: Path) -> Part:
    """Part 0 of an artifact."""
    return lopd_store.open(directory).part(0)


def change(array: npt.NDArray[Any], index: Any, value: Any) -> npt.NDArray[Any]:
    """A copy of an array with other values at an index."""
    changed = array.copy()
    changed[index] = value
    return changed


def replace_part(directory: Path, **arrays: Any) -> None:
    """Give part 0 other arrays (fields of Part or of its TopK) and seal the artifact again with honest digests."""
    part, encoding = read_first_part(directory), lopd_store.open(directory).manifest.encoding
    assert part.topk is not None
    in_topk = {name: value for name, value in arrays.items() if name in vars(part.topk)}
    topk = replace(part.topk, **in_topk)
    part = replace(part, topk=topk, **{name: value for name, value in arrays.items() if name not in in_topk})
    contents = {layout.TOKENS: tokens_file(part, encoding), layout.TOPK: topk_file(part, encoding)}
    replace_files(directory, contents, part.counts)


def replace_arrays(directory: Path, kind: str, **arrays: npt.NDArray[Any]) -> None:
    """Give part 0 other arrays of one of its files as they are stored, codes and rows, and seal again."""
    encoding = lopd_store.open(directory).manifest.encoding
    specs = tokens_arrays(encoding) if kind == layout.TOKENS else topk_arrays(encoding)
    group = Group((directory / layout.part_file(0, kind)).read_bytes(), specs, where=kind)
    replace_files(directory, {kind: pack({name: group.read(name) for name in group.lengths} | arrays, specs)})


def replace_table(directory: Path, columns: dict[str, Any]) -> None:
    """Give part 0 another rollouts table and seal again."""
    replace_files(directory, {layout.ROLLOUTS: rollouts_file(columns)})


def replace_files(directory: Path, contents: dict[str, bytes], counts: Counts | None = None) -> None:
    """Write files of part 0 and a manifest that tells the truth about their bytes."""
    manifest = manifests.parse((directory / layout.MANIFEST).read_bytes())
    first = manifest.parts[0]
    for kind, data in contents.items():
        (directory / layout.part_file(0, kind)).write_bytes(data)
    digests = {kind: digest_contents(data) for kind, data in contents.items()}
    parts = (replace(first, counts=counts or first.counts, files=first.files | digests), *manifest.parts[1:])
    totals = {name: sum(getattr(part.counts, name) for part in parts) for name in first.counts.to_json()}
    data = manifests.render(replace(manifest, counts=Counts(**totals), parts=parts))
    (directory / layout.MANIFEST).write_bytes(data)


def edit_manifest(data: bytes, *path: str | int, value: Any) -> bytes:
    """The manifest with another value at a path into its JSON, sealed again."""
    document = json.loads(data)
    at = document
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return manifests.sealed(document)
