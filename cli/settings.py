"""Settings of a training run from a TOML file: flags say where, the file says what.

    learning_rate = 2e-6
    betas = [0.9, 0.98]

Every key is a setting of `TrainConfig` and has its type; flags override the file. Recipes are in the
repository's configs/.
"""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lopd_store.errors import InputError
from lopd_train import TrainConfig
from lopd_train.config import help_of

_LARGEST = 1 << 20  # bytes


def read(path: str | Path, defaults: TrainConfig) -> TrainConfig:
    """The defaults with the settings of a TOML file: a key per setting, each of its type, and no other key."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            values = tomllib.loads(file.read(_LARGEST).decode())
    except OSError as error:
        raise InputError(f"the settings `{path}` cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"the settings `{path}` are not TOML", actual=str(error)) from error
    kinds = get_type_hints(TrainConfig)
    for name, value in values.items():
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1)
            raise InputError(
                f"`{path}` has an unknown setting `{name}`",
                hint=f"did you mean `{near[0]}`?" if near else "where things lie is said on the command line",
            )
        if (typed := _typed(kinds[name], value)) is None:
            raise InputError(
                f"`{path}` gives the setting `{name}` a value of another type",
                expected=_in_words(kinds[name]),
                actual=repr(value),
                hint=help_of(name),
            )
        values[name] = typed
    return replace(defaults, **values)


def shown(kind: Any, sentence: str) -> tuple[str | None, str]:
    """How the help shows a setting of this type: what stands for its value, and what it means."""
    if get_origin(kind) is Literal:
        return "NAME", f"{sentence} ({', '.join(get_args(kind))})"
    names = {tuple: "X X", int: "N", float: "X", str: "TEXT"}
    kinds = (kind, get_origin(kind), *get_args(kind))
    return next((name for known, name in names.items() if known in kinds), None), sentence


def _typed(kind: Any, value: Any) -> Any:
    """A value of TOML as one of this type, or None where it is none; which values make sense is for `TrainConfig`."""
    choices = [choice for choice in get_args(kind) if choice is not type(None)]
    if get_origin(kind) is Literal:
        return value if isinstance(value, str) else None
    if get_origin(kind) is tuple:
        if not isinstance(value, list) or len(value) != len(choices):
            return None
        items = tuple(map(_typed, choices, value))
        return None if None in items else items
    if choices:  # an optional setting
        return _typed(choices[0], value)
    if kind is float and type(value) is int and abs(value) < 1 << 53:
        return float(value)
    return value if type(value) is kind else None


def _in_words(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"a list of {len(get_args(kind))} numbers"
    names = {int: "a whole number", float: "a number", bool: "true or false"}
    return next((words for known, words in names.items() if known in (kind, *get_args(kind))), "a string")
