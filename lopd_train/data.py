"""From rollouts on disk to the records of each step: windows of parts, the held-out split, the order.

    feed = Feed(artifact_source(lopd_store.open("artifact")), student.limits("sft", base), config=OPD)
    feed.held_out
    for records, cursor in feed.steps(Cursor(), batch=256, count=150): ...

In every epoch the parts come in another order, and the rollouts of a window of parts are shuffled together. The next
window is decoded in the background while this one is trained on, so memory holds two, however many parts there are; the
first is as small as can be, one part as a rule, so that training begins at once. What is in a batch at step n follows
from data, seed and n alone; a cursor says where in that order a run is, so that going on costs one window.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from lopd_store.errors import DataError
from lopd_store.reader import Artifact
from lopd_store.rollouts import ROWS_PER_GROUP, RolloutsFile
from lopd_train.batches import Record
from lopd_train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rollouts in parts that are read one at a time."""

    where: str
    sizes: Mapping[int, int]  # rollouts of each part that is here, by its number
    inputs: Mapping[int, int]  # the input, or file, that each of them is of
    read: Callable[[int], list[Record]]


def artifact_source(artifact: Artifact) -> Source:
    """The rollouts of an artifact; the arrays of a record are views of those of its part.

    Wherever it lies, the values of a part are checked when it is read for the first time: nobody may have done so yet.
    """
    parts = artifact.manifest.parts
    firsts, checked = [0, *itertools.accumulate(part.counts.rollouts for part in parts)], set[int]()

    def read(number: int) -> list[Record]:
        part = artifact.part(number, check=number not in checked)
        checked.add(number)
        rollouts = (part.slice(index, index + 1) for index in range(len(part.prompt_lengths)))
        return [
            Record(
                row=row,
                token_ids=rollout.token_ids,
                prompt_length=int(rollout.prompt_lengths[0]),
                loss_mask=rollout.loss_mask,
                sampled_logprobs=rollout.sampled_logprobs,
                reference_logprobs=rollout.reference_logprobs,
                topk=rollout.topk,
            )
            for row, rollout in enumerate(rollouts, firsts[number])
        ]

    return Source(
        where=artifact.place,
        sizes={number: parts[number].counts.rollouts for number in artifact.view.parts},
        inputs={number: parts[number].input for number in artifact.view.parts},
        read=read,
    )


def rollouts_source(*files: RolloutsFile) -> Source:
    """The rows of files of SFT data, one file after the other, in parts of as many as their groups have."""
    parts = [(index, start) for index, file in enumerate(files) for start in range(0, len(file), ROWS_PER_GROUP)]
    sizes = {number: min(ROWS_PER_GROUP, len(files[index]) - start) for number, (index, start) in enumerate(parts)}
    firsts = [0, *itertools.accumulate(sizes.values())]

    def read(number: int) -> list[Record]:
        index, start = parts[number]
        return [
            Record(
                row=row,
                token_ids=rollout.token_ids,
                prompt_length=len(rollout.prompt_ids),
                loss_mask=rollout.loss_mask,
            )
            for row, rollout in enumerate(files[index].read(start, start + ROWS_PER_GROUP), firsts[number])
        ]

    inputs = {number: index for number, (index, _) in enumerate(parts)}
    return Source(where=", ".join(str(file.path) for file in files), sizes=sizes, inputs=inputs, read=read)


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """Where in the order of its data a run is."""

    epoch: int = 0
    window: int = 0
    taken: int = 0  # rollouts of the window
    dropped: int = 0  # rollouts left out as too long, in the first epoch's windows up to this one


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a student can read."""

    vocab_size: int
    context_length: int | None  # tokens, where its config says


class Feed:
    """The rollouts of each step, in their order, and those that are held out.

    Rollouts without a position that counts in the loss are left out. Raises DataError at a rollout that the student
    cannot read whole, when its window comes; with the config's `drop_long` one that is too long is counted instead.
    """

    def __init__(self, source: Source, limits: Limits, *, config: TrainConfig) -> None:
        self._source, self._limits, self._config = source, limits, config
        parts = self._windows(epoch=0)[0]
        records, _ = self._read(parts)
        if not records:
            raise DataError(
                f"`{source.where}` has nothing to train on", expected="response tokens that the loss mask includes"
            )
        self._last_held_out = last_held_out(records, fraction=config.eval_fraction, seed=config.seed)
        # Copies: what is a view keeps the whole window in memory for as long as it lives.
        self.held_out = [copy.deepcopy(record) for record in records if self._is_held_out(record)]
        self.has_reference = all(record.reference_logprobs is not None for record in records)
        read = sum(source.sizes[part] for part in parts)
        share = (len(records) - len(self.held_out)) / max(read, 1)
        self.rollouts = round(share * sum(source.sizes.values()))  # to train on, if all windows are like the first

    def steps(self, cursor: Cursor, *, batch: int, count: int) -> Iterator[tuple[list[Record], Cursor]]:
        """The rollouts of each of the next `count` steps, with the cursor after it."""
        order = self._order(cursor, batch * count)
        for _ in range(count):
            rollouts = list(itertools.islice(order, batch))
            yield [record for record, _ in rollouts], rollouts[-1][1]

    def _order(self, cursor: Cursor, count: int) -> Iterator[tuple[Record, Cursor]]:
        """The next `count` rollouts, each with the cursor after it."""
        epochs = itertools.count(cursor.epoch)
        every = ((epoch, window) for epoch in epochs for window in range(len(self._windows(epoch))))
        places = itertools.islice(every, cursor.window, None)
        with ThreadPoolExecutor(max_workers=1) as pool:
            ahead = pool.submit(self._window, *next(places))
            while count > 0:
                records, dropped = ahead.result()
                if cursor.taken == 0 and cursor.epoch == 0:
                    cursor = replace(cursor, dropped=cursor.dropped + dropped)
                count -= len(records) - cursor.taken
                following = next(places)
                if count > 0:
                    ahead = pool.submit(self._window, *following)
                for taken in range(cursor.taken + 1, len(records) + 1):
                    yield records[taken - 1], replace(cursor, taken=taken)
                cursor = Cursor(epoch=following[0], window=following[1], dropped=cursor.dropped)

    def _window(self, epoch: int, window: int) -> tuple[list[Record], int]:
        """The records of a window to train on, shuffled, and how many were too long."""
        records, dropped = self._read(self._windows(epoch)[window])
        records = [record for record in records if not self._is_held_out(record)]
        if self._config.objective == "sampled":  # only evaluation reads it
            records = [replace(record, topk=None) for record in records]
        order = np.random.default_rng([self._config.seed, epoch, 1 + window]).permutation(len(records))
        return [records[index] for index in order], dropped

    def _windows(self, epoch: int) -> list[list[int]]:
        """The numbers of the parts of each window.

        The first has a part of every input, and as many more as a step takes; the others have `shuffle_parts`.
        """
        source, size = self._source, self._config.shuffle_parts
        order = np.random.default_rng([self._config.seed, epoch, 0]).permutation(sorted(source.sizes)).tolist()
        first = list({source.inputs[part]: part for part in reversed(order)}.values())
        rest = [part for part in order if part not in first]
        while rest and sum(source.sizes[part] for part in first) < self._config.batch_rollouts:
            first.append(rest.pop(0))
        return [sorted(window) for window in (first, *(rest[at : at + size] for at in range(0, len(rest), size)))]

    def _read(self, parts: Sequence[int]) -> tuple[list[Record], int]:
        """The records of parts that count in the loss, and how many were too long."""
        records = [record for part in parts for record in self._source.read(part) if record.positions]
        kept = [record for record in records if self._fits(record)]
        for record in kept:
            self._check(record)
        return kept, len(records) - len(kept)

    def _fits(self, record: Record) -> bool:
        if self._limits.context_length is None or len(record.token_ids) <= self._limits.context_length:
            return True
        if self._config.drop_long:
            return False
        raise DataError(
            f"rollout {record.row} is longer than the student's context",
            expected=f"at most {self._limits.context_length} tokens",
            actual=f"{len(record.token_ids)} tokens, {record.prompt_length} of them the prompt",
            hint="a rollout is never cut; leave such rollouts out with `--drop-long`",
        )

    def _check(self, record: Record) -> None:
        if record.prompt_length == 0:
            raise DataError(f"rollout {record.row} has no prompt, so nothing predicts its first token")
        greatest = int(record.token_ids.max())
        if record.topk is not None and len(record.topk.ids):
            greatest = max(greatest, int(record.topk.ids.max()))
        if greatest >= self._limits.vocab_size:
            raise DataError(
                f"rollout {record.row} has a token id that the student does not know",
                expected=f"below {self._limits.vocab_size}",
                actual=greatest,
            )

    def _is_held_out(self, record: Record) -> bool:
        return prompt_hash(record, self._config.seed) <= self._last_held_out


def last_held_out(records: Iterable[Record], *, fraction: float, seed: int) -> bytes:
    """The greatest seeded hash of a prompt that is held out: a prompt is where its own is no greater, wherever it is.

    It is chosen so that this share of the prompts of these records is held out: at least one, unless the fraction is 0
    or there is no other prompt to train on.
    """
    hashes = sorted({prompt_hash(record, seed) for record in records})
    count = min(max(1, round(fraction * len(hashes))), len(hashes) - 1) if fraction > 0 else 0
    return hashes[count - 1] if count else b""


def prompt_hash(record: Record, seed: int) -> bytes:
    """A hash of a rollout's prompt and the seed: all rollouts of one prompt are on the same side of the split."""
    return hashlib.sha256(seed.to_bytes(8, "little") + record.prompt).digest()
