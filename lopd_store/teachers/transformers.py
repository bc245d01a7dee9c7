"""The embedded engine: a transformers model in this process.

Rollouts of similar length share a batch, the body runs once, and the head runs over chunks of positions, so that
logits for [positions, vocabulary] never exist whole. Batches depend on the rollouts alone, so the same part gives
the same numbers in any worker. Where memory runs out, the batches of the part that are left are half as large; the next
part begins with whole ones again, so what was scored before it changes nothing. The last bits of a log-prob are then
not those of a machine with more memory, as with any other batch shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from lopd_store import models
from lopd_store.errors import UnavailableError
from lopd_store.manifest import Scoring
from lopd_store.rollouts import Rollout
from lopd_store.teachers import RolloutScores
from lopd_store.topk import Candidates

Columns = dict[str, np.ndarray]
_HEAD_CHUNK_VALUES = 1 << 25  # logits alive at a time: 128 MiB of float32
_CACHED_VALUES = 1 << 19  # of these, how many a CPU looks at together: what it makes of them stays in its cache
_BLOCK = 16  # values of which `exact_topk` takes the greatest first
_CANDIDATES = [field.name for field in fields(Candidates)]
_TINY = -80.0  # nat; the exponential of a smaller log-prob has few bits or none in float32
_NOTHING = -200.0  # nat; its exponential is 0 in float32


class TransformersTeacher:
    """A teacher run by transformers on one device or several, and beside it the reference policy where one is named."""

    def __init__(
        self,
        model: str,
        *,
        vocab_size: int,
        dtype: str,
        device: str,
        batch_tokens: int,
        reference: str | None = None,
        tensor_parallel_size: int = 1,  # how many processes like this one have a share of it; see `tensor_parallel`
    ) -> None:
        models.keep_freed_memory(device)
        options: dict[str, Any] = {"dtype": dtype, "device": device, "tensor_parallel_size": tensor_parallel_size}
        loaded = [models.load_model(models.find(name), **options) for name in (model, reference) if name]
        self._splits = [models.split(one) for one in loaded]
        self._devices = [one.device for one in loaded]  # where their input goes
        self._vocab_size = vocab_size
        self._batch_tokens = batch_tokens
        self._in_step = tensor_parallel_size > 1
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

    def map_positions(
        self, rollouts: Sequence[Rollout], compute: Callable[..., Columns]
    ) -> Iterator[tuple[int, Columns]]:
        """What `compute` makes of the logits of each rollout, in any order; arrays with one row per position.

        It is called with (targets [positions], logits [positions, output width] of each model), some positions at a
        time. Raises UnavailableError where not even one rollout fits into memory, or a batch does not that other
        processes have begun in step.
        """
        order, start, batch_tokens = _longest_first(rollouts), 0, self._batch_tokens
        while start < len(order):
            batch = _batch(rollouts, order[start:], batch_tokens)
            found = self._map_batch([rollouts[index] for index in batch], compute)
            if found is not None:
                yield from zip(batch, found, strict=True)
                start += len(batch)
            elif len(batch) > 1 and self._in_step:
                raise UnavailableError(
                    f"{len(batch)} rollouts of up to {_length(rollouts[batch[0]])} tokens do not fit into the memory "
                    "that is free",
                    hint="try a smaller `--batch-tokens`",
                )
            elif len(batch) > 1:
                batch_tokens = len(batch) * _length(rollouts[batch[0]]) // 2
            else:
                raise UnavailableError(
                    f"a rollout of {_length(rollouts[batch[0]])} tokens does not fit into the memory that is free",
                    hint="try `--dtype bfloat16`, fewer `--workers`, or a device with more memory",
                )

    def _map_batch(self, rollouts: list[Rollout], compute: Callable[..., Columns]) -> list[Columns] | None:
        """The columns of each rollout of a batch, or None where memory ran out."""
        try:
            columns = self._map_rows(rollouts, compute)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            return None
        ends = np.cumsum([len(rollout.response_ids) for rollout in rollouts])[:-1]
        pieces = {name: np.split(column, ends) for name, column in columns.items()}
        return [{name: piece[row] for name, piece in pieces.items()} for row in range(len(rollouts))]

    @torch.inference_mode()
    def _map_rows(self, rollouts: list[Rollout], compute: Callable[..., Columns]) -> Columns:
        """The columns of a batch, the positions of its rollouts one after the other."""
        lengths = [_length(rollout) for rollout in rollouts]
        # Padding stands behind, where no token that counts can see it: it needs no mask.
        ids = torch.zeros(len(rollouts), max(lengths), dtype=torch.long)
        for row, (rollout, length) in enumerate(zip(rollouts, lengths, strict=True)):
            ids[row, :length] = torch.from_numpy(rollout.token_ids.astype(np.int64))
        before = []
        for split, device in zip(self._splits, self._devices, strict=True):
            hidden = split.body(input_ids=ids.to(device), use_cache=False).last_hidden_state
            # The distribution over token t is computed at token t - 1: this is the one place where the two meet.
            states = [hidden[row, len(r.prompt_ids) - 1 : lengths[row] - 1] for row, r in enumerate(rollouts)]
            before.append(torch.cat(states))
            del hidden, states
        targets = torch.cat([ids[row, len(r.prompt_ids) : lengths[row]] for row, r in enumerate(rollouts)])
        return self._map_chunks(before, targets.to(before[0].device), compute)

    def _map_chunks(
        self, hidden: list[torch.Tensor], targets: torch.Tensor, compute: Callable[..., Columns]
    ) -> Columns:
        width = sum(split.output_width for split in self._splits)
        chunk = max(1, _HEAD_CHUNK_VALUES // width)
        rows = max(1, _CACHED_VALUES // width) if targets.device.type == "cpu" else chunk
        pieces = []
        for start in range(0, max(len(targets), 1), chunk):
            some = slice(start, start + chunk)
            logits = [
                torch.split(split.logits(states[some]).to(targets.device), rows)
                for split, states in zip(self._splits, hidden, strict=True)
            ]
            pieces += [compute(*block) for block in zip(torch.split(targets[some], rows), *logits, strict=True)]
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def batches(rollouts: Sequence[Rollout], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length whose padded size stays within `batch_tokens`, longest first.

    Rollouts without a response have no positions and share the batches all the same; a rollout longer than
    `batch_tokens` gets one of its own.
    """
    order = _longest_first(rollouts)
    while order:
        batch = _batch(rollouts, order, batch_tokens)
        yield batch
        order = order[len(batch) :]


def _longest_first(rollouts: Sequence[Rollout]) -> list[int]:
    return sorted(range(len(rollouts)), key=lambda index: (-_length(rollouts[index]), index))


def _batch(rollouts: Sequence[Rollout], order: list[int], batch_tokens: int) -> list[int]:
    """The first indices of `order`, the longest, as many as fit when padded to the length of the first."""
    return order[: max(1, batch_tokens // max(1, _length(rollouts[order[0]])))]


def _length(rollout: Rollout) -> int:
    return len(rollout.prompt_ids) + len(rollout.response_ids)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


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
        "entropies": -logprobs.clamp(min=_NOTHING).mul_(mass).sum(dim=-1),
        "padding": mass[:, vocab_size:].sum(dim=-1),
    }
    if reference_logits is None:
        columns |= {"logprobs": logprobs.gather(1, ids), "tail_logprobs": _tail(logprobs, mass, ids)}
    else:
        reference = torch.log_softmax(reference_logits, dim=-1)
        likely = exact_topk(reference[:, :vocab_size], k)[1]
        again = torch.zeros_like(logprobs, dtype=torch.bool).scatter_(1, ids, True).gather(1, likely)
        ids = torch.cat([ids, likely], dim=1)
        again = torch.cat([torch.zeros_like(again), again], dim=1)  # ids that both find likely stand once
        columns |= {
            "logprobs": logprobs.gather(1, ids).masked_fill(again, -torch.inf),
            "tail_logprobs": _tail(logprobs, mass, ids),
            "reference_logprobs": reference.gather(1, ids).masked_fill(again, -torch.inf),
            "reference_tail_logprobs": _tail(reference, reference.exp(), ids),
            "reference_sampled_logprobs": reference.gather(1, targets[:, None])[:, 0],
        }
    arrays = {name: column.cpu().numpy() for name, column in columns.items()}
    return {**arrays, "ids": ids.to(torch.int32).cpu().numpy().view(np.uint32)}


def _tail(logprobs: torch.Tensor, mass: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log of the mass outside `ids`: summed over it instead of taken from 1, so it is exact where it is small.

    `mass`, the exponentials of the log-probs, is used up.
    """
    tail = mass.scatter_(1, ids, 0).sum(dim=-1).log()
    if bool((tiny := tail < _TINY).any()):
        tail[tiny] = logprobs[tiny].scatter(1, ids[tiny], -torch.inf).logsumexp(dim=-1)
    return tail.clamp(max=0)


def exact_topk(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `torch.topk`, but of equal values at the border the lowest ids are kept; columns in no certain order.

    bfloat16 logits tie often, and which of them `torch.topk` keeps differs from device to device. On a CPU, where it is
    slow over a whole vocabulary, the ids are first dealt out to blocks of 16. The k greatest values lie in the blocks
    with the k greatest maxima; half as many blocks more are looked at, which is enough for nearly all ties.
    """
    rows, width = values.shape
    blocks, looked_at = width // _BLOCK, k + k // 2
    if values.device.type != "cpu" or blocks <= 2 * looked_at:
        return _topk(values, k)
    dealt = blocks * _BLOCK  # the few values behind it are looked at as they are
    grid = values[:, :dealt].view(rows, _BLOCK, blocks)
    maxima, chosen = torch.topk(grid.amax(dim=1), looked_at + 1, dim=-1, sorted=True)
    chosen = chosen[:, :looked_at].sort(dim=-1).values[:, None].expand(-1, _BLOCK, -1)
    starts = torch.arange(0, dealt, blocks)[:, None]
    ids = torch.cat([(starts + chosen).flatten(1), torch.arange(dealt, width).expand(rows, -1)], dim=1)  # ascending
    top, columns = _topk(torch.cat([grid.gather(2, chosen).flatten(1), values[:, dealt:]], dim=1), k)
    ids = ids.gather(1, columns)
    if bool((undecided := top.amin(dim=-1) <= maxima[:, -1]).any()):  # a block not looked at may tie
        top[undecided], ids[undecided] = _topk(values[undecided], k)
    return top, ids


def _topk(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
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
