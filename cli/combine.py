"""`lopd-store combine`: one artifact of several teachers, each with a domain of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lopd_store.combining import combine as combine_artifacts

from . import console, facts
from .options import Json, split_domain

app = typer.Typer()


@app.command()
def combine(
    artifacts: Annotated[
        list[str],
        typer.Argument(metavar="[DOMAIN=]DIR...", help="Artifacts; those built without `--domain` are named here."),
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The artifact to make.")],
    json: Json = False,
) -> None:
    """Make one artifact of several, each with the teacher of its domain; nothing is scored again."""
    named = [(domain, path) if domain is not None else path for domain, path in map(split_domain, artifacts)]
    with console.progress("verify", "bytes") as meter:
        combined = combine_artifacts(*named, output=output, on_bytes=meter.update)
    facts.answer(combined, json)
