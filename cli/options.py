"""Options and arguments that several commands of `lopd-store` share, so that one thing has one name and one help."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import lopd_store
from lopd_store import gate
from lopd_store.errors import InputError
from lopd_store.identity import ModelIdentity

from . import console


class Dtype(StrEnum):
    """Precision in which a model runs."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class OnBadRollout(StrEnum):
    """What to do with a rollout that cannot be used."""

    fail = "fail"
    skip = "skip"


class Only(StrEnum):
    """Views that can be asked for by name."""

    sampled = "sampled"


def choices(kind: type[StrEnum]) -> str:
    return ", ".join(kind)


SAMPLING, STORED, RUNNING = "Sampling", "What is stored", "How it runs"  # headings in the help

Json = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]
MODEL_HELP = "A directory of safetensors, a GGUF file, a PEFT adapter, or a Hub id."
ModelOption = Annotated[str, typer.Option(metavar="MODEL", help=MODEL_HELP)]
ArtifactArgument = Annotated[
    str, typer.Argument(metavar="DIR", help="The artifact's directory, or its URL: hf://OWNER/NAME@TAG, s3://…")
]
DtypeOption = Annotated[Dtype, typer.Option(metavar="DTYPE", help=choices(Dtype), rich_help_panel=RUNNING)]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="cpu, cuda, or auto: several GPUs; by default cuda where there is one.",
        rich_help_panel=RUNNING,
    ),
]
SignedByOption = Annotated[
    str | None, typer.Option(metavar="KEY", help="Only if this public key, or the one in this file, has signed it.")
]
OnlyOption = Annotated[
    Only | None, typer.Option(metavar="VIEW", help="`sampled`: token files alone, enough for that objective.")
]
AllowUnknownOption = Annotated[
    bool, typer.Option(f"--{gate.ALLOW_UNKNOWN}", help="Go on though a provenance is not known.")
]
AllowInconsistentOption = Annotated[
    bool, typer.Option(f"--{gate.ALLOW_INCONSISTENT}", help="Go on though the gradient is biased.")
]
PartsOption = Annotated[str | None, typer.Option(metavar="A:B", help="Parts A to B - 1, counted from 0.")]


def overrides(allow_unknown: bool, allow_inconsistent: bool) -> list[str]:
    """The names of the overrides that were given."""
    allowed = {gate.ALLOW_UNKNOWN: allow_unknown, gate.ALLOW_INCONSISTENT: allow_inconsistent}
    return [name for name, allow in allowed.items() if allow]


def identify_student(student: str | None) -> ModelIdentity | None:
    """The identity of the model that `--student` names, where it names one."""
    if student is None:
        return None
    with console.progress("identity", "bytes") as meter:
        return lopd_store.identify(student, on_bytes=meter.update)


def parse_domains(texts: Sequence[str], option: str) -> str | dict[str, str]:
    """The values of an option that is said once, or once per domain as `DOMAIN=VALUE`."""
    named: dict[str, str] = {}
    for text in texts:
        domain, value = split_domain(text)
        if domain is None and len(texts) == 1:
            return value
        if domain is None or domain in named:
            raise InputError(
                f"`{option} {text}` {'needs a domain' if domain is None else 'names a domain twice'}",
                expected=f"{option} DOMAIN=VALUE, once per domain",
            )
        named[domain] = value
    return named


def split_domain(text: str) -> tuple[str | None, str]:
    """The domain and the value of `DOMAIN=VALUE`; what exists under the whole name is a path, `./a=b` another."""
    domain, sign, value = text.partition("=")
    if not sign or "/" in domain or Path(text).exists():
        return None, text
    return domain, value


def parse_parts(text: str | None) -> range | None:
    """The range of `--parts A:B`."""
    if text is None:
        return None
    start, colon, stop = text.partition(":")
    if not (colon and start.isdecimal() and stop.isdecimal()):
        raise InputError(f"`--parts {text}` is not a range of parts", expected="A:B, for example 0:4")
    return range(int(start), int(stop))
