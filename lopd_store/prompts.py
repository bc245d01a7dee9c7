"""Prompts: JSONL, JSON or Parquet, each with `prompt` (text) or `messages` (a chat), as token ids.

A `prompt` is used as it is; `messages` go through the model's chat template, which brings its own special tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import TemplateError

from lopd_store import strictjson
from lopd_store.errors import ArtifactError, DataError, InputError

SUFFIXES = (".jsonl", ".json", ".parquet")
_MAX_FILE_BYTES = 4 << 30


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt as text (after the chat template) and as ids."""

    text: str
    ids: npt.NDArray[np.uint32]


def read_prompts(path: Path, tokenizer: Any, *, limit: int | None = None) -> list[Prompt]:
    """The prompts of a file in order, tokenised; raises with the row of the first that cannot be used."""
    rows = _rows(path)
    if limit is not None:
        rows = rows[:limit]
    if not rows:
        raise DataError(f"`{path}` has no prompts", expected="at least one row with `prompt` or `messages`")
    return [_prompt(row, tokenizer, f"`{path}`, row {number}") for number, row in enumerate(rows)]


def _rows(path: Path) -> list[Any]:
    if not path.is_file():
        raise InputError(f"no prompts at `{path}`", hint="name a .jsonl, .json or .parquet file")
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"`{path}` is not a prompts file", expected=", ".join(SUFFIXES), actual=path.suffix or "no suffix"
        )
    if path.suffix == ".parquet":
        try:
            return list(pq.read_table(path).to_pylist())
        except pa.ArrowInvalid as error:
            raise DataError(f"`{path}` is not a Parquet file: {error}") from error
    data = path.read_bytes()
    try:
        if path.suffix == ".json":
            rows = strictjson.loads(data, where=str(path), max_bytes=_MAX_FILE_BYTES)
            if not isinstance(rows, list):
                raise DataError(f"`{path}` is not a list of prompts", actual=type(rows).__name__)
            return rows
        lines = enumerate(data.splitlines(), start=1)
        return [strictjson.loads(line, where=f"{path}, line {number}") for number, line in lines if line.strip()]
    except ArtifactError as error:
        raise DataError(error.message, expected=error.expected, actual=error.actual) from error


def _prompt(row: Any, tokenizer: Any, where: str) -> Prompt:
    prompt, messages = (row.get("prompt"), row.get("messages")) if isinstance(row, Mapping) else (None, None)
    if isinstance(prompt, str) and messages is None:
        text, ids = prompt, tokenizer(prompt).input_ids
    elif _is_chat(messages) and prompt is None:
        if tokenizer.chat_template is None:
            raise DataError(f"{where} has `messages`, but the model has no chat template", hint="give `prompt` instead")
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise DataError(f"{where}: the model's chat template refuses the messages: {error}") from error
        ids = tokenizer(text, add_special_tokens=False).input_ids
    else:
        raise DataError(
            f"{where} is not a prompt",
            expected="either `prompt` (text) or `messages` (a list of {role, content})",
            actual=", ".join(f"`{name}`" for name in row) if isinstance(row, Mapping) else type(row).__name__,
        )
    if not ids:
        raise DataError(f"{where} is empty", expected="at least one token")
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        raise DataError(
            f"{where} starts with two `{tokenizer.bos_token}`",
            hint="leave the first one out of the text; the tokenizer adds it",
        )
    return Prompt(text=text, ids=np.asarray(ids, np.uint32))


def _is_chat(messages: Any) -> bool:
    return isinstance(messages, list) and bool(messages) and all(map(_is_message, messages))


def _is_message(message: Any) -> bool:
    """Templates print nothing for what is missing, so it is looked for here; a tool call has no content."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return False
    return isinstance(message.get("content"), (str, list)) or bool(message.get("tool_calls"))
