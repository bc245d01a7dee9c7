"""Every error that lopd raises on purpose, in one small tree.

    LopdError
    ├── InputError          what was typed or handed over is wrong           exit 2
    ├── ArtifactError       an artifact or a file in it is wrong             exit 1
    │   └── ConsistencyError   the gate refused: another teacher, or unknown exit 1
    ├── DataError           rollouts, prompts, a model or a run are wrong    exit 1
    └── UnavailableError    could not tell: files, network, the Hub          exit 3

An error says where, what was expected, what was found, and what to type next. Errors of libraries
that we cannot improve pass through untouched.
"""

from __future__ import annotations


class LopdError(Exception):
    """Base of all errors above; `str()` of it is what the command line prints after `error`."""

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        expected: object = None,
        actual: object = None,
        hint: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.expected = expected
        self.actual = actual
        self.hint = hint
        self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        # An exception crosses process borders by its arguments; ours are keywords.
        return (_rebuild, (type(self), self.message, self.expected, self.actual, self.hint, self.code))

    def __str__(self) -> str:
        lines = [self.message]
        if self.expected is not None:
            lines.append(f"  expected  {self.expected}")
        if self.actual is not None:
            lines.append(f"  actual    {self.actual}")
        if self.hint is not None:
            lines.append(f"\nhint: {self.hint}")
        return "\n".join(lines)


def _rebuild(
    kind: type[LopdError], message: str, expected: object, actual: object, hint: str | None, code: str | None
) -> LopdError:
    return kind(message, expected=expected, actual=actual, hint=hint, code=code)


class InputError(LopdError):
    """What was typed or handed over cannot be used as it is."""

    exit_code = 2


class ArtifactError(LopdError):
    """An artifact breaks the format; `code` names the rule of spec/artifact.md."""


class ConsistencyError(ArtifactError):
    """The gate refused: the SFT teacher and the scoring teacher differ, or one is unknown."""


class DataError(LopdError):
    """Rollouts, prompts, a model or a run are wrong."""


class UnavailableError(LopdError):
    """Could not tell: a file, the network or the Hub did not answer."""

    exit_code = 3
