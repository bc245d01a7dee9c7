"""Rollouts as a Parquet file: one row per prompt and response, provenance in the schema metadata.

The same file is SFT data when a teacher wrote it. Columns:

    prompt, response        text, for people; training and scoring never read it
    prompt_ids, response_ids    token ids as sampled, stop token included
    loss_mask               one flag per response token; false where the policy did not sample it
    logprobs                natural log at temperature 1 of each response token under the sampling policy (optional)
    finish_reason           `stop` or `length`

    file = RolloutsFile("rollouts.parquet")
    rollouts = file.read(0, 100)
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lopd_store import strictjson
from lopd_store.digest import digest_file
from lopd_store.errors import DataError, InputError
from lopd_store.identity import TOKENIZER_FIELDS, ModelIdentity
from lopd_store.provenance import RolloutsRecord

METADATA_KEY = b"lopd"
ROWS_PER_GROUP = 1024
_BUFFER_BYTES = 1 << 20  # of a column
FINISH_REASONS = ("stop", "length")
SCHEMA = pa.schema(
    [
        ("prompt", pa.large_string()),
        ("response", pa.large_string()),
        ("prompt_ids", pa.large_list(pa.uint32())),
        ("response_ids", pa.large_list(pa.uint32())),
        ("loss_mask", pa.large_list(pa.bool_())),
        ("logprobs", pa.large_list(pa.float32())),
        ("finish_reason", pa.string()),
    ]
)
_REQUIRED = ("prompt_ids", "response_ids")


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One prompt and one response as token ids."""

    prompt_ids: npt.NDArray[np.uint32]
    response_ids: npt.NDArray[np.uint32]
    loss_mask: npt.NDArray[np.bool_]
    logprobs: npt.NDArray[np.float32] | None
    prompt: str | None
    response: str | None
    finish_reason: str | None

    @property
    def token_ids(self) -> npt.NDArray[np.uint32]:
        """Prompt and response, one after the other."""
        return np.concatenate([self.prompt_ids, self.response_ids])


def write_rollouts(path: Path, rows: Iterable[Mapping[str, Any]], record: RolloutsRecord | None) -> None:
    """Write rows with the columns of SCHEMA; appears under `path` only when it is whole."""
    schema = SCHEMA
    if record is not None:
        schema = schema.with_metadata({METADATA_KEY: strictjson.canonical(record.to_json())})
    with _writing(path, schema) as writer:
        group: list[Mapping[str, Any]] = []
        for row in rows:
            group.append(row)
            if len(group) == ROWS_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                group = []
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def read_record(path: Path) -> RolloutsRecord | None:
    """The record in a Parquet file, whatever its columns are, or None where there is none."""
    try:
        return _record(pq.read_schema(path), path)
    except pa.ArrowInvalid as error:
        raise DataError(f"`{path}` is not a Parquet file: {error}") from error


class RolloutsFile:
    """A rollouts file opened for reading: lengths and rows are read when asked for."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"no rollouts at `{path}`", hint="write them with `lopd-store generate`")
        try:
            # Else pyarrow holds all that it is going to read of a file, or of a row group, in memory.
            self._file = pq.ParquetFile(self.path, pre_buffer=False, buffer_size=_BUFFER_BYTES)
        except pa.ArrowInvalid as error:
            hint = "rollouts and SFT data are written by `lopd-store generate`"
            raise DataError(f"`{path}` is not a Parquet file: {error}", hint=hint) from error
        self.columns = frozenset(self._file.schema_arrow.names)
        if missing := [name for name in _REQUIRED if name not in self.columns]:
            raise DataError(
                f"`{path}` has no column {', '.join(f'`{name}`' for name in missing)}",
                expected=", ".join(SCHEMA.names),
                actual=", ".join(self._file.schema_arrow.names),
                hint="rollouts are token ids as sampled; write them with `lopd-store generate`",
            )
        for name in SCHEMA.names:
            if name in self.columns:
                _check_type(self._file.schema_arrow.field(name), f"`{path}`")
        self.record = _record(self._file.schema_arrow, self.path)

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    @cached_property
    def prompt_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each prompt; [rollouts]."""
        return self._lengths("prompt_ids")

    @cached_property
    def response_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each response; [rollouts]."""
        return self._lengths("response_ids")

    def has_logprobs(self) -> bool:
        """Whether every row carries the sampling policy's log-probs."""
        return "logprobs" in self.columns and bool((self._lengths("logprobs") == self.response_lengths).all())

    def require_tokenizer_of(self, model: ModelIdentity, role: str) -> None:
        """Raise DataError where the ids do not mean to a model what they mean to whoever sampled them, if recorded."""
        policy = model if self.record is None else self.record.policy
        if differing := [name for name in TOKENIZER_FIELDS if getattr(policy, name) != getattr(model, name)]:
            expected, actual = (f"{getattr(one, differing[0])}  ({one.name})" for one in (model, policy))
            raise DataError(
                f"`{self.path}` has ids of another tokenizer than that of {role}",
                expected=expected,
                actual=actual,
                hint="teacher and student must share one tokenizer",
            )

    def digest(self) -> str:
        """The digest of the file."""
        return digest_file(self.path).sha256

    def row_name(self, row: int) -> str:
        """How errors name a row."""
        return f"`{self.path.name}`, row {row}"

    def read(self, start: int = 0, stop: int | None = None, *, skip: Collection[int] = ()) -> list[Rollout]:
        """Rows [start, stop) in file order but for those in `skip`; reads only the row groups that hold them."""
        stop = len(self) if stop is None else min(stop, len(self))
        rows: list[Rollout] = []
        for first, table in self.tables(start=start, stop=stop):
            lower, upper = max(start - first, 0), min(stop - first, table.num_rows)
            rows += self.decode(table.slice(lower, upper - lower), first + lower, skip=skip)
        return rows

    def batches(self) -> Iterator[list[Rollout]]:
        """All rows in file order, a row group of ours at a time."""
        for first, table in self.tables():
            yield self.decode(table, first)

    def tables(
        self, names: Sequence[str] | None = None, *, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, pa.Table]]:
        """Columns of ours, some rows at a time, each time with the first row's number; all that overlap [start, stop).

        However large the row groups of the file are, a row group of ours is in memory.
        """
        names = [name for name in SCHEMA.names if name in self.columns] if names is None else list(names)
        stop = len(self) if stop is None else stop
        ends = self._group_ends
        groups = range(bisect_right(ends, start), min(bisect_left(ends, stop) + 1, len(ends)))
        if start >= stop or not groups:
            return
        first = ends[groups.start - 1] if groups.start else 0
        for batch in self._file.iter_batches(ROWS_PER_GROUP, row_groups=list(groups), columns=names):
            if first < stop and first + batch.num_rows > start:
                yield first, pa.Table.from_batches([batch])
            first += batch.num_rows
            if first >= stop:
                return

    @cached_property
    def _group_ends(self) -> list[int]:
        metadata = self._file.metadata
        return list(accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)))

    def copy(self, path: Path, record: RolloutsRecord) -> None:
        """Write the same rows, every column of theirs, with this record; appears only when it is whole."""
        schema = self._file.schema_arrow
        metadata = {**(schema.metadata or {}), METADATA_KEY: strictjson.canonical(record.to_json())}
        with _writing(path, schema.with_metadata(metadata)) as writer:
            for batch in self._file.iter_batches(ROWS_PER_GROUP):
                writer.write_batch(batch)

    def _lengths(self, column: str) -> npt.NDArray[np.int64]:
        import pyarrow.compute as pc

        lengths = [pc.list_value_length(table.column(0)).fill_null(0).to_numpy() for _, table in self.tables([column])]
        return np.concatenate(lengths).astype(np.int64) if lengths else np.zeros(0, np.int64)

    def decode(self, table: pa.Table, first_row: int, *, skip: Collection[int] = ()) -> list[Rollout]:
        """The rows of a table of this file, but for those in `skip`; raises DataError where one is malformed."""
        columns = {name: _values(table, name) for name in table.column_names}
        absent = [None] * table.num_rows
        rows = []
        for i in range(table.num_rows):
            if first_row + i in skip:
                continue
            where = self.row_name(first_row + i)
            prompt_ids = _ids(columns["prompt_ids"][i], f"{where}, `prompt_ids`")
            response_ids = _ids(columns["response_ids"][i], f"{where}, `response_ids`")
            mask = columns.get("loss_mask", absent)[i]
            logprobs = columns.get("logprobs", absent)[i]
            for name, value in (("loss_mask", mask), ("logprobs", logprobs)):
                if value is not None and len(value) != len(response_ids):
                    raise DataError(
                        f"{where}: `{name}` does not fit the response",
                        expected=f"{len(response_ids)} values, one per response token",
                        actual=f"{len(value)} values",
                    )
            if mask is not None and mask.dtype != np.bool_:  # pyarrow's form of flags and nulls
                raise DataError(f"{where}: a flag of `loss_mask` is null", expected="true or false")
            if logprobs is not None and not bool((np.asarray(logprobs) <= 0).all()):
                raise DataError(f"{where}: a log-prob is not a number <= 0", actual=f"{np.max(logprobs)}")
            rows.append(
                Rollout(
                    prompt_ids=prompt_ids,
                    response_ids=response_ids,
                    loss_mask=np.ones(len(response_ids), np.bool_) if mask is None else np.asarray(mask, np.bool_),
                    logprobs=None if logprobs is None else np.asarray(logprobs, np.float32),
                    prompt=columns.get("prompt", absent)[i],
                    response=columns.get("response", absent)[i],
                    finish_reason=columns.get("finish_reason", absent)[i],
                )
            )
        return rows


@contextmanager
def _writing(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A file that gets its name only when it is whole."""
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with pq.ParquetWriter(unfinished, schema, compression="zstd") as writer:
            yield writer
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _record(schema: pa.Schema, path: Path) -> RolloutsRecord | None:
    metadata = schema.metadata or {}
    if METADATA_KEY not in metadata:
        return None
    value = strictjson.loads(metadata[METADATA_KEY], where=f"{path}: schema metadata")
    return RolloutsRecord.from_json(value, where=path.name)


def _check_type(field: pa.Field, where: str) -> None:
    """Refuse a column that could not be read as what SCHEMA says: lists of numbers or flags, text."""
    wanted, found = SCHEMA.field(field.name).type, field.type
    if pa.types.is_large_list(wanted):
        fits = (pa.types.is_list(found) or pa.types.is_large_list(found)) and any(
            is_kind(wanted.value_type) and is_kind(found.value_type)
            for is_kind in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
        )
    else:
        fits = pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_null(found)
    if not fits:
        raise DataError(
            f"{where}: the column `{field.name}` is of another type", expected=str(wanted), actual=str(found)
        )


def _values(table: pa.Table, name: str) -> list[Any]:
    """A column as one value per row: NumPy arrays for lists, str for text, None for null."""
    column = table.column(name)
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        return list(column.to_pylist())
    return [None if row.values is None else row.values.to_numpy(zero_copy_only=False) for row in column]


def _ids(values: npt.NDArray[Any] | None, where: str) -> npt.NDArray[np.uint32]:
    if values is None or not np.issubdtype(values.dtype, np.integer):
        raise DataError(f"{where} are not token ids", actual="null" if values is None else str(values.dtype))
    if len(values) and (int(values.min()) < 0 or int(values.max()) >= 1 << 31):
        raise DataError(f"{where} are not token ids", actual=f"from {values.min()} to {values.max()}")
    return values.astype(np.uint32)
