"""Tiny artifacts in memory, honest or sealed over something broken.

An artifact is a `Tree`: the bytes of each file by its path, or a link. Whoever breaks a file here also writes its true
size and digests into the manifest and seals it again, so that only the one broken thing is wrong.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lopd_store import layout, strictjson
from lopd_store.container import Group, pack
from lopd_store.digest import FileDigests, digest_bytes, digest_contents
from lopd_store.encoding import Encoding, make_encoding
from lopd_store.identity import ModelIdentity
from lopd_store.license import UNKNOWN_LICENSE, License
from lopd_store.manifest import Counts, Inputs, Manifest, PartEntry, Scoring, audited_at, parse, render, sealed
from lopd_store.part import Part, rollouts_file, round_part, tokens_arrays, tokens_file, topk_arrays, topk_file
from lopd_store.provenance import UNKNOWN_SFT, CheckpointRecord, RolloutsRecord, Sampling, SftProvenance
from lopd_store.statistic import SftAudit, Statistic, add_up, of_stored
from lopd_store.topk import Candidates, select
from lopd_store.view import View

Pairs = Sequence[tuple[Sequence[int], Sequence[int]]]  # (prompt, response) of each rollout
Weights = Sequence[Sequence[float]]  # of the ids of the support, at each position


@dataclass(frozen=True)
class Link:
    """A symbolic link."""

    target: str


Tree = dict[str, bytes | Link]

PAIRS: Pairs = [([5, 2, 9], [3, 3, 7, 4]), ([6], [2, 8, 5])]
VOCABULARY = 24
EXACT = make_encoding(exact=True, k_max=4, coverage=0.9)
COMPACT = make_encoding(k_max=4, coverage=0.9)


def identity(name: str, **changes: Any) -> ModelIdentity:
    """An identity whose weights follow from its name; all share one tokenizer and config."""
    values: dict[str, Any] = {
        "weights": digest_bytes(name.encode()),
        "rounded_weights": None,
        "config": digest_bytes(b"config"),
        "tokenizer": digest_bytes(b"tokenizer"),
        "chat_template": None,
        "vocab_size": VOCABULARY,
        "output_width": VOCABULARY + 8,
        "adapter": None,
        "quantization": None,
        "name": name,
        "revision": None,
    }
    return ModelIdentity(**values | changes)


def taught_by(name: str, *, domain: str | None = None, **changes: Any) -> SftProvenance:
    """SFT data by this teacher."""
    data = digest_bytes(b"sft data")
    return SftProvenance(domain=domain, status="recorded", teacher=identity(name, **changes), data=data)


def sampled_by(name: str, **changes: Any) -> RolloutsRecord:
    """Rollouts of this reference policy."""
    return RolloutsRecord(
        status="recorded",
        policy=identity(name, **changes),
        policy_checkpoint=None,
        prompts=digest_bytes(b"prompts"),
        sampling=Sampling(
            temperature=1.0, top_p=1.0, max_response_tokens=8, samples_per_prompt=1, seed=0, stop=("\n\n",)
        ),
    )


def sampled_at(temperature: float, top_p: float = 1.0) -> RolloutsRecord:
    """Rollouts of the student at another temperature or top-p."""
    record = sampled_by("student")
    return replace(record, sampling=replace(record.sampling, temperature=temperature, top_p=top_p))


def audited(positions: int = 20_000, outside: int = 0, score: float = 10.0, variance: float = 20_000.0) -> SftAudit:
    """What an audit of the SFT data found: by default that it is honest."""
    found = Statistic(positions=positions, outside=outside, score=score, variance=variance)
    return SftAudit(data=digest_bytes(b"sft data"), temperature=1.0, top_p=1.0, found=found)


def rollouts_audit(parts: Sequence[Part], encoding: Encoding, rollouts: RolloutsRecord | None) -> Statistic | None:
    """What the stored distributions of the reference policy say of its rollouts."""
    if (temperature := audited_at(encoding, rollouts)) is None:
        return None
    found = []
    for part in parts:
        topk = part.topk
        assert topk is not None and topk.reference_logprobs is not None and topk.reference_tail_logprobs is not None
        is_response = topk.ids == part.response_ids[topk.positions]
        of_reference = (topk.reference_logprobs, topk.reference_tail_logprobs)
        found.append(of_stored(topk.counts, *of_reference, is_response, part.loss_mask, temperature))
    return Statistic(**add_up(found).sums())


def make_part(
    pairs: Pairs = PAIRS,
    encoding: Encoding = COMPACT,
    *,
    support: Sequence[int] = range(2, 14),
    weights: Weights | None = None,
    seed: int = 0,
    reference: bool = True,
    loss_mask: Sequence[bool] | None = None,
) -> Part:
    """A part whose teacher gives the ids of `support` probabilities in proportion to `weights`, or random ones."""
    prompts = [list(prompt) for prompt, _ in pairs]
    responses = [list(response) for _, response in pairs]
    flat = [token for response in responses for token in response]
    source = random.Random(seed)
    teacher = _logprobs(weights or _random_weights(source, len(flat), len(support)), len(support))
    policy = _logprobs(_random_weights(source, len(flat), len(support)), len(support))
    nothing = np.full(len(flat), -np.inf, np.float32)
    both = encoding.rule == "teacher+reference"
    candidates = Candidates(
        ids=np.tile(np.array(support, np.uint32), (len(flat), 1)),
        logprobs=teacher,
        tail_logprobs=nothing,
        reference_logprobs=policy if both else None,
        reference_tail_logprobs=nothing if both else None,
    )
    column = {token: number for number, token in enumerate(support)}
    part = Part(
        rollout_offsets=np.cumsum([0, *(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))], dtype="i8"),
        prompt_lengths=np.array([len(prompt) for prompt in prompts], np.int32),
        token_ids=np.array([id for p, r in zip(prompts, responses, strict=True) for id in p + r], np.uint32),
        loss_mask=np.array([True] * len(flat) if loss_mask is None else loss_mask, np.bool_),
        sampled_logprobs=_of_tokens(teacher, flat, column),
        reference_logprobs=_of_tokens(policy, flat, column) if reference else None,
        topk=select(candidates, k_min=encoding.k_min, k_max=encoding.k_max, coverage=encoding.coverage),
    )
    return round_part(part, encoding)


def make_table(part: Part, *, text: bool = True) -> dict[str, Any]:
    """The columns of the rollouts table."""
    lengths = np.diff(part.position_offsets).astype(np.int32)
    said = {"prompt": ["a prompt"] * len(lengths), "response": ["a response"] * len(lengths)}
    return (said if text else {}) | {
        "finish_reason": ["stop"] * len(lengths),
        "prompt_length": part.prompt_lengths,
        "response_length": lengths,
    }


def whole(
    parts: Sequence[Part] | None = None,
    encoding: Encoding = COMPACT,
    *,
    text: bool = True,
    table: dict[str, Any] | None = None,
    vocab_size: int = VOCABULARY,
    domain: str | None = None,
    license: License = UNKNOWN_LICENSE,
    sft: SftProvenance = UNKNOWN_SFT,
    sft_audit: SftAudit | None = None,
    rollouts: RolloutsRecord | None = None,
    annotations: dict[str, Any] | None = None,
    more: Sequence[tuple[int, dict[str, Any]]] = (),
) -> Tree:
    """An artifact of these parts, or of one that `make_part` gives.

    `more` are further inputs: how many of the parts are of each, the last ones, and in what it differs.
    """
    parts = [make_part(encoding=encoding)] if parts is None else parts
    tree: Tree = {}
    entries = []
    owners = [index for index, (count, _) in enumerate(more, start=1) for _ in range(count)]
    owners = [0] * (len(parts) - len(owners)) + owners
    for number, part in enumerate(parts):
        contents = {
            layout.ROLLOUTS: rollouts_file(table or make_table(part, text=text)),
            layout.TOKENS: tokens_file(part, encoding),
            layout.TOPK: topk_file(part, encoding),
        }
        tree |= {layout.part_file(number, kind): data for kind, data in contents.items()}
        files = {kind: digest_contents(data) for kind, data in contents.items()}
        entries.append(PartEntry(counts=part.counts, input=owners[number], files=files))
    totals = {name: sum(getattr(entry.counts, name) for entry in entries) for name in Counts.__annotations__}
    inputs = Inputs(
        domain=domain,
        teacher=identity("teacher", vocab_size=vocab_size, output_width=vocab_size + 8),
        license=license,
        scoring=Scoring(engine="transformers", dtype="float32"),
        sft=sft,
        rollouts_file=digest_bytes(b"rollouts"),
        rollouts=rollouts,
        sft_audit=sft_audit,
    )
    listed = [inputs, *(replace(inputs, **changes) for _, changes in more)]
    of_inputs = [[part for part, owner in zip(parts, owners, strict=True) if owner == n] for n in range(len(listed))]
    audited = [rollouts_audit(of, encoding, one.rollouts) for of, one in zip(of_inputs, listed, strict=True)]
    manifest = Manifest(
        counts=Counts(**totals),
        encoding=encoding,
        inputs=tuple(replace(one, rollouts_audit=audit) for one, audit in zip(listed, audited, strict=True)),
        parts=tuple(entries),
        reference_logprobs=parts[0].reference_logprobs is not None,
        text=text,
        annotations=annotations or {},
    )
    return tree | {layout.MANIFEST: render(manifest)}


def several() -> Tree:
    """One part of mathematics and two of code, each domain with the teacher of its SFT data, one policy for both."""
    encoding = replace(COMPACT, rule="teacher+reference")
    width = {"output_width": VOCABULARY + 8}
    math, code = taught_by("teacher", domain="math", **width), taught_by("coder", domain="code", **width)
    code = replace(code, data=digest_bytes(b"sft data of code"))
    policy = CheckpointRecord(
        status="recorded", method="sft", model=identity("student"), base=identity("base"), data=None, sft=(math, code)
    )
    of_math = replace(sampled_by("student"), policy_checkpoint=policy)
    of_code = replace(of_math, prompts=digest_bytes(b"prompts of code"))
    other = {
        "domain": "code",
        "teacher": code.teacher,
        "license": License(id="mit", name=None, link=None, gated=None),
        "sft": code,
        "rollouts_file": digest_bytes(b"rollouts of code"),
        "rollouts": of_code,
    }
    parts = [make_part(encoding=encoding, seed=seed) for seed in range(3)]
    return whole(parts, encoding, domain="math", sft=math, rollouts=of_math, more=[(2, other)])


def viewed(tree: Tree, kinds: Sequence[str], parts: range | None = None) -> Tree:
    """A copy that holds these kinds of files of these parts, and says so."""
    view = View(kinds=tuple(kinds), parts=parts or range(len(document(tree)["parts"])))
    kept = {name: tree[name] for name in [layout.MANIFEST, *view.files()]}
    return kept | {layout.VIEW: strictjson.pretty(view.to_json(digest_bytes(data_of(tree, layout.MANIFEST))))}


# Small copies to break: those that hold the file in question and the token files, which every copy has.


def tokens_only(encoding: Encoding = COMPACT, part: Part | None = None) -> Tree:
    """One part without top-k and table, and without reference log-probs where no part is given."""
    return viewed(whole([part or make_part(encoding=encoding, reference=False)], encoding), [layout.TOKENS])


def with_topk(encoding: Encoding = COMPACT, part: Part | None = None) -> Tree:
    """One part without table."""
    part = part or make_part(encoding=encoding, reference=False)
    return viewed(whole([part], encoding), [layout.TOKENS, layout.TOPK])


def with_table() -> Tree:
    """One part without top-k."""
    return viewed(whole([make_part(reference=False)]), [layout.ROLLOUTS, layout.TOKENS])


# Breaking


def data_of(tree: Tree, name: str) -> bytes:
    """The bytes of a file that is no link."""
    data = tree[name]
    assert isinstance(data, bytes)
    return data


def document(tree: Tree) -> Any:
    """The manifest as JSON."""
    return json.loads(data_of(tree, layout.MANIFEST))


def with_manifest(tree: Tree, data: bytes) -> Tree:
    """With these bytes for a manifest, and a view that speaks of them."""
    if layout.VIEW not in tree:
        return tree | {layout.MANIFEST: data}
    view = json.loads(data_of(tree, layout.VIEW)) | {"fingerprint": digest_bytes(data)}
    return tree | {layout.MANIFEST: data, layout.VIEW: strictjson.pretty(view)}


def edited(tree: Tree, path: str, value: Any, *, name: str | None = None) -> Tree:
    """With another value at a place in the manifest, `parts.0.counts.tokens`, or under another name; sealed again."""
    whole = document(tree)
    at, steps = whole, [int(step) if step.isdigit() else step for step in path.split(".")]
    for step in steps[:-1]:
        at = at[step]
    if name is not None:
        at[name] = at.pop(steps[-1])
    elif value is REMOVED:
        del at[steps[-1]]
    else:
        at[steps[-1]] = value(at[steps[-1]]) if callable(value) else value
    return with_manifest(tree, sealed(whole))


REMOVED = object()


def with_file(tree: Tree, kind: str, data: bytes) -> Tree:
    """With other bytes for a file of part 0, about which the manifest tells the truth."""
    digests: FileDigests = digest_contents(data)
    entry = {"path": layout.part_file(0, kind), **vars(digests)}
    tree = tree | {layout.part_file(0, kind): data}
    return edited(tree, f"parts.0.files.{kind}", entry)


def with_arrays(tree: Tree, kind: str, **arrays: npt.NDArray[Any]) -> Tree:
    """With other stored arrays, codes and rows, in a file of part 0."""
    encoding = parse(data_of(tree, layout.MANIFEST)).encoding
    specs = tokens_arrays(encoding) if kind == layout.TOKENS else topk_arrays(encoding)
    group = Group(data_of(tree, layout.part_file(0, kind)), specs, where=kind)
    stored = {name: group.read(name) for name in group.lengths}
    return with_file(tree, kind, pack(stored | arrays, specs))


def with_array(tree: Tree, kind: str, name: str, change: Callable[[npt.NDArray[Any]], Any]) -> Tree:
    """With one stored array of part 0 changed in place, or for the one that `change` returns."""
    encoding = parse(data_of(tree, layout.MANIFEST)).encoding
    specs = tokens_arrays(encoding) if kind == layout.TOKENS else topk_arrays(encoding)
    values = Group(data_of(tree, layout.part_file(0, kind)), specs, where=kind).read(name)
    other = change(values)
    return with_arrays(tree, kind, **{name: values if other is None else other})


def with_counts(tree: Tree, **counts: int) -> Tree:
    """With other counts of part 0, and of the whole."""
    for name, count in counts.items():
        tree = edited(edited(tree, f"parts.0.counts.{name}", count), f"counts.{name}", count)
    return tree


def write(tree: Tree, directory: Path) -> None:
    """Put an artifact on disk."""
    for name, content in sorted(tree.items()):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Link):
            path.symlink_to(content.target)
        else:
            path.write_bytes(content)


def _random_weights(source: random.Random, positions: int, width: int) -> Weights:
    return [[source.random() ** 8 + 1e-6 for _ in range(width)] for _ in range(positions)]


def _logprobs(weights: Weights, width: int) -> npt.NDArray[np.float32]:
    values = np.array(weights, np.float64).reshape(-1, width)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(values / values.sum(axis=1, keepdims=True)), np.float32)


def _of_tokens(
    logprobs: npt.NDArray[np.float32], tokens: Sequence[int], column: dict[int, int]
) -> npt.NDArray[np.float32]:
    """The log-prob of each token; -inf for one outside of the support."""
    found = [logprobs[row, column[token]] if token in column else -np.inf for row, token in enumerate(tokens)]
    return np.array(found, np.float32)
