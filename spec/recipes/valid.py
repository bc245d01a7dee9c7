"""Valid artifacts, each with one thing that a reader may stumble over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from lopd_store import layout
from lopd_store.encoding import make_encoding
from lopd_store.grid import Grid
from lopd_store.license import License
from lopd_store.manifest import sealed
from lopd_store.part import Part, round_part
from lopd_store.provenance import UNKNOWN_SFT, CheckpointRecord, Sampling
from lopd_store.topk import TopK
from recipes import signatures
from recipes.artifact import (
    COMPACT,
    EXACT,
    PAIRS,
    Tree,
    Weights,
    audited,
    document,
    identity,
    make_part,
    make_table,
    sampled_at,
    sampled_by,
    several,
    taught_by,
    viewed,
    whole,
    with_manifest,
)

RECIPES: dict[str, Callable[[], Tree]] = {}
BOTH = replace(COMPACT, rule="teacher+reference")
TWO_CHUNKS = (1 << 18) + 1


def recipe(make: Callable[[], Tree]) -> Callable[[], Tree]:
    """Note a recipe under the name of its function."""
    RECIPES[make.__name__] = make
    return make


@recipe
def adaptive_k() -> Tree:
    return whole()


@recipe
def fixed_k() -> Tree:
    encoding = make_encoding(k_max=4, coverage=1.0)
    return whole([make_part(encoding=encoding)], encoding)


@recipe
def fixed_k_of_one() -> Tree:
    encoding = make_encoding(k_max=1, coverage=1.0)
    return whole([make_part(encoding=encoding)], encoding)


@recipe
def k_min_above_one() -> Tree:
    encoding = make_encoding(k_min=3, k_max=6, coverage=0.5)
    return whole([make_part(encoding=encoding)], encoding)


@recipe
def k_max_above_vocabulary() -> Tree:
    encoding = make_encoding(k_max=100, coverage=1.0)
    return whole([make_part(encoding=encoding, support=range(24))], encoding)


@recipe
def exact() -> Tree:
    return whole(encoding=EXACT)


@recipe
def exact_fixed_k() -> Tree:
    encoding = make_encoding(exact=True, k_max=5, coverage=1.0)
    return whole(encoding=encoding)


@recipe
def grids_of_one_segment() -> Tree:
    line = Grid(segments=((0.0, 1 / 16),))
    return whole(encoding=make_encoding(k_max=4, coverage=0.9, topk_grid=line, sampled_grid=line))


@recipe
def without_reference_logprobs() -> Tree:
    return whole([make_part(reference=False)])


@recipe
def empty_response() -> Tree:
    return whole([make_part([([4, 5], []), *PAIRS, ([7], [])])])


@recipe
def no_positions_at_all() -> Tree:
    return whole([make_part([([4, 5], [])])])


@recipe
def one_rollout() -> Tree:
    return whole([make_part([([4], [5])])])


@recipe
def several_parts() -> Tree:
    return whole([make_part(seed=seed) for seed in range(3)])


@recipe
def vocabulary_above_65536() -> Tree:
    pairs = [([65_535, 65_536], [65_537, 70_001, 65_539])]
    support = [3, 65_535, 65_536, 65_537, 65_539, 70_001, 99_999]
    return whole([make_part(pairs, support=support)], vocab_size=100_000)


@recipe
def vocabulary_above_131072() -> Tree:
    pairs = [([131_071, 131_072], [131_073, 151_935, 248_319])]
    support = [3, 131_071, 131_072, 131_073, 151_935, 248_319]
    return whole([make_part(pairs, support=support)], vocab_size=248_320)


@recipe
def sampled_only_view() -> Tree:
    return viewed(whole(), [layout.TOKENS])


@recipe
def view_without_tables() -> Tree:
    return viewed(whole(), [layout.TOKENS, layout.TOPK])


@recipe
def view_of_some_parts() -> Tree:
    return viewed(whole([make_part(seed=seed) for seed in range(4)]), layout.FILE_KINDS, range(1, 3))


@recipe
def sampled_only_view_of_one_part() -> Tree:
    return viewed(whole([make_part(seed=seed) for seed in range(3)]), [layout.TOKENS], range(2, 3))


@recipe
def redacted() -> Tree:
    return whole(text=False)


@recipe
def teacher_and_reference() -> Tree:
    return whole(encoding=BOTH)


@recipe
def teacher_and_reference_exact() -> Tree:
    return whole(encoding=replace(EXACT, rule="teacher+reference"))


@recipe
def audited_rollouts() -> Tree:
    parts = [make_part(encoding=BOTH, seed=seed) for seed in range(2)]
    return whole(parts, BOTH, rollouts=sampled_by("student"))


@recipe
def audited_rollouts_exact() -> Tree:
    encoding = replace(EXACT, rule="teacher+reference")
    return whole(encoding=encoding, rollouts=sampled_by("student"))


@recipe
def audited_rollouts_at_another_temperature() -> Tree:
    """The response token of some position is no entry, and does not count."""
    part = make_part(encoding=BOTH, support=[3, 4, 5, 7, 9, 10, 11, 12, 13])
    return whole([part], BOTH, rollouts=sampled_at(0.7))


@recipe
def rollouts_of_top_p_that_nobody_audits() -> Tree:
    return whole(encoding=BOTH, rollouts=sampled_at(1.0, top_p=0.9))


@recipe
def greedy_rollouts_that_nobody_audits() -> Tree:
    return whole(encoding=BOTH, rollouts=sampled_at(0.0))


@recipe
def licensed_teacher() -> Tree:
    return whole(license=License(id="other", name="acme-1", link="https://acme.example/license", gated=True))


@recipe
def audited_sft_data() -> Tree:
    return whole(sft=taught_by("teacher"), sft_audit=audited(), rollouts=sampled_by("student"))


@recipe
def consistent_sft() -> Tree:
    return whole(sft=taught_by("teacher", output_width=32), rollouts=sampled_by("student"))


@recipe
def unknown_sft() -> Tree:
    return whole(rollouts=sampled_by("student"))


@recipe
def inconsistent_sft() -> Tree:
    return whole(sft=taught_by("another teacher"), rollouts=sampled_by("student"))


@recipe
def policy_with_a_checkpoint_record() -> Tree:
    sft = taught_by("teacher")
    checkpoint = CheckpointRecord(
        status="declared",
        method="sft",
        model=identity("student"),
        base=identity("base", chat_template=None),
        data=sft.data or "",
        sft=(sft,),
        overrides=("allow-unknown-sft-teacher",),
    )
    record = replace(sampled_by("student"), policy_checkpoint=checkpoint)
    return whole(sft=sft, rollouts=record)


@recipe
def declared_by_someone_who_knows_little() -> Tree:
    """How the rollouts were sampled, from which prompts, and on which data the policy was trained is not known."""
    sampling = Sampling(temperature=None, top_p=None, max_response_tokens=None, samples_per_prompt=None, seed=None)
    sft = replace(taught_by("teacher"), status="declared", data=None)
    checkpoint = CheckpointRecord(
        status="declared", method="sft", model=identity("student"), base=identity("base"), data=None, sft=(sft,)
    )
    record = replace(
        sampled_by("student"), status="declared", policy_checkpoint=checkpoint, prompts=None, sampling=sampling
    )
    return whole(encoding=BOTH, sft=sft, rollouts=record)


@recipe
def ties() -> Tree:
    """Equal log-probs, by the teacher and by rounding; entries stand by id."""
    weights: Weights = [[4, 4, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1], [8, 8.01, 8.02, 1, 1, 1, 1]]
    part = make_part([([5], [4, 8, 2])], support=range(2, 9), weights=weights)
    return whole([part])


@recipe
def certain_token() -> Tree:
    """Probability 1: log-probs of 0, tails of -inf, one entry whatever k_max is."""
    weights = [[1, 0, 0], [0, 1, 0], [0, 1, 0]]
    return whole([make_part([([5], [2, 3, 3])], support=[2, 3, 4], weights=weights)])


@recipe
def impossible_token() -> Tree:
    """A response token to which the teacher gives no probability at all."""
    weights = [[0, 3, 1], [2, 1, 0]]
    return whole([make_part([([5], [2, 20])], support=[2, 3, 4], weights=weights)])


@recipe
def response_tokens_outside_the_entries() -> Tree:
    weights = [[10, 9, 8, 7, 0.01, 0.02], [10, 9, 8, 7, 0.5, 0.02]]
    return whole([make_part([([5], [6, 7])], support=[2, 3, 4, 5, 6, 7], weights=weights)])


@recipe
def loss_mask_with_zeros() -> Tree:
    return whole([make_part(loss_mask=[True, False, False, True, False, True, True])])


@recipe
def loss_mask_without_ones() -> Tree:
    return whole([make_part(loss_mask=[False] * 7)])


@recipe
def two_chunks() -> Tree:
    """Arrays of 2^18 + 1 values: two chunks of 131,073, the second padded with one fill value."""
    ones = np.zeros(TWO_CHUNKS, np.float32)
    certain = np.full(TWO_CHUNKS, -np.inf, np.float32)
    topk = TopK(
        counts=np.ones(TWO_CHUNKS, np.uint16),
        ids=np.full(TWO_CHUNKS, 3, np.uint32),
        logprobs=ones,
        tail_logprobs=certain,
    )
    part = Part(
        rollout_offsets=np.array([0, TWO_CHUNKS + 1]),
        prompt_lengths=np.array([1], np.int32),
        token_ids=np.full(TWO_CHUNKS + 1, 3, np.uint32),
        loss_mask=np.ones(TWO_CHUNKS, np.bool_),
        sampled_logprobs=ones,
        reference_logprobs=ones,
        topk=topk,
    )
    return whole([round_part(part, COMPACT)])


@recipe
def long_prompt() -> Tree:
    return whole([make_part([([id % 24 for id in range(3000)], [3, 4])])])


@recipe
def one_domain_that_has_a_name() -> Tree:
    return whole(domain="math", sft=taught_by("teacher"), rollouts=sampled_by("student"))


@recipe
def several_domains() -> Tree:
    """A teacher for mathematics and one for code; the policy had SFT data of both."""
    return several()


@recipe
def several_domains_of_one_teacher() -> Tree:
    parts = [make_part(seed=seed) for seed in range(2)]
    return whole(parts, domain="a.b_c-1", more=[(1, {"domain": 64 * "9", "sft": UNKNOWN_SFT})])


@recipe
def several_domains_of_which_one_is_of_another_teacher_and_policy() -> Tree:
    """It is valid all the same, and for no student consistent."""
    parts = [make_part(seed=seed) for seed in range(2)]
    code = {"domain": "code", "sft": taught_by("third"), "rollouts": sampled_by("another student")}
    return whole(parts, domain="math", sft=taught_by("teacher"), rollouts=sampled_by("student"), more=[(1, code)])


@recipe
def view_of_one_domain() -> Tree:
    return viewed(several(), layout.FILE_KINDS, range(1, 3))


@recipe
def annotated() -> Tree:
    free: dict[str, Any] = {"note": "anything", "list": [1, 2.5, None, True, {"deep": [[]]}], "": "", "seal": "mine"}
    return whole(annotations=free)


@recipe
def unicode_text() -> Tree:
    part = make_part()
    table = make_table(part) | {"prompt": ["Grüße, 世界 🌍", "\u202eright to left\u202c\n\t\0"], "response": ["é", ""]}
    return whole([part], table=table, annotations={"名前": "naïve 🎓 \u2028"})


@recipe
def more_columns_in_the_table() -> Tree:
    part = make_part()
    more = {"mean_sampled_logprob": np.zeros(2, np.float32), "mean_entropy": np.zeros(2, np.float32), "reward": [1, 0]}
    return whole([part], table=make_table(part) | more)


@recipe
def record_and_card_beside_it() -> Tree:
    return whole() | {"build.json": b"not even JSON", "README.md": b"anything\n", ".gitattributes": b""}


@recipe
def higher_minor_version() -> Tree:
    """Members that nobody knows yet, at every level; a reader of this version ignores them."""
    tree = whole(sft=taught_by("teacher"), rollouts=sampled_by("student"))
    manifest = document(tree) | {"version": "1.7", "later": {"anything": []}}
    inputs, part = manifest["inputs"][0], manifest["parts"][0]
    objects = [manifest["counts"], part, part["counts"], part["files"], part["files"]["topk"], inputs]
    objects += [inputs["teacher"], inputs["scoring"], inputs["sft"], inputs["sft"]["teacher"]]
    objects += [inputs["rollouts"], inputs["rollouts"]["sampling"], manifest["encoding"]]
    for each in objects:
        each["later"] = 1
    return with_manifest(tree, sealed(manifest))


@recipe
def signed() -> Tree:
    return signatures.signed(signatures.tokens_only(), signatures.OTHER, signatures.SIGNER)
