"""Strategies: grids, distributions as an engine gives them, and parts made of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lopd_store.encoding import Encoding, make_encoding
from lopd_store.grid import Grid
from lopd_store.part import Part
from lopd_store.topk import Candidates, TopK, select

Floats = npt.NDArray[np.float64]
# Quarters tie often, as bfloat16 logits do; the large negative ones leave float32 probabilities of 0 behind.
LOGITS = st.one_of(
    st.integers(-40, 40).map(lambda quarters: quarters / 4),
    st.floats(-200, 20, width=32),
    st.just(-np.inf),
)
COVERAGES = st.one_of(st.sampled_from([0.9, 0.99, 1.0]), st.floats(0.01, 1.0))


@st.composite
def _grids(draw: st.DrawFn) -> Grid:
    steps = sorted(draw(st.lists(st.integers(-10, -4).map(lambda n: 2.0**n), min_size=1, max_size=4)))
    segments = [(0.0, steps[0])]
    for step in steps[1:]:
        start, before = segments[-1]
        segments.append((start + draw(st.integers(1, 80)) * before, step))
    return Grid(segments=(*segments, (segments[-1][0] + draw(st.integers(1, 80)) * segments[-1][1], 1 / 16)))


GRIDS = _grids()  # their last levels are thousands of nats below certainty
ENCODINGS = st.one_of(
    st.just(make_encoding(exact=True)),
    st.just(make_encoding()),
    st.builds(lambda grid, other: make_encoding(topk_grid=grid, sampled_grid=other), GRIDS, GRIDS),
)


def log_softmax(logits: Floats) -> Floats:
    """[positions, vocabulary], in float64."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


@st.composite
def distributions(draw: st.DrawFn, shape: tuple[int, int] | None = None) -> Floats:
    """Log-probs [positions, vocabulary] in which every row has a possible token."""
    shape = shape or draw(st.tuples(st.integers(0, 6), st.integers(1, 12)))
    logits = draw(hnp.arrays(np.float64, shape, elements=LOGITS))
    if logits.size:
        logits[:, draw(st.integers(0, shape[1] - 1))] = 0
    else:
        logits = np.zeros(shape)
    return log_softmax(logits) if shape[0] else logits


def likely(logprobs: Floats, k: int) -> npt.NDArray[np.intp]:
    """The k most likely ids of each row in float32, of equal ones the lowest."""
    return np.argsort(-logprobs.astype(np.float32), axis=1, kind="stable")[:, :k]


def rest_of(logprobs: Floats, ids: npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:
    """The tail outside some columns."""
    rest = logprobs.copy()
    np.put_along_axis(rest, ids, -np.inf, axis=1)
    return np.asarray(np.minimum(np.logaddexp.reduce(rest, axis=1), 0), np.float32)


@st.composite
def scored(draw: st.DrawFn) -> tuple[Floats, Candidates]:
    """Log-probs, and what an engine gives of them: their top-k columns in any order with the tail."""
    logprobs = draw(distributions())
    k = draw(st.integers(1, logprobs.shape[1]))
    ids = likely(logprobs, k)[:, draw(st.permutations(range(k)))]
    return logprobs, Candidates(
        ids=ids.astype(np.uint32),
        logprobs=np.take_along_axis(logprobs, ids, axis=1).astype(np.float32),
        tail_logprobs=rest_of(logprobs, ids),
    )


@st.composite
def scored_by_two(draw: st.DrawFn) -> tuple[Floats, Floats, int, Candidates]:
    """Log-probs of teacher and reference policy, a k, and the k likeliest columns of each; one of both stands once."""
    teacher = draw(distributions())
    reference = draw(distributions(teacher.shape))
    k = draw(st.integers(1, teacher.shape[1]))
    ids = np.concatenate([likely(teacher, k), likely(reference, k)], axis=1)
    again = np.array([[id in row[:at] for at, id in enumerate(row)] for row in ids.tolist()], np.bool_)
    again = again.reshape(ids.shape)

    def at_ids(logprobs: Floats) -> npt.NDArray[np.float32]:
        return np.where(again, -np.inf, np.take_along_axis(logprobs, ids, axis=1)).astype(np.float32)

    return (
        teacher,
        reference,
        k,
        Candidates(
            ids=ids.astype(np.uint32),
            logprobs=at_ids(teacher),
            tail_logprobs=rest_of(teacher, ids),
            reference_logprobs=at_ids(reference),
            reference_tail_logprobs=rest_of(reference, ids),
        ),
    )


@st.composite
def topks(draw: st.DrawFn) -> TopK:
    """What `select` makes of some distributions."""
    _, candidates = draw(scored())
    k_min = draw(st.integers(1, 4))
    return select(
        candidates,
        k_min=k_min,
        k_max=draw(st.integers(k_min, 12)),
        coverage=draw(st.sampled_from([0.5, 0.9, 1.0])),
    )


@st.composite
def topks_of_two(draw: st.DrawFn) -> TopK:
    """What `select` makes of some distributions of a teacher and a reference policy."""
    *_, k, candidates = draw(scored_by_two())
    return select(candidates, k_min=1, k_max=k, coverage=draw(st.sampled_from([0.5, 0.9, 1.0])))


@st.composite
def parts(draw: st.DrawFn) -> tuple[Part, Encoding]:
    """A part of rollouts of any lengths, responses of none included, whose values mean nothing; and an encoding."""
    prompts = draw(st.lists(st.integers(1, 5), max_size=6))
    responses = [draw(st.integers(0, 5)) for _ in prompts]
    tokens, positions = sum(prompts) + sum(responses), sum(responses)
    generator = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    counts = generator.integers(1, 6, positions).astype(np.uint16)
    entries = int(counts.sum())
    logprobs = st.one_of(st.just(0.0), st.just(-np.inf), st.floats(-100, 0, width=32))
    reference = draw(st.one_of(st.none(), hnp.arrays(np.float32, positions, elements=logprobs)))
    encoding, with_reference = draw(ENCODINGS), draw(st.booleans())
    ids = st.sampled_from([3, 4, 5]) | st.integers(0, 300_000)  # few, so that response tokens are among the entries

    def random_logprobs(length: int) -> npt.NDArray[np.float32]:
        return -generator.exponential(5, length).astype(np.float32)

    part = Part(
        rollout_offsets=np.cumsum([0, *(p + r for p, r in zip(prompts, responses, strict=True))], dtype=np.int64),
        prompt_lengths=np.array(prompts, np.int32),
        token_ids=draw(hnp.arrays(np.uint32, tokens, elements=ids)),
        loss_mask=draw(hnp.arrays(np.bool_, positions)),
        sampled_logprobs=draw(hnp.arrays(np.float32, positions, elements=logprobs)),
        reference_logprobs=reference,
        topk=TopK(
            counts=counts,
            ids=draw(hnp.arrays(np.uint32, entries, elements=ids)),
            logprobs=random_logprobs(entries),
            tail_logprobs=random_logprobs(positions),
            reference_logprobs=random_logprobs(entries) if with_reference else None,
            reference_tail_logprobs=random_logprobs(positions) if with_reference else None,
        ),
    )
    return part, replace(encoding, rule="teacher+reference" if with_reference else "teacher")
