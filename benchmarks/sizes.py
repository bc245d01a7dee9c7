"""How many bytes a position takes, and how far the stored distributions are from the true ones."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt

from lopd_store.container import stored_members
from lopd_store.topk import TopK


def array_sizes(files: tuple[bytes, bytes]) -> Counter[str]:
    """Bytes of every array of the two files of a part, chunks and metadata; the rest is what zip adds."""
    sizes: Counter[str] = Counter()
    for file, name in zip(files, ("tokens", "topk"), strict=True):
        for member, data in stored_members(memoryview(file), name).items():
            sizes[f"{name}: {member.split('/')[0]}"] += len(data)
        sizes[f"{name}: zip"] = len(file) - sum(size for array, size in sizes.items() if array.startswith(name))
    return sizes


def mean_kl(true: TopK, stored: TopK) -> float:
    """Mean over positions of KL(true || stored) in nats, over the k + 1 terms, in float64, both sides normalised."""
    assert np.array_equal(true.counts, stored.counts)
    positions = np.repeat(np.arange(len(true.counts)), true.counts)
    ids, logp = _terms(true, positions)
    same_ids, logq = _terms(stored, positions)
    assert np.array_equal(ids, same_ids)
    positions = np.concatenate([positions, np.arange(len(true.counts))])
    logp, logq = (x - np.log(np.bincount(positions, np.exp(x)))[positions] for x in (logp, logq))
    possible = logp > -np.inf
    logp, logq = logp[possible], logq[possible]
    return float((np.exp(logp) * (logp - logq)).sum()) / len(true.counts)


def _terms(topk: TopK, positions: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float64]]:
    """Ids in an order of their own, and the log-probs of these and then of the tails."""
    order = np.lexsort((topk.ids, positions))
    return topk.ids[order], np.concatenate([topk.logprobs[order], topk.tail_logprobs]).astype(np.float64)
