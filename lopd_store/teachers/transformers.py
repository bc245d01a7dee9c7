"""The embedded engine: a transformers model in this process.

Rollouts of similar length share a batch, the body runs once, and the head runs over chunks of positions, so that
logits for [positions, vocabulary] never exist whole. Batches depend on the rollouts alone, so the same part gives
the same numbers in any worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields

import numpy as np
import torch

from lopd_store import models
from lopd_store.manifest import Scoring
from lopd_store.rollouts import Rollout
from lopd_store.teachers import RolloutScores
from lopd_store.topk import Candidates

Columns = dict[str, np.ndarray]
_HEAD_CHUNK_VALUES = 1 << 25  # logits alive at a time: 128 MiB of float32
_CANDIDATES = [field.name for field in fields(Candidates)]
_TINY = -80.0  # nat; the exponential of a smaller log-prob has few bits or none in float32


class TransformersTeacher:
    """A teacher run by transformers on one device, and beside it the reference policy where one is named."""

    def __init__(
        self, model: str, *, vocab_size: int, dtype: str, device: str, batch_tokens: int, reference: str | None = None
    ) -> None:
        loaded = [
            models.load_model(models.find(name), dtype=dtype, device=device) for name in (model, reference) if name
        ]
        self._splits = [models.split(one) for one in loaded]
        self._vocab_size = vocab_size
        self._device = device
        self._batch_tokens = batch_tokens
        self.scoring = Scoring(engine="transformers", dtype=dtype)
        lengths = [length for one in loaded if (length := models.context_length(one.config)) is not None]
        self.context_length = min(lengths, default=None)

    def score(self, rollouts: Sequence[Rollout], k: int) -> Iterator[tuple[int, RolloutScores]]:
        """See `Teacher.score`."""
        k = min(k, self._vocab_size)

        def score(targets: torch.Tensor, *logits: torch.Tensor) -> Columns:
            return score_logits(logits[0], targets, k, self._vocab_size, *logits[1:])

        for index, columns in self.map_positions(rollouts, score):
            candidates = Candidates(**{name: columns.pop(name) for name in _CANDIDATES if name in columns})
            yield index, RolloutScores(candidates=candidates, **columns)

    @torch.inference_mode()
    def map_positions(
        self, rollouts: Sequence[Rollout], compute: Callable[..., Columns]
    ) -> Iterator[tuple[int, Columns]]:
        """What `compute` makes of the logits of each rollout, in any order; arrays with one row per position.

        It is called with (targets [positions], logits [positions, output width] of each model), some positions at a
        time.
        """
        for batch in batches(rollouts, self._batch_tokens):
            yield from zip(batch, self._map_batch([rollouts[index] for index in batch], compute), strict=True)

    def _map_batch(self, rollouts: list[Rollout], compute: Callable[..., Columns]) -> Iterator[Columns]:
        lengths = [len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts]
        ids = torch.zeros(len(rollouts), max(lengths), dtype=torch.long)
        for row, (rollout, length) in enumerate(zip(rollouts, lengths, strict=True)):
            ids[row, :length] = torch.from_numpy(rollout.token_ids.astype(np.int64))
        mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        ids, mask = ids.to(self._device), mask.to(self._device)
        before = []
        for split in self._splits:
            hidden = split.body(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
            # The distribution over token t is computed at token t - 1: this is the one place where the two meet.
            states = [hidden[row, len(r.prompt_ids) - 1 : lengths[row] - 1] for row, r in enumerate(rollouts)]
            before.append(torch.cat(states))
        targets = torch.cat([ids[row, len(r.prompt_ids) : lengths[row]] for row, r in enumerate(rollouts)])
        columns = self._map_chunks(before, targets, compute)
        start = 0
        for rollout in rollouts:
            rows = slice(start, start + len(rollout.response_ids))
            yield {name: column[rows] for name, column in columns.items()}
            start = rows.stop

    def _map_chunks(
        self, hidden: list[torch.Tensor], targets: torch.Tensor, compute: Callable[..., Columns]
    ) -> Columns:
        chunk = max(1, _HEAD_CHUNK_VALUES // sum(split.output_width for split in self._splits))
        pieces = []
        for start in range(0, max(len(targets), 1), chunk):
            some = slice(start, start + chunk)
            logits = [split.logits(states[some]) for split, states in zip(self._splits, hidden, strict=True)]
            pieces.append(compute(targets[some], *logits))
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
    reference_logits: torch.Tensor | None = None,  # [positions, output width of the reference policy]
) -> Columns:
    """The arrays of RolloutScores and of its candidates for some positions, by name."""
    logprobs = torch.log_softmax(logits, dim=-1)
    ids = exact_topk(logprobs[:, :vocab_size], k)[1]
    mass = logprobs.exp()
    columns = {
        "sampled_logprobs": logprobs.gather(1, targets[:, None])[:, 0],
        # 0 * -inf is not a number, and a probability of 0 contributes nothing.
        "entropies": -torch.where(mass > 0, mass * logprobs, 0).sum(dim=-1),
    }
    del mass
    if reference_logits is None:
        columns |= {"logprobs": logprobs.gather(1, ids), "tail_logprobs": _tail(logprobs, ids)}
    else:
        reference = torch.log_softmax(reference_logits, dim=-1)
        likely = exact_topk(reference[:, :vocab_size], k)[1]
        again = torch.zeros_like(logprobs, dtype=torch.bool).scatter_(1, ids, True).gather(1, likely)
        ids = torch.cat([ids, likely], dim=1)
        again = torch.cat([torch.zeros_like(again), again], dim=1)  # ids that both find likely stand once
        columns |= {
            "logprobs": logprobs.gather(1, ids).masked_fill(again, -torch.inf),
            "tail_logprobs": _tail(logprobs, ids),
            "reference_logprobs": reference.gather(1, ids).masked_fill(again, -torch.inf),
            "reference_tail_logprobs": _tail(reference, ids),
            "reference_sampled_logprobs": reference.gather(1, targets[:, None])[:, 0],
        }
    arrays = {name: column.cpu().numpy() for name, column in columns.items()}
    return {**arrays, "ids": ids.to(torch.int32).cpu().numpy().view(np.uint32)}


def _tail(logprobs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log of the mass outside `ids`: summed over it instead of taken from 1, so it is exact where it is small."""
    tail = logprobs.exp().scatter_(1, ids, 0).sum(dim=-1).log()
    if bool((tiny := tail < _TINY).any()):
        tail[tiny] = logprobs[tiny].scatter(1, ids[tiny], -torch.inf).logsumexp(dim=-1)
    return tail.clamp(max=0)


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
