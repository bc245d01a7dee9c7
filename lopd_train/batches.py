"""From rollouts on disk to tensors on a device: records, the held-out split, the data order, micro-batches.

    records = read_artifact(lopd_store.open("artifact"))
    training, held_out = hold_out(records, fraction=0.05, seed=0)
    chosen = [training[i] for i in rollouts_of_step(7, len(training), batch=256, seed=0)]
    for batch in micro_batches(chosen, max_tokens=8192, device="cuda"): ...

A record carries token ids and teacher values together, so nothing can be cut or shuffled apart. What is in a batch at
step n follows from the seed and n alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lopd_store import topk
from lopd_store.errors import DataError
from lopd_store.reader import Artifact, rollout_of_part
from lopd_store.rollouts import RolloutsFile
from lopd_store.topk import TopK


@dataclass(frozen=True, kw_only=True)
class Record:
    """One rollout and what the teacher said of it; row j of everything per position speaks of response token j."""

    row: int  # in the artifact or file
    token_ids: npt.NDArray[np.uint32]  # [tokens], prompt and response
    prompt_length: int
    loss_mask: npt.NDArray[np.bool_]  # [positions]
    sampled_logprobs: npt.NDArray[np.float32] | None = None  # [positions], the teacher's
    reference_logprobs: npt.NDArray[np.float32] | None = None  # [positions], of the reference policy
    topk: TopK | None = None

    @cached_property
    def positions(self) -> int:
        """How many positions count in the loss."""
        return int(np.count_nonzero(self.loss_mask))

    @property
    def prompt(self) -> bytes:
        """The prompt's token ids, as a key."""
        return self.token_ids[: self.prompt_length].tobytes()


@dataclass(frozen=True, kw_only=True)
class BatchTopK:
    """The teacher's stored top-k at the positions of a batch, flat."""

    offsets: npt.NDArray[np.int64]  # [positions + 1], where each position's entries begin
    positions: Tensor  # [entries], the position that each entry belongs to
    ids: Tensor  # [entries]
    logprobs: Tensor  # [entries]
    tail_logprobs: Tensor  # [positions]
    reference_logprobs: Tensor | None = None  # [entries]
    reference_tail_logprobs: Tensor | None = None  # [positions]

    def slice(self, start: int, stop: int) -> BatchTopK:
        """Positions [start, stop), counted from 0 again."""
        entries = slice(int(self.offsets[start]), int(self.offsets[stop]))
        reference, reference_tail = self.reference_logprobs, self.reference_tail_logprobs
        return BatchTopK(
            offsets=self.offsets[start : stop + 1] - self.offsets[start],
            positions=self.positions[entries] - start,
            ids=self.ids[entries],
            logprobs=self.logprobs[entries],
            tail_logprobs=self.tail_logprobs[start:stop],
            reference_logprobs=None if reference is None else reference[entries],
            reference_tail_logprobs=None if reference_tail is None else reference_tail[start:stop],
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some rollouts as tensors; positions of all of them in one row, without those that the loss mask excludes."""

    rows: tuple[int, ...]
    input_ids: Tensor  # [rollouts, longest], padded on the right
    sources: Tensor  # [positions], the flat index in input_ids of the token before each target
    targets: Tensor  # [positions], token ids
    rollouts: Tensor  # [positions], which of `rows` each belongs to
    sampled_logprobs: Tensor | None  # [positions]
    reference_logprobs: Tensor | None  # [positions]
    topk: BatchTopK | None

    def slice(self, start: int, stop: int) -> Batch:
        """The same rollouts, and of their positions those in [start, stop)."""
        sampled, reference = self.sampled_logprobs, self.reference_logprobs
        return replace(
            self,
            sources=self.sources[start:stop],
            targets=self.targets[start:stop],
            rollouts=self.rollouts[start:stop],
            sampled_logprobs=None if sampled is None else sampled[start:stop],
            reference_logprobs=None if reference is None else reference[start:stop],
            topk=None if self.topk is None else self.topk.slice(start, stop),
        )


def read_artifact(artifact: Artifact) -> list[Record]:
    """Every rollout of an artifact with at least one position that counts in the loss."""
    rollouts = (rollout_of_part(part, i) for part in artifact.parts() for i in range(len(part.prompt_lengths)))
    return _counting(
        (
            Record(
                row=row,
                token_ids=np.concatenate([rollout.prompt_ids, rollout.response_ids]),
                prompt_length=len(rollout.prompt_ids),
                loss_mask=rollout.loss_mask,
                sampled_logprobs=rollout.sampled_logprobs,
                reference_logprobs=rollout.reference_logprobs,
                topk=rollout.topk,
            )
            for row, rollout in zip(artifact.rollouts, rollouts, strict=True)
        ),
        str(artifact.path),
    )


def read_rollouts(file: RolloutsFile) -> list[Record]:
    """Every rollout of an SFT data file with at least one position that counts in the loss."""
    return _counting(
        (
            Record(
                row=row,
                token_ids=rollout.token_ids,
                prompt_length=len(rollout.prompt_ids),
                loss_mask=rollout.loss_mask,
            )
            for row, rollout in enumerate(file.read())
        ),
        str(file.path),
    )


def check_records(records: Iterable[Record], *, vocab_size: int, context_length: int | None) -> None:
    """Raise DataError at the first rollout that the student cannot read whole."""
    for record in records:
        if record.prompt_length == 0:
            raise DataError(f"rollout {record.row} has no prompt, so nothing predicts its first token")
        if int(record.token_ids.max()) >= vocab_size:
            raise DataError(
                f"rollout {record.row} has a token id that the student does not know",
                expected=f"below {vocab_size}",
                actual=int(record.token_ids.max()),
            )
        if context_length is not None and len(record.token_ids) > context_length:
            raise DataError(
                f"rollout {record.row} is longer than the student's context",
                expected=f"at most {context_length} tokens",
                actual=f"{len(record.token_ids)} tokens, {record.prompt_length} of them the prompt",
                hint="leave it out of the rollouts; a rollout is never cut",
            )


def hold_out(records: Sequence[Record], *, fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Training and held-out records; all rollouts of one prompt are on the same side.

    The prompts with the smallest seeded hashes are held out, at least one unless the fraction is 0 or there is no
    other prompt to train on.
    """
    prompts = sorted(
        {record.prompt for record in records},
        key=lambda prompt: hashlib.sha256(seed.to_bytes(8, "little") + prompt).digest(),
    )
    count = min(max(1, round(fraction * len(prompts))), len(prompts) - 1) if fraction > 0 else 0
    chosen = frozenset(prompts[:count])
    return (
        [record for record in records if record.prompt not in chosen],
        [record for record in records if record.prompt in chosen],
    )


def rollouts_of_step(step: int, count: int, *, batch: int, seed: int) -> list[int]:
    """Which of `count` rollouts step 1, 2, … trains on: the epochs' permutations, end to end, in runs of `batch`."""
    epochs, places = np.divmod(np.arange((step - 1) * batch, step * batch), count)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(count) for epoch in np.unique(epochs).tolist()}
    return [int(orders[epoch][place]) for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True)]


def micro_batches(records: Sequence[Record], *, max_tokens: int, device: str) -> Iterator[Batch]:
    """Batches of rollouts of similar length, each of at most `max_tokens` tokens with padding or a single rollout."""
    waiting: list[Record] = []
    for record in sorted(records, key=lambda record: -len(record.token_ids)):  # the longest first: memory fails early
        if waiting and (len(waiting) + 1) * len(waiting[0].token_ids) > max_tokens:
            yield collate(waiting, device)
            waiting = []
        waiting.append(record)
    if waiting:
        yield collate(waiting, device)


def collate(records: Sequence[Record], device: str) -> Batch:
    """Records as one batch. Here, once, the targets are chosen and shifted against the states that predict them."""
    longest = max(len(record.token_ids) for record in records)
    input_ids = np.zeros((len(records), longest), np.int64)
    sources, targets = [], []
    for index, record in enumerate(records):
        input_ids[index, : len(record.token_ids)] = record.token_ids
        places = record.prompt_length + np.flatnonzero(record.loss_mask)
        targets.append(record.token_ids[places])
        sources.append(index * longest + places - 1)  # a token is predicted by the state of the one before it

    def tensor(pieces: Sequence[npt.NDArray[Any]], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.concatenate(pieces)).to(device=device, dtype=dtype)

    sampled = [record.sampled_logprobs[record.loss_mask] for record in records if record.sampled_logprobs is not None]
    reference = [
        record.reference_logprobs[record.loss_mask] for record in records if record.reference_logprobs is not None
    ]
    kept = [record.topk.mask(record.loss_mask) for record in records if record.topk is not None]
    return Batch(
        rows=tuple(record.row for record in records),
        input_ids=torch.from_numpy(input_ids).to(device),
        sources=tensor(sources, torch.int64),
        targets=tensor(targets, torch.int64),
        rollouts=tensor([np.full(len(some), index) for index, some in enumerate(targets)], torch.int64),
        sampled_logprobs=tensor(sampled, torch.float32) if sampled else None,
        reference_logprobs=tensor(reference, torch.float32) if reference else None,
        topk=_batch_topk(topk.concatenate(kept), device) if kept else None,
    )


def _counting(records: Iterable[Record], where: str) -> list[Record]:
    counting = [record for record in records if record.positions]
    if not counting:
        raise DataError(f"`{where}` has nothing to train on", expected="response tokens that the loss mask includes")
    return counting


def _batch_topk(stored: TopK, device: str) -> BatchTopK:
    reference, reference_tail = stored.reference_logprobs, stored.reference_tail_logprobs
    return BatchTopK(
        offsets=stored.offsets,
        positions=torch.from_numpy(stored.positions).to(device),
        ids=torch.from_numpy(stored.ids.astype(np.int64)).to(device),
        logprobs=torch.from_numpy(stored.logprobs).to(device),
        tail_logprobs=torch.from_numpy(stored.tail_logprobs).to(device),
        reference_logprobs=None if reference is None else torch.from_numpy(reference).to(device),
        reference_tail_logprobs=None if reference_tail is None else torch.from_numpy(reference_tail).to(device),
    )
