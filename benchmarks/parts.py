"""Parts and artifacts of any size, made of the same distributions over and over."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from distributions import Distributions, made_up

import lopd_store
from lopd_store import layout
from lopd_store.digest import digest_bytes, digest_contents
from lopd_store.encoding import Encoding
from lopd_store.identity import ModelIdentity
from lopd_store.manifest import Counts, Inputs, Manifest, PartEntry, Scoring, render
from lopd_store.part import Part, rollouts_file, round_part, tokens_file, topk_file
from lopd_store.provenance import UNKNOWN_SFT
from lopd_store.topk import Candidates, concatenate, select

Files = tuple[bytes, bytes]  # tokens, top-k


def make_part(data: Distributions, encoding: Encoding) -> Part:
    """All rollouts as one part, not rounded yet.

    No reference policy is at hand: its log-probs are the teacher's, one position later, which are as hard to store.
    """
    candidates = Candidates(ids=data.ids, logprobs=data.logprobs, tail_logprobs=data.tail_logprobs)
    offsets = np.zeros(len(data.prompt_lengths) + 1, np.int64)
    np.cumsum(data.prompt_lengths + data.response_lengths, out=offsets[1:])
    return Part(
        rollout_offsets=offsets,
        prompt_lengths=data.prompt_lengths,
        token_ids=data.token_ids,
        loss_mask=np.ones(len(data.sampled_logprobs), np.bool_),
        sampled_logprobs=data.sampled_logprobs,
        reference_logprobs=np.roll(data.sampled_logprobs, 1),
        topk=select(candidates, k_min=encoding.k_min, k_max=encoding.k_max, coverage=encoding.coverage),
    )


def repeat_part(part: Part, positions: int) -> Part:
    """The rollouts of a part again and again, as many whole ones as have at most so many positions."""
    times = -(-positions // part.counts.positions)
    offsets = np.zeros(times * len(part.prompt_lengths) + 1, np.int64)
    np.cumsum(np.tile(np.diff(part.rollout_offsets), times), out=offsets[1:])
    assert part.topk is not None and part.reference_logprobs is not None
    repeated = Part(
        rollout_offsets=offsets,
        prompt_lengths=np.tile(part.prompt_lengths, times),
        token_ids=np.tile(part.token_ids, times),
        loss_mask=np.tile(part.loss_mask, times),
        sampled_logprobs=np.tile(part.sampled_logprobs, times),
        reference_logprobs=np.tile(part.reference_logprobs, times),
        topk=concatenate([part.topk] * times),
    )
    return repeated.slice(0, int(np.searchsorted(repeated.position_offsets, positions, side="right")) - 1)


def encode(part: Part, encoding: Encoding) -> Files:
    """The tokens file and the top-k file of a part that is not rounded yet."""
    rounded = round_part(part, encoding)
    return tokens_file(rounded, encoding), topk_file(rounded, encoding)


def write_artifact(
    directory: Path, source: Path | None, encoding: Encoding, positions: int, parts: int
) -> tuple[int, float]:
    """Write an artifact of parts of at most so many positions each; returns all its positions, and the seconds."""
    data = made_up() if source is None else Distributions.load(source)
    part = repeat_part(make_part(data, encoding), positions)
    (directory / layout.PARTS).mkdir(parents=True)
    # What is loaded once, whatever the size: the machine code of compiled loops, and what pyarrow looks for.
    encode(part.slice(0, 1), encoding)
    rollouts_file({"prompt_length": part.prompt_lengths[:1], "response_length": part.prompt_lengths[:1]})
    started = time.perf_counter()
    entries = []
    for number in range(parts):
        lengths = {"prompt_length": part.prompt_lengths, "response_length": np.diff(part.position_offsets).astype("i4")}
        contents = dict(zip(layout.FILE_KINDS, (rollouts_file(dict(lengths)), *encode(part, encoding)), strict=True))
        for kind, content in contents.items():
            (directory / layout.part_file(number, kind)).write_bytes(content)
        files = {kind: digest_contents(content) for kind, content in contents.items()}
        entries.append(PartEntry(counts=part.counts, files=files))
    manifest = make_manifest(tuple(entries), encoding, data.vocab_size)
    (directory / layout.MANIFEST).write_bytes(render(manifest))
    return manifest.counts.positions, time.perf_counter() - started


def make_manifest(parts: tuple[PartEntry, ...], encoding: Encoding, vocab_size: int) -> Manifest:
    """A manifest that reads and verifies; no model stands behind it."""
    counts = [part.counts.to_json() for part in parts]
    digest = digest_bytes(b"")
    teacher = ModelIdentity(
        weights=digest,
        rounded_weights=None,
        config=digest,
        tokenizer=digest,
        chat_template=None,
        vocab_size=vocab_size,
        output_width=vocab_size,
        adapter=None,
        quantization=None,
        name="teacher",
        revision=None,
    )
    return Manifest(
        counts=Counts(**{name: sum(some[name] for some in counts) for name in counts[0]}),
        encoding=encoding,
        inputs=(
            Inputs(
                teacher=teacher,
                scoring=Scoring(engine="transformers", dtype="float32"),
                sft=UNKNOWN_SFT,
                rollouts_file=digest,
                rollouts=None,
            ),
        ),
        parts=parts,
        reference_logprobs=True,
        text=False,
    )


def read_artifact(directory: Path) -> float:
    """Decode every part of an artifact as training does; returns the seconds it took."""
    artifact = lopd_store.open(directory)
    artifact.part(0)  # loads the machine code
    started = time.perf_counter()
    for part in artifact.parts():
        assert part.topk is not None
    return time.perf_counter() - started


def verify_artifact(directory: Path) -> float:
    """Verify an artifact one part after the other; returns the seconds it took."""
    lopd_store.verify(directory, threads=1).require_ok()  # loads the machine code
    started = time.perf_counter()
    lopd_store.verify(directory, threads=1).require_ok()
    return time.perf_counter() - started
