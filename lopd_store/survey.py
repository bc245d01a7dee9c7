"""One pass over the rollouts before anything is scored: how long each one is, and which cannot be scored.

    found = survey(RolloutsFile("rollouts.parquet"), limits, on_bad="skip")
    found.bad      # rows, each with the reason

Whole columns are screened at once, a thousand rows at a time; the few rows that the screen finds suspicious are looked
at one by one, by the check that scoring itself uses. So ten million rollouts take eight bytes each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lopd_store.errors import DataError
from lopd_store.rollouts import Rollout, RolloutsFile

OnBad = Literal["fail", "skip"]
OnSurveyed = Callable[[int, int], None]  # rows, of how many
TOLD_EVERY = 1 << 16  # rows, about a quarter of a second
MAX_BAD = 100_000  # rollouts that are skipped; a file with more of them is wrong itself
HINT = "`--on-bad-rollout skip` leaves it out; a rollout is never cut"
_SCREENED = ("prompt_ids", "response_ids", "loss_mask", "logprobs")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a rollout must fit into to be scored."""

    vocab_size: int  # of the teacher's tokenizer
    context_length: int | None  # tokens
    positions: int  # of one rollout, so that its entries fit into a part


@dataclass(frozen=True, kw_only=True)
class BadRollout:
    """A rollout that is not scored, by its row in the file."""

    row: int
    why: str

    def __str__(self) -> str:
        return f"rollout {self.row}: {self.why}"


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What is known of a rollouts file before scoring; a bad row has no tokens."""

    prompt_lengths: npt.NDArray[np.uint32]  # [rows]
    response_lengths: npt.NDArray[np.uint32]  # [rows]
    bad: tuple[BadRollout, ...]
    has_logprobs: bool  # whether every row that is not bad carries the sampling policy's log-probs
    two_bos: int  # rows that are not bad and whose prompt begins with two BOS tokens


def survey(
    file: RolloutsFile,
    limits: Limits,
    *,
    bos: int | None = None,
    on_bad: OnBad = "fail",
    on_surveyed: OnSurveyed | None = None,
) -> Survey:
    """Read every row once; raises DataError at the first bad one, or with `skip` lists the bad ones.

    `bos` is the id with which the teacher's tokenizer begins a text. `on_surveyed` hears how far it is now and then; of
    a file that is read in a moment it hears nothing.
    """
    prompts, responses = np.zeros(len(file), np.uint32), np.zeros(len(file), np.uint32)
    bad: list[BadRollout] = []
    has_logprobs, two_bos = "logprobs" in file.columns, 0
    for first, table in file.tables([name for name in _SCREENED if name in file.columns]):
        columns = {name: table.column(name).combine_chunks() for name in table.column_names}
        lengths = {name: _lengths(column) for name, column in columns.items()}
        good = np.ones(table.num_rows, np.bool_)
        for index in np.flatnonzero(_suspicious(columns, lengths, limits)).tolist():
            try:
                (rollout,) = file.decode(table.slice(index, 1), first + index)
                check_rollout(rollout, first + index, limits)
            except DataError as error:
                if on_bad == "fail":
                    error.hint = error.hint or HINT
                    raise
                bad.append(bad_rollout(first + index, error, file.row_name(first + index)))
                good[index] = False
                _check_bearable(bad, file)
        rows = slice(first, first + table.num_rows)
        prompts[rows], responses[rows] = lengths["prompt_ids"] * good, lengths["response_ids"] * good
        if has_logprobs:
            has_logprobs = bool((lengths["logprobs"] == lengths["response_ids"])[good].all())
        if bos is not None:
            two_bos += int((_begin_twice(columns["prompt_ids"], lengths["prompt_ids"], bos) & good).sum())
        if on_surveyed is not None and rows.start // TOLD_EVERY < rows.stop // TOLD_EVERY:
            on_surveyed(rows.stop, len(file))
    if on_surveyed is not None and len(file) >= TOLD_EVERY:
        on_surveyed(len(file), len(file))
    return Survey(
        prompt_lengths=prompts,
        response_lengths=responses,
        bad=tuple(bad),
        has_logprobs=has_logprobs,
        two_bos=two_bos,
    )


def check_rollout(rollout: Rollout, row: int, limits: Limits) -> None:
    """Raise DataError, naming the row, where the teacher cannot score this rollout."""
    where = f"rollout {row}"
    length = len(rollout.prompt_ids) + len(rollout.response_ids)
    if len(rollout.prompt_ids) == 0:
        expected = "one token at least: the first token has no distribution"
        raise DataError(f"{where} has no prompt", expected=expected, hint=HINT)
    if int(rollout.token_ids.max()) >= limits.vocab_size:
        raise DataError(
            f"{where} has an id that the teacher's tokenizer does not know",
            expected=f"below {limits.vocab_size}",
            actual=int(rollout.token_ids.max()),
            hint=HINT,
        )
    if limits.context_length is not None and length > limits.context_length:
        raise DataError(
            f"{where} is longer than the teacher's context",
            expected=f"at most {limits.context_length} tokens",
            actual=f"{len(rollout.prompt_ids)} prompt + {len(rollout.response_ids)} response tokens",
            hint=HINT,
        )
    if len(rollout.response_ids) > limits.positions:
        raise DataError(
            f"{where} has too many positions for this `k_max`",
            expected=f"at most {limits.positions}",
            actual=len(rollout.response_ids),
            hint=HINT,
        )


def bad_rollout(row: int, error: DataError, where: str = "") -> BadRollout:
    """What is noted of a rollout that raised this: the error in one line, without what says where."""
    why = error.message.removeprefix(f"rollout {row}").removeprefix(where).lstrip(",: ")
    return BadRollout(row=row, why=why if error.actual is None else f"{why} ({error.actual})")


def _check_bearable(bad: list[BadRollout], file: RolloutsFile) -> None:
    if len(bad) > MAX_BAD:
        raise DataError(
            f"more than {MAX_BAD:,} rollouts of `{file.path}` cannot be scored",
            actual=f"{bad[0]}, and so on",
            hint="the file is not what it should be; look at how it was made",
        )


def _lengths(column: pa.Array) -> npt.NDArray[np.int64]:
    """Values of each list, 0 for null; [rows]."""
    lengths = pc.fill_null(pc.list_value_length(column), 0)
    return np.asarray(lengths.to_numpy(zero_copy_only=False), np.int64)


def _begin_twice(prompts: pa.Array, lengths: npt.NDArray[np.int64], bos: int) -> npt.NDArray[np.bool_]:
    """Which prompts begin with this id two times; [rows]."""
    found: npt.NDArray[np.bool_] = lengths >= 2
    starts = (np.cumsum(lengths) - lengths)[found]
    is_bos = prompts.flatten().fill_null(0).to_numpy(zero_copy_only=False) == bos
    found[found] = is_bos[starts] & is_bos[starts + 1]
    return found


def _suspicious(
    columns: dict[str, pa.Array], lengths: dict[str, npt.NDArray[np.int64]], limits: Limits
) -> npt.NDArray[np.bool_]:
    """The rows that may be bad, and every one that is; [rows]."""
    prompts, responses = lengths["prompt_ids"], lengths["response_ids"]
    found: npt.NDArray[np.bool_] = (prompts == 0) | (responses > limits.positions)
    if limits.context_length is not None:
        found |= prompts + responses > limits.context_length
    for name, column in columns.items():
        is_null = np.asarray(column.is_null().to_numpy(zero_copy_only=False), np.bool_)
        if name in ("prompt_ids", "response_ids"):
            found |= is_null
        else:  # a row may do without, but not with a part of it
            found |= ~is_null & (lengths[name] != responses)
        flat = column.flatten()
        wrong = _wrong_values(flat, name, limits)
        if wrong.any():
            ends = np.cumsum(lengths[name])
            found[np.searchsorted(ends, np.flatnonzero(wrong), side="right")] = True
    return found


def _wrong_values(flat: pa.Array, name: str, limits: Limits) -> npt.NDArray[np.bool_]:
    """Which values of all lists of a column cannot be; [values]."""
    wrong: npt.NDArray[np.bool_] = np.asarray(flat.is_null().to_numpy(zero_copy_only=False), np.bool_)
    if name == "loss_mask":
        return wrong
    values: npt.NDArray[Any] = flat.fill_null(0).to_numpy(zero_copy_only=False)
    if name == "logprobs":
        return wrong | ~(values <= 0)
    return wrong | (values < 0) | (values >= limits.vocab_size)
