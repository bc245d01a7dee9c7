"""Prompts in three kinds of file, with and without a chat template, and every way in which one is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lopd_store.errors import DataError, InputError
from lopd_store.prompts import read_prompts
from tests.tiny import tiny_tokenizer

CHAT = {"messages": [{"role": "user", "content": "three"}, {"role": "assistant", "content": "four"}]}
CHAT_TEXT = "<|user|>three<|end|><|assistant|>four<|end|><|assistant|>"
ROWS: list[Any] = [{"prompt": "What is the sum?", "id": 3}, CHAT]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def save(path: Path, rows: Any) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in ("prompt", "messages")}), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.parquet"])
def test_prompts_and_chats_are_read_from_every_kind_of_file(tokenizer: Any, tmp_path: Path, name: str) -> None:
    prompts = read_prompts(save(tmp_path / name, ROWS), tokenizer)
    assert [prompt.text for prompt in prompts] == ["What is the sum?", CHAT_TEXT]
    assert [tokenizer.decode(prompt.ids) for prompt in prompts] == ["What is the sum?", CHAT_TEXT]


def test_a_limit_takes_the_first_prompts(tokenizer: Any, tmp_path: Path) -> None:
    assert len(read_prompts(save(tmp_path / "p.jsonl", ROWS * 3), tokenizer, limit=4)) == 4


def test_blank_lines_are_no_prompts(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('\n{"prompt": "one"}\r\n\n  \n{"prompt": "two"}')
    assert [prompt.text for prompt in read_prompts(tmp_path / "p.jsonl", tokenizer)] == ["one", "two"]


def test_a_line_separator_inside_a_string_ends_no_line(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "one\u2028two"}\n', encoding="utf-8")
    assert [prompt.text for prompt in read_prompts(tmp_path / "p.jsonl", tokenizer)] == ["one\u2028two"]


def adds_bos(tokenizer: Any) -> Any:
    """The tokenizer with a first token of its own before every text, as Llama's has one."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
    )
    return tokenizer


def test_a_prompt_gets_the_first_token_of_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = adds_bos(tiny_tokenizer())
    (prompt,) = read_prompts(save(tmp_path / "p.jsonl", [{"prompt": "three"}]), tokenizer)
    assert prompt.ids.tolist().count(tokenizer.bos_token_id) == 1 and prompt.ids[0] == tokenizer.bos_token_id


def test_a_chat_whose_template_brings_the_first_token_has_it_once(tmp_path: Path) -> None:
    tokenizer = adds_bos(tiny_tokenizer())
    tokenizer.chat_template = "<|bos|>" + tokenizer.chat_template
    (prompt,) = read_prompts(save(tmp_path / "p.jsonl", [CHAT]), tokenizer)
    assert prompt.ids.tolist().count(tokenizer.bos_token_id) == 1


def test_a_prompt_that_brings_the_first_token_itself_is_refused(tmp_path: Path) -> None:
    tokenizer = adds_bos(tiny_tokenizer())
    path = save(tmp_path / "p.jsonl", [{"prompt": "fine"}, {"prompt": "<|bos|>three"}])
    with pytest.raises(DataError, match=r"row 1 starts with two `<\|bos\|>`"):
        read_prompts(path, tokenizer)


@pytest.mark.parametrize(
    ("row", "actual"),
    [
        ({"question": "x", "answer": "y"}, "`question`, `answer`"),
        ({"prompt": "x", "messages": CHAT["messages"]}, "`prompt`, `messages`"),
        ({"prompt": 3}, "`prompt`"),
        ({"prompt": None}, "`prompt`"),
        ({"messages": []}, "`messages`"),
        ({"messages": [{"content": "x"}]}, "`messages`"),
        ({"messages": "x"}, "`messages`"),
        ("x", "str"),
        (None, "NoneType"),
    ],
)
def test_a_row_that_is_no_prompt_is_named(tokenizer: Any, tmp_path: Path, row: Any, actual: str) -> None:
    path = save(tmp_path / "p.json", [{"prompt": "fine"}, row])
    with pytest.raises(
        DataError, match=rf"p\.json`, row 1 is not a prompt\n  expected  either .*\n  actual    {actual}$"
    ):
        read_prompts(path, tokenizer)


def test_an_empty_prompt_is_named(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 1 is empty\n  expected  at least one token"):
        read_prompts(save(tmp_path / "p.jsonl", [{"prompt": "fine"}, {"prompt": ""}]), tokenizer)


def test_a_chat_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="row 1: the model's chat template refuses the messages: roles must alternate"):
        read_prompts(save(tmp_path / "p.jsonl", [{"prompt": "fine"}, CHAT]), tokenizer)


def test_a_chat_for_a_model_without_a_template_is_named(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="row 0 has `messages`, but the model has no chat template"):
        read_prompts(save(tmp_path / "p.jsonl", [CHAT]), tokenizer)


@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
def test_a_file_without_prompts_is_refused(tokenizer: Any, tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{name}` has no prompts"):
        read_prompts(save(tmp_path / name, []), tokenizer)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("p.jsonl", b'{"prompt": "x"}\n{"prompt": \n', r"p\.jsonl, line 2` is not valid JSON"),
        ("p.jsonl", b'{"prompt": "x", "prompt": "y"}', "the name `prompt` occurs twice"),
        ("p.jsonl", b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
        ("p.jsonl", b"\xff\xfe", r"line 1` is not valid JSON"),
        ("p.json", b"[", r"p\.json` is not valid JSON"),
        ("p.json", b'{"prompt": "x"}', r"p\.json` is not a list of prompts\n  actual    dict"),
        ("p.parquet", b"PAR1 no", r"p\.parquet` is not a Parquet file"),
    ],
)
def test_a_damaged_file_is_refused(tokenizer: Any, tmp_path: Path, name: str, data: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=said):
        read_prompts(tmp_path / name, tokenizer)


def test_a_file_that_is_not_there_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no prompts at `.*/p\.jsonl`"):
        read_prompts(tmp_path / "p.jsonl", tokenizer)


def test_a_file_of_another_kind_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt\n")
    with pytest.raises(
        InputError, match=r"is not a prompts file\n  expected  \.jsonl, \.json, \.parquet\n  actual    \.csv"
    ):
        read_prompts(tmp_path / "p.csv", tokenizer)
