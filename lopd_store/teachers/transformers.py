"""The embedded engine: a transformers model in this process.

Rollouts of similar length share a batch, the body runs once, and the head runs over chunks of positions, so that
logits for [positions, vocabulary] never exist whole. Batches depend on the rollouts alone, so the same part gives
the same numbers in any worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from lopd_store import models
from lopd_store.manifest import Scoring
from lopd_store.rollouts import Rollout
from lopd_store.teachers import RolloutScores
from lopd_store.topk import Candidates

_HEAD_CHUNK_VALUES = 1 << 25  # logits alive at a time: 128 MiB of float32
_TINY = -80.0  # nat; the exponential of a smaller log-prob has few bits or none in float32


class TransformersTeacher:
    """A teacher run by transformers on one device."""

    def __init__(self, model: str, *, vocab_size: int, dtype: str, device: str, batch_tokens: int) -> None:
        files = models.find(model)
        loaded = models.load_model(files, dtype=dtype, device=device)
        self._split = models.split(loaded)
        self._vocab_size = vocab_size
        self._device = device
        self._batch_tokens = batch_tokens
        self.scoring = Scoring(engine="transformers", dtype=dtype)
        self.context_length = models.context_length(loaded.config)

    @torch.inference_mode()
    def score(self, rollouts: Sequence[Rollout], k: int) -> Iterator[tuple[int, RolloutScores]]:
        """See `Teacher.score`."""
        k = min(k, self._vocab_size)
        for batch in batches(rollouts, self._batch_tokens):
            scores = self._score_batch([rollouts[index] for index in batch], k)
            yield from zip(batch, scores, strict=True)

    def _score_batch(self, rollouts: list[Rollout], k: int) -> list[RolloutScores]:
        lengths = [len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts]
        ids = torch.zeros(len(rollouts), max(lengths), dtype=torch.long)
        for row, (rollout, length) in enumerate(zip(rollouts, lengths, strict=True)):
            ids[row, :length] = torch.from_numpy(rollout.token_ids.astype(np.int64))
        mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        ids, mask = ids.to(self._device), mask.to(self._device)
        hidden = self._split.body(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        # The distribution over token t is computed at token t - 1: this is the one place where the two meet.
        before = torch.cat([hidden[row, len(r.prompt_ids) - 1 : lengths[row] - 1] for row, r in enumerate(rollouts)])
        targets = torch.cat([ids[row, len(r.prompt_ids) : lengths[row]] for row, r in enumerate(rollouts)])
        columns = self._score_positions(before, targets, k)
        scores, start = [], 0
        for rollout in rollouts:
            rows = slice(start, start + len(rollout.response_ids))
            some = {name: column[rows] for name, column in columns.items()}
            sampled, entropies = some.pop("sampled_logprobs"), some.pop("entropies")
            scores.append(RolloutScores(sampled_logprobs=sampled, candidates=Candidates(**some), entropies=entropies))
            start = rows.stop
        return scores

    def _score_positions(self, hidden: torch.Tensor, targets: torch.Tensor, k: int) -> dict[str, np.ndarray]:
        chunk = max(1, _HEAD_CHUNK_VALUES // self._split.output_width)
        pieces = [
            score_logits(self._split.logits(some), at, k, self._vocab_size)
            for some, at in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
        ]
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def batches(rollouts: Sequence[Rollout], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length whose padded size stays within `batch_tokens`, longest first.

    Rollouts without a response have no positions and share the batches all the same; a rollout longer than
    `batch_tokens` gets one of its own.
    """
    lengths = [len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts]
    batch: list[int] = []
    for index in sorted(range(len(rollouts)), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def score_logits(
    logits: torch.Tensor,  # [positions, output width], float32
    targets: torch.Tensor,  # [positions]
    k: int,
    vocab_size: int,
) -> dict[str, np.ndarray]:
    """The arrays of RolloutScores and of its candidates for some positions, by name.

    The tail is summed over the entries that are not kept instead of taken from 1, so it is exact where it is small.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    top_logprobs, top_ids = exact_topk(logprobs[:, :vocab_size], k)
    mass = logprobs.exp()
    # 0 * -inf is not a number, and a probability of 0 contributes nothing.
    entropies = -torch.where(mass > 0, mass * logprobs, 0).sum(dim=-1)
    tail = mass.scatter_(1, top_ids, 0).sum(dim=-1).log()
    if bool((tiny := tail < _TINY).any()):
        tail[tiny] = logprobs[tiny].scatter(1, top_ids[tiny], -torch.inf).logsumexp(dim=-1)
    columns = {
        "sampled_logprobs": logprobs.gather(1, targets[:, None])[:, 0],
        "ids": top_ids.to(torch.int32),
        "logprobs": top_logprobs,
        "tail_logprobs": tail.clamp(max=0),
        "entropies": entropies,
    }
    arrays = {name: column.cpu().numpy() for name, column in columns.items()}
    return {**arrays, "ids": arrays["ids"].view(np.uint32)}


def exact_topk(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `torch.topk`, but of equal values at the border the lowest ids are kept; columns in no certain order.

    bfloat16 logits tie often, and which of them `torch.topk` keeps differs from device to device.
    """
    top, ids = torch.topk(values, k, dim=-1, sorted=True)
    border = top[:, -1:]
    tied = (values >= border).sum(dim=-1) > k
    if bool(tied.any()):
        rows = values[tied]
        above, equal = rows > border[tied], rows == border[tied]
        room = k - above.sum(dim=-1, keepdim=True)
        kept = above | (equal & (equal.cumsum(dim=-1) <= room))
        ids[tied] = kept.nonzero()[:, 1].view(-1, k)
        top[tied] = rows.gather(1, ids[tied])
    return top, ids
