"""Strategies: distributions as an engine gives them, and parts made of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lopd_store.part import Part
from lopd_store.topk import TopK, select

Floats = npt.NDArray[np.float64]
# Quarters tie often, as bfloat16 logits do; the large negative ones leave float32 probabilities of 0 behind.
LOGITS = st.one_of(
    st.integers(-40, 40).map(lambda quarters: quarters / 4),
    st.floats(-200, 20, width=32),
    st.just(-np.inf),
)


def log_softmax(logits: Floats) -> Floats:
    """[positions, vocabulary], in float64."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


@st.composite
def distributions(draw: st.DrawFn, *, max_positions: int = 6) -> Floats:
    """Log-probs [positions, vocabulary] in which every row has a possible token."""
    shape = draw(st.tuples(st.integers(0, max_positions), st.integers(1, 12)))
    logits = draw(hnp.arrays(np.float64, shape, elements=LOGITS))
    if logits.size:
        logits[:, draw(st.integers(0, shape[1] - 1))] = 0
    else:
        logits = np.zeros(shape)
    return log_softmax(logits) if shape[0] else logits


@st.composite
def scored(draw: st.DrawFn) -> tuple[Floats, npt.NDArray[np.uint32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """(log-probs, ids, logprobs, tail_logprobs): distributions, and their top-k columns in any order with the tail."""
    logprobs = draw(distributions())
    k = draw(st.integers(1, logprobs.shape[1]))
    ids = np.argsort(-logprobs, axis=1, kind="stable")[:, :k][:, draw(st.permutations(range(k)))]
    rest = logprobs.copy()
    np.put_along_axis(rest, ids, -np.inf, axis=1)
    tails = np.asarray(np.minimum(np.logaddexp.reduce(rest, axis=1), 0), np.float32)
    return logprobs, ids.astype(np.uint32), np.take_along_axis(logprobs, ids, axis=1).astype(np.float32), tails


@st.composite
def topks(draw: st.DrawFn) -> TopK:
    """What `select` makes of some distributions."""
    _, ids, logprobs, tails = draw(scored())
    return select(ids, logprobs, tails, k_min=draw(st.integers(1, 4)), coverage=draw(st.sampled_from([0.5, 0.9, 1.0])))


@st.composite
def parts(draw: st.DrawFn) -> Part:
    """A part of rollouts of any lengths, responses of none included, whose values mean nothing."""
    prompts = draw(st.lists(st.integers(1, 5), max_size=6))
    responses = [draw(st.integers(0, 5)) for _ in prompts]
    tokens, positions = sum(prompts) + sum(responses), sum(responses)
    generator = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    counts = generator.integers(1, 6, positions).astype(np.uint16)
    entries = int(counts.sum())
    logprobs = st.one_of(st.just(0.0), st.just(-np.inf), st.floats(-100, 0, width=32))
    reference = draw(st.one_of(st.none(), hnp.arrays(np.float32, positions, elements=logprobs)))
    return Part(
        rollout_offsets=np.cumsum([0, *(p + r for p, r in zip(prompts, responses, strict=True))], dtype=np.int64),
        prompt_lengths=np.array(prompts, np.int32),
        token_ids=draw(hnp.arrays(np.uint32, tokens, elements=st.integers(0, 300_000))),
        loss_mask=draw(hnp.arrays(np.bool_, positions)),
        sampled_logprobs=draw(hnp.arrays(np.float32, positions, elements=logprobs)),
        reference_logprobs=reference,
        topk=TopK(
            counts=counts,
            ids=generator.integers(0, 300_000, entries).astype(np.uint32),
            logprobs=-generator.exponential(5, entries).astype(np.float32),
            tail_logprobs=-generator.exponential(5, positions).astype(np.float32),
        ),
    )
