"""Rollouts tables that are wrong, by their bytes, their columns or their rows; the digests are honest."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lopd_store import layout
from lopd_store.table import LENGTHS
from recipes.artifact import Tree, data_of, edited, make_part, make_table, with_file

NAME = layout.part_file(0, layout.ROLLOUTS)
# Fields of Thrift's compact protocol, numbers doubled: a data page, 8 bytes unpacked, 8 bytes stored; 2 values, PLAIN.
HEADER = b"\x15\x00\x15\x10\x15\x10\x2c\x15\x04\x15\x00"
MOST = b"\xfe\xff\xff\xff\x0f"  # 2^31 - 1


def _table(change: Callable[[dict[str, Any]], object], **options: Any) -> Callable[[Tree], Tree]:
    """Other columns, changed in place, or another way to write them."""

    def break_it(tree: Tree) -> Tree:
        columns = make_table(make_part())
        change(columns)
        return with_file(tree, layout.ROLLOUTS, _parquet(pa.table(columns), **options))

    return break_it


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Tree], Tree]:
    return lambda tree: with_file(tree, layout.ROLLOUTS, change(data_of(tree, NAME)))


def _parquet(table: pa.Table, **options: Any) -> bytes:
    """As stored plainly as the format wants it, where the options do not say otherwise."""
    has_nulls = [field.name not in LENGTHS or table[at].null_count > 0 for at, field in enumerate(table.schema)]
    fields = [field.with_nullable(nullable) for field, nullable in zip(table.schema, has_nulls, strict=True)]
    sink = BytesIO()
    plainly = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(table.cast(pa.schema(fields)), sink, **plainly | options)
    return sink.getvalue()


def _same(columns: dict[str, Any]) -> None:
    """Nothing else."""


def _page(old: bytes, new: bytes) -> Callable[[Tree], Tree]:
    """Another header of the last page, that of the response lengths; what follows it is found from the end."""

    def change(data: bytes) -> bytes:
        at = data.rindex(HEADER)
        return data[:at] + HEADER.replace(old, new, 1) + data[at + len(HEADER) :]

    return _bytes(change)


def _footer(footer: bytes) -> Callable[[Tree], Tree]:
    return _bytes(lambda data: data[:400] + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def _lengths(**columns: list[int | None]) -> Callable[[Tree], Tree]:
    return _table(lambda table: table.update({name: pa.array(rows, pa.int32()) for name, rows in columns.items()}))


def _twice(columns: dict[str, Any]) -> None:
    for name, values in list(columns.items()):
        columns[name] = list(values) * 2 if isinstance(values, list) else np.tile(values, 2)


RECIPES: dict[tuple[str, str], Callable[[Tree], Tree]] = {
    ("A070", "empty"): _bytes(lambda data: b""),
    ("A070", "not_parquet"): _bytes(lambda data: b"prompt,response\n"),
    ("A070", "cut"): _bytes(lambda data: data[:-4]),
    ("A070", "footer_beyond_the_begin"): _bytes(lambda data: data[:-8] + b"\xff\xff\xff\x7fPAR1"),
    ("A070", "footer_of_zeros"): _bytes(lambda data: data[:4] + bytes(len(data) - 12) + data[-8:]),
    ("A070", "encrypted"): _bytes(lambda data: b"PARE" + data[4:-4] + b"PARE"),
    ("A070", "pages_of_zeros"): _bytes(lambda data: data[:4] + bytes(400) + data[404:]),
    ("A070", "metadata_nested_deep"): _footer(1000 * b"\x1c"),
    ("A070", "metadata_with_a_list_of_4_billion"): _footer(b"\x19\xfc\xff\xff\xff\xff\x0f"),
    ("A070", "metadata_with_a_string_of_4_gib"): _footer(b"\x18\xff\xff\xff\xff\x0f"),
    ("A070", "page_that_asks_for_2_gib"): _page(b"\x15\x10", b"\x15" + MOST),
    ("A070", "page_of_2_billion_values"): _page(b"\x15\x04", b"\x15" + MOST),
    ("A070", "page_of_no_values"): _page(b"\x15\x04", b"\x15\x00"),
    ("A070", "page_of_negative_values"): _page(b"\x15\x04", b"\x15\x03"),
    ("A070", "page_in_a_dictionary"): _page(b"\x15\x00\x15\x10", b"\x15\x04\x15\x10"),
    ("A070", "without_prompt_length"): _table(lambda table: table.pop("prompt_length")),
    ("A070", "lengths_of_64_bits"): _table(lambda table: table.update(prompt_length=[3, 1])),
    ("A070", "lengths_of_text"): _table(lambda table: table.update(prompt_length=["3", "1"])),
    ("A070", "lengths_in_lists"): _table(lambda table: table.update(prompt_length=[[3], [1]])),
    ("A070", "lengths_without_signs"): _table(lambda table: table.update(prompt_length=np.array([3, 1], np.uint32))),
    ("A070", "lengths_compressed"): _table(_same, compression="zstd"),
    ("A070", "lengths_in_a_dictionary"): _table(_same, use_dictionary=True),
    ("A070", "lengths_in_pages_of_version_2"): _table(_same, data_page_version="2.0"),
    ("A070", "lengths_that_may_be_null"): _bytes(lambda data: _nullable()),
    ("A070", "lengths_as_differences"): _table(_same, column_encoding={"prompt_length": "DELTA_BINARY_PACKED"}),
    ("A070", "column_twice"): lambda tree: with_file(tree, layout.ROLLOUTS, _column_twice()),
    ("A071", "one_row_too_few"): _table(lambda table: table.update({name: rows[:1] for name, rows in table.items()})),
    ("A071", "every_row_twice"): _table(_twice),
    ("A071", "no_rows"): _table(lambda table: table.update({name: rows[:0] for name, rows in table.items()})),
    ("A071", "another_prompt_length"): _lengths(prompt_length=[2, 1]),
    ("A071", "another_response_length"): _lengths(response_length=[4, 2]),
    ("A071", "rows_in_another_order"): _lengths(prompt_length=[1, 3], response_length=[3, 4]),
    ("A070", "lengths_that_are_null"): _lengths(prompt_length=[3, None]),
    ("A072", "no_text_though_promised"): _table(lambda table: [table.pop(name) for name in ("prompt", "response")]),
    ("A072", "only_prompts"): _table(lambda table: table.pop("response")),
    ("A072", "only_responses"): _table(lambda table: table.pop("prompt")),
    ("A072", "text_though_redacted"): lambda tree: edited(tree, "text", False),
}


def _nullable() -> bytes:
    sink = BytesIO()
    pq.write_table(pa.table(make_table(make_part())), sink, compression="none", use_dictionary=False)
    return sink.getvalue()


def _column_twice() -> bytes:
    table = pa.table(make_table(make_part()))
    return _parquet(table.append_column("prompt_length", table["prompt_length"]))
