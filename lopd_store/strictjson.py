"""JSON from strangers, read strictly: UTF-8, no duplicate names, no NaN, bounded size and depth."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any, NoReturn

from lopd_store.errors import ArtifactError

MAX_BYTES = 64 << 20
MAX_DEPTH = 32
_MAX_INTEGER_DIGITS = 20
# A bracket, or a string, which may hold brackets; one that does not end goes on to the end of the text.
_BRACKETS = re.compile(r'[\[\]{}]|"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_DEEPER = {"[": 1, "{": 1, "]": -1, "}": -1}
# One escape of JSON; the group is there where it is half of a surrogate pair without the other half.
_ESCAPE = re.compile(r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F])|.)", re.DOTALL)


def loads(data: bytes, *, where: str, max_bytes: int = MAX_BYTES) -> Any:
    """Parse JSON bytes, refusing whatever two parsers could read differently. `where` names the source in errors."""
    if len(data) > max_bytes:
        raise ArtifactError(
            f"`{where}` is too large to read", expected=f"at most {max_bytes} bytes", actual=f"{len(data)} bytes"
        )
    try:
        text = data.decode("utf-8")
        _check_depth(text)
        _check_escapes(text)
        return json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_bounded_int, parse_float=_finite
        )
    except (UnicodeDecodeError, json.JSONDecodeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"`{where}` is not valid JSON: {error}") from error


def members(value: Any, names: Collection[str], *, where: str, open_ended: bool = False) -> dict[str, Any]:
    """The named members of an object, all of them; raises ArtifactError where one lacks.

    Others are refused too, but where it is `open_ended`, as in what a later version wrote, they are left out.
    """
    if not isinstance(value, dict):
        raise ArtifactError(f"`{where}` is not an object", actual=type(value).__name__)
    if missing := sorted(set(names) - set(value)):
        raise ArtifactError(f"`{where}` lacks {', '.join(f'`{name}`' for name in missing)}")
    if not open_ended and (unknown := sorted(set(value) - set(names))):
        raise ArtifactError(
            f"`{where}` has unknown members: {', '.join(f'`{name[:50]}`' for name in unknown[:10])}",
            hint="free-form data belongs in `annotations`",
        )
    return {name: value[name] for name in names}


def canonical(value: Any) -> bytes:
    """The one byte form of a JSON value that digests are taken over: sorted names, no white space."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def pretty(value: Any) -> bytes:
    """The form in which we store JSON that people read: sorted names, two spaces, a final newline."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name `{twice}` occurs twice in one object")
    return members


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"`{name}` is not a JSON number")


def _bounded_int(digits: str) -> int:
    if len(digits) > _MAX_INTEGER_DIGITS:
        raise ValueError(f"an integer has {len(digits)} digits, at most {_MAX_INTEGER_DIGITS} are read")
    return int(digits)


def _finite(literal: str) -> float:
    number = float(literal)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"`{literal}` does not fit a 64-bit float")
    return number


def _check_depth(text: str) -> None:
    """Refuse deep nesting before the recursive parser sees it; brackets inside strings do not count."""
    depth = 0
    for match in _BRACKETS.finditer(text):
        depth += _DEEPER.get(match[0], 0)
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")


def _check_escapes(text: str) -> None:
    """Refuse half a surrogate pair: it is no character, and no UTF-8 can be written of it."""
    if lone := next((escape for escape in _ESCAPE.finditer(text) if escape[1]), None):
        raise ValueError(f"`{text[lone.start() : lone.start() + 6]}` is half of a surrogate pair")
