"""What the files of a part hold: containers, values and the rollouts table, judged from their bytes.

    findings = check_contents(0, {"tokens": ..., "topk": ...}, manifest)

That the bytes are those of the manifest is known before: `verifier` has compared them, or `reader`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from lopd_store import layout
from lopd_store.checks import Finding, audit_rollouts, check_tokens, check_topk, finding, finding_of
from lopd_store.container import Arrays, Group
from lopd_store.errors import ArtifactError
from lopd_store.manifest import Manifest, audited_at
from lopd_store.part import array_lengths, tokens_arrays, topk_arrays
from lopd_store.statistic import Statistic
from lopd_store.table import TEXT, read_lengths


def check_contents(
    number: int,
    contents: Mapping[str, bytes | memoryview],
    manifest: Manifest,
    audits: dict[int, Statistic] | None = None,
) -> list[Finding]:
    """What is wrong with a part, given its number and the bytes of those of its files that are here, by kind.

    Where nothing is, what the rollouts show of the policy that sampled them is put into `audits`.
    """
    with np.errstate(all="ignore"):  # values that make arithmetic overflow become findings
        return list(_check(number, contents, manifest, {} if audits is None else audits))


def _check(
    number: int, contents: Mapping[str, bytes | memoryview], manifest: Manifest, audits: dict[int, Statistic]
) -> Iterator[Finding]:
    """A030 to A040 containers, then the values and the rollouts table."""
    encoding, counts = manifest.encoding, manifest.parts[number].counts
    inputs, lengths = manifest.input_of(number), array_lengths(counts)
    vocab_size = inputs.teacher.vocab_size
    groups: dict[str, Arrays] = {}
    for kind, specs in ((layout.TOKENS, tokens_arrays(encoding)), (layout.TOPK, topk_arrays(encoding))):
        if kind not in contents:
            continue
        where = layout.part_file(number, kind)
        try:
            group = Group(contents[kind], specs, where=where, lengths=lengths[kind], check_crc=True)
            groups[kind] = {name: group.read(name) for name in group.lengths}
        except ArtifactError as error:
            yield finding_of(error, where, "A030")
            return
    tokens, where = groups[layout.TOKENS], layout.part_file(number, layout.TOKENS)
    if ("reference_logprobs" in tokens) != manifest.reference_logprobs:
        yield finding("A035", where, "`reference_logprobs` are not as the manifest states", manifest.reference_logprobs)
    broken = list(check_tokens(tokens, counts, encoding, vocab_size, where))
    yield from broken
    if any(found.code in ("A041", "A042") for found in broken):
        return
    if layout.TOPK in groups:
        topk_where = layout.part_file(number, layout.TOPK)
        broken = list(check_topk(tokens, groups[layout.TOPK], counts, encoding, vocab_size, topk_where))
        yield from broken
        if not broken and (temperature := audited_at(encoding, inputs.rollouts)) is not None:
            audits[number] = audit_rollouts(tokens, groups[layout.TOPK], encoding, temperature)
    if layout.ROLLOUTS in contents:
        yield from _check_table(
            contents[layout.ROLLOUTS], tokens, manifest.text, layout.part_file(number, layout.ROLLOUTS)
        )


def _check_table(data: bytes | memoryview, tokens: Arrays, text: bool, where: str) -> Iterator[Finding]:
    """A070 the rollouts table reads, A071 and speaks of the same rollouts, A072 with text or without it."""
    try:
        lengths, names = read_lengths(data, where=where)
    except ArtifactError as error:
        yield finding_of(error, where, "A070")
        return
    prompts = tokens["prompt_lengths"]
    for got, wanted in zip(lengths.values(), (prompts, np.diff(tokens["rollout_offsets"]) - prompts), strict=True):
        if len(got) != len(wanted):
            yield finding("A071", where, "there is not one row per rollout", len(wanted), len(got))
            return
        if not np.array_equal(got, wanted):
            yield finding("A071", where, "the lengths in the rollouts table are not those of the token ids")
            break
    if names & set(TEXT) != (set(TEXT) if text else set()):
        claim = "`prompt` and `response`" if text else "no text"
        yield finding("A072", where, "the text is not as the manifest states", claim)
