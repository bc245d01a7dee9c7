"""Provenance records and manifests made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lopd_store import layout
from lopd_store.digest import digest_contents
from lopd_store.encoding import make_encoding
from lopd_store.identity import ModelIdentity
from lopd_store.manifest import Counts, Inputs, Manifest, PartEntry, Scoring
from lopd_store.provenance import CheckpointRecord, RolloutsRecord, Sampling, SftProvenance
from tests.artifacts import identity_named

TEACHER, OTHER_TEACHER = identity_named("teacher"), identity_named("other-teacher")
STUDENT, OTHER_STUDENT = identity_named("student"), identity_named("other-student")
DATA = digest_contents(b"data").sha256
SFT = SftProvenance(status="recorded", teacher=TEACHER, data=DATA)
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_response_tokens=20, samples_per_prompt=4, seed=0, stop=("END",))
CHECKPOINT = CheckpointRecord(
    status="recorded", method="sft", model=STUDENT, base=identity_named("base"), data=DATA, sft=(SFT,)
)
ROLLOUTS = RolloutsRecord(
    status="recorded", policy=STUDENT, policy_checkpoint=CHECKPOINT, prompts=DATA, sampling=SAMPLING
)
INPUTS = Inputs(
    teacher=TEACHER,
    scoring=Scoring(engine="transformers", dtype="float32"),
    sft=SFT,
    rollouts_file=DATA,
    rollouts=ROLLOUTS,
)

# Two domains: a policy that had SFT data of two teachers, and rollouts of both kinds that each of them has scored.
CODER = identity_named("coder")
SFT_OF_MATH = replace(SFT, domain="math")
SFT_OF_CODE = SftProvenance(
    domain="code", status="recorded", teacher=CODER, data=digest_contents(b"data of code").sha256
)
OF_BOTH = replace(ROLLOUTS, policy_checkpoint=replace(CHECKPOINT, data=None, sft=(SFT_OF_MATH, SFT_OF_CODE)))
MATH = replace(INPUTS, domain="math", sft=SFT_OF_MATH, rollouts=OF_BOTH)
CODE = replace(INPUTS, domain="code", teacher=CODER, sft=SFT_OF_CODE, rollouts=OF_BOTH)


def policy(identity: ModelIdentity, checkpoint: CheckpointRecord | None = None) -> RolloutsRecord:
    """A record of rollouts that this policy sampled."""
    return replace(ROLLOUTS, policy=identity, policy_checkpoint=checkpoint)


def make_manifest(*, parts: int = 2, **changes: Any) -> Manifest:
    """A manifest of parts that do not exist."""
    inputs = changes.get("inputs", INPUTS)
    inputs = (inputs,) if isinstance(inputs, Inputs) else inputs
    entries = tuple(
        PartEntry(
            input=min(number, len(inputs) - 1),
            counts=Counts(rollouts=2, tokens=10 + number, positions=4, entries=9),
            files={kind: digest_contents(layout.part_file(number, kind).encode()) for kind in layout.FILE_KINDS},
        )
        for number in range(parts)
    )
    total = {name: sum(getattr(entry.counts, name) for entry in entries) for name in entries[0].counts.to_json()}
    values: dict[str, Any] = {
        "counts": Counts(**total),
        "encoding": make_encoding(),
        "parts": entries,
        "reference_logprobs": True,
    }
    return Manifest(**values | changes | {"inputs": inputs})
