"""What an error says, and that it says it in another process too."""

from __future__ import annotations

import pickle

import pytest

from lopd_store.errors import ArtifactError, ConsistencyError, DataError, InputError, LopdError, UnavailableError


def test_an_error_says_where_expected_actual_and_what_to_type_next() -> None:
    error = ArtifactError("`file` differs", expected="this", actual="that", hint="do that")
    assert str(error) == "`file` differs\n  expected  this\n  actual    that\n\nhint: do that"


def test_an_error_without_details_is_one_line() -> None:
    assert str(InputError("no such thing")) == "no such thing"


def test_an_expected_value_of_zero_is_shown() -> None:
    assert str(DataError("wrong", expected=0, actual=0)) == "wrong\n  expected  0\n  actual    0"


@pytest.mark.parametrize(
    ("kind", "code"),
    [(InputError, 2), (ArtifactError, 1), (ConsistencyError, 1), (DataError, 1), (UnavailableError, 3)],
)
def test_every_error_has_its_exit_code(kind: type[LopdError], code: int) -> None:
    assert kind("x").exit_code == code


def test_an_error_of_a_worker_arrives_whole() -> None:
    error = DataError("wrong", expected="this", actual=3, hint="do that", code="A001")
    arrived = pickle.loads(pickle.dumps(error))  # noqa: S301 - what multiprocessing does
    assert type(arrived) is DataError
    assert vars(arrived) == vars(error) and str(arrived) == str(error)
