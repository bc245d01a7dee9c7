"""The worked example of spec/artifact.md: two rollouts with made-up distributions, written out by the library.

It needs no model. Log-probs come from probabilities of few digits, none of them near the middle between two levels of
a grid, so the stored values are the same on every machine.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from lopd_store import layout, strictjson, topk
from lopd_store.digest import digest_bytes, digest_contents, digest_json
from lopd_store.encoding import Encoding, make_encoding
from lopd_store.grid import Grid
from lopd_store.identity import ModelIdentity
from lopd_store.manifest import Inputs, Manifest, PartEntry, Scoring, render
from lopd_store.part import Part, rollouts_file, round_part, tokens_file, topk_file
from lopd_store.provenance import UNKNOWN_SFT
from lopd_store.topk import Candidates
from lopd_store.view import View

ROLLOUTS = [([1, 5], [3, 7]), ([1], [4])]  # (prompt, response)
PROBABILITIES = [  # of ids 0 to 7 at each position
    [0.05, 0.0, 0.32, 0.6, 0.0, 0.0, 0.03, 0.0],
    [0.031, 0.209, 0.5, 0.0, 0.0, 0.21, 0.0, 0.05],
    [0.0, 0.01, 0.02, 0.0, 0.95, 0.0, 0.02, 0.0],
]
SAMPLED = [0.6, 0.05, 0.95]  # the teacher's probabilities of the response tokens
REFERENCE = [0.5, 0.1, 0.97]  # the reference policy's
HEAD = struct.pack("<2f", 1.0, 2.0)  # the one tensor of the teacher
ROUNDED_HEAD = bytes.fromhex("803f0040")  # the same in bfloat16
DIGESTED: dict[str, Any] = {
    "weights": [["head", "F32", [2], digest_bytes(HEAD)]],
    "rounded_weights": [["head", [2], digest_bytes(ROUNDED_HEAD)]],
    "config": {"hidden_size": 1, "model_type": "llama", "vocab_size": 8},
    "tokenizer": {
        "added_tokens": [],
        "ids": {letter: number for number, letter in enumerate("abcdefgh")},
        "model": None,
        "normalizer": None,
        "pre_tokenizer": None,
        "special": [],
    },
    "chat_template": "{{ prompt }}",
}


def encoding() -> Encoding:
    """At most three entries and 90 % of the mass, on grids of few segments."""
    return make_encoding(
        k_max=3,
        coverage=0.9,
        topk_grid=Grid(segments=((0.0, 1 / 32), (1.0, 1 / 16))),
        sampled_grid=Grid(segments=((0.0, 1 / 256),)),
    )


def part() -> Part:
    """The part as it will be stored."""
    tokens = [len(prompt) + len(response) for prompt, response in ROLLOUTS]
    with np.errstate(divide="ignore"):
        columns = np.log(np.array(PROBABILITIES)).astype(np.float32)
    nothing = np.full(len(columns), -np.inf, np.float32)
    candidates = Candidates(
        ids=np.tile(np.arange(8, dtype=np.uint32), (len(columns), 1)), logprobs=columns, tail_logprobs=nothing
    )
    chosen = encoding()
    exact = Part(
        rollout_offsets=np.array([0, *np.cumsum(tokens)], np.int64),
        prompt_lengths=np.array([len(prompt) for prompt, _ in ROLLOUTS], np.int32),
        token_ids=np.concatenate([np.array(prompt + response, np.uint32) for prompt, response in ROLLOUTS]),
        loss_mask=np.ones(len(columns), np.bool_),
        sampled_logprobs=np.log(np.array(SAMPLED)).astype(np.float32),
        reference_logprobs=np.log(np.array(REFERENCE)).astype(np.float32),
        topk=topk.select(candidates, k_min=chosen.k_min, k_max=chosen.k_max, coverage=chosen.coverage),
    )
    return round_part(exact, chosen)


def teacher() -> ModelIdentity:
    """A teacher whose digests are taken over what the text prints."""
    digests = {name: digest_json(value) for name, value in DIGESTED.items()}
    return ModelIdentity(
        **digests, vocab_size=8, output_width=8, adapter=None, quantization=None, name="acme/teacher", revision=None
    )


def write_example(directory: Path) -> Path:
    """Write the artifact of the text into `directory`."""
    stored, chosen = part(), encoding()
    columns = {
        "prompt": ["bf", "b"],
        "response": ["dh", "e"],
        "prompt_length": stored.prompt_lengths,
        "response_length": np.array([2, 1], np.int32),
    }
    contents = {
        layout.ROLLOUTS: rollouts_file(columns),
        layout.TOKENS: tokens_file(stored, chosen),
        layout.TOPK: topk_file(stored, chosen),
    }
    inputs = Inputs(
        teacher=teacher(),
        scoring=Scoring(engine="transformers", dtype="float32"),
        sft=UNKNOWN_SFT,
        rollouts_file=digest_bytes(json.dumps(ROLLOUTS).encode()),
        rollouts=None,
    )
    entry = PartEntry(
        counts=stored.counts, files={kind: digest_contents(content) for kind, content in contents.items()}
    )
    (directory / layout.PARTS).mkdir(parents=True)
    for kind, content in contents.items():
        (directory / layout.part_file(0, kind)).write_bytes(content)
    manifest = Manifest(
        counts=stored.counts, encoding=chosen, inputs=(inputs,), parts=(entry,), reference_logprobs=True, text=True
    )
    (directory / layout.MANIFEST).write_bytes(render(manifest))
    return directory


def view_json(fingerprint: str) -> bytes:
    """view.json of a sampled-only copy of the example."""
    return strictjson.pretty(View(kinds=(layout.TOKENS,), parts=range(1)).to_json(fingerprint))
