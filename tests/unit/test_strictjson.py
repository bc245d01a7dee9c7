"""JSON from strangers: what is refused, and the two byte forms."""

from __future__ import annotations

import pytest

from lopd_store.errors import ArtifactError
from lopd_store.strictjson import MAX_DEPTH, canonical, loads, pretty


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"a": 1, "a": 2}', "the name `a` occurs twice in one object"),
        (b'[{"x": {"b": 1, "b": 1}}]', "the name `b` occurs twice"),
        (b"NaN", "`NaN` is not a JSON number"),
        (b"[Infinity]", "`Infinity` is not a JSON number"),
        (b"-Infinity", "`-Infinity` is not a JSON number"),
        (b"1e999", "`1e999` does not fit a 64-bit float"),
        (b"1" * 21, "an integer has 21 digits"),
        (b"\xff\xfe", "can't decode"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"", "Expecting value"),
        (b"{} {}", "Extra data"),
        (b"{'a': 1}", "property name"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nested more than 32 deep"),
        (b'"\\ud800"', r"`\\ud800` is half of a surrogate pair"),
        (b'{"\\uDFff": 1}', r"`\\uDFff` is half of a surrogate pair"),
        (b'"\\ud83d\\ud83d"', r"`\\ud83d` is half of a surrogate pair"),
    ],
)
def test_what_two_parsers_could_read_differently_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(ArtifactError, match=f"`name` is not valid JSON: .*{said}"):
        loads(data, where="name")


def test_too_many_bytes_are_refused_before_they_are_parsed() -> None:
    with pytest.raises(ArtifactError, match="`name` is too large to read\n  expected  at most 3 bytes\n  actual    4"):
        loads(b"1111", where="name", max_bytes=3)


def test_nesting_up_to_the_limit_is_read() -> None:
    loads(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, where="name")


def test_brackets_and_escaped_quotes_in_strings_do_not_nest() -> None:
    text = '\\"' + "[" * 100
    assert loads(f'"{text}"'.encode(), where="name") == '"' + "[" * 100


@pytest.mark.parametrize(
    ("data", "value"),
    [(b'"\\ud83d\\ude00"', "😀"), (b'"\\\\ud800"', "\\ud800"), (b'"\\u00e9"', "é"), (b'"\xf0\x9f\x98\x80"', "😀")],
)
def test_whole_characters_are_read(data: bytes, value: str) -> None:
    assert loads(data, where="name") == value


def test_the_canonical_form_is_sorted_and_without_white_space() -> None:
    assert canonical({"b": [1, 2.5], "a": "é"}) == '{"a":"é","b":[1,2.5]}'.encode()


def test_the_pretty_form_is_sorted_and_ends_with_a_newline() -> None:
    assert pretty({"b": 1, "a": []}) == b'{\n  "a": [],\n  "b": 1\n}\n'


def test_a_number_that_is_none_is_never_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical(float("nan"))
