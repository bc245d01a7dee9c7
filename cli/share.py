"""`lopd-store push`, `pull`, `list` and `search`: the Hub, and object stores for `pull`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import lopd_store
from lopd_store.catalog import Found

from . import console, facts
from .options import Json, OnlyOption, PartsOption, SignedByOption, parse_parts

app = typer.Typer()

LimitOption = Annotated[int, typer.Option(metavar="N", min=1, help="Show at most so many.")]
_MODEL_HELP = "A model, or the digest of its {}, sha256:…"


@app.command()
def push(
    artifact: Annotated[Path, typer.Argument(metavar="DIR", help="The artifact's directory.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="A dataset repository on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    json: Json = False,
) -> None:
    """Verify an artifact and push it to a dataset repository on the Hub; run again, it goes on where it was."""
    with console.progress("push", "bytes") as sent:
        pushed = lopd_store.push(
            artifact,
            repository,
            private=private,
            create_pr=create_pr,
            on_bytes=sent.beside("verify").update,
            on_upload=sent.update,
        )
    if json:
        console.answer(vars(pushed))
    else:
        console.say(f"{pushed.url}\n{pushed.fingerprint}")


@app.command()
def pull(
    place: Annotated[
        str,
        typer.Argument(
            metavar="OWNER/NAME", help="A dataset repository on the Hub, with @REV or not; a URL; or a fingerprint."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The directory to make; by default it goes into the cache.")
    ] = None,
    fingerprint: Annotated[
        str | None, typer.Option(metavar="SHA256", help="Accept this artifact and no other.")
    ] = None,
    revision: Annotated[str | None, typer.Option(metavar="REV", help="A tag, branch or commit.")] = None,
    only: OnlyOption = None,
    parts: PartsOption = None,
    signed_by: SignedByOption = None,
    json: Json = False,
) -> None:
    """Download an artifact, or a part of one, every byte of it compared; run again, it goes on where it was."""
    with console.progress("pull", "bytes", at_once=False) as come:
        artifact = lopd_store.pull(
            place,
            output=output,
            fingerprint=fingerprint,
            revision=revision,
            only=None if only is None else "sampled",
            parts=parse_parts(parts),
            signed_by=signed_by,
            on_download=come.update,
            on_bytes=come.beside("verify").update,
        )
    facts.answer(artifact, json)


@app.command("list")
def list_artifacts(
    owner: Annotated[str, typer.Argument(metavar="OWNER", help="A user or an organisation of the Hub.")],
    limit: LimitOption = 50,
    json: Json = False,
) -> None:
    """List the artifacts that an owner has on the Hub."""
    _answer(lopd_store.search(owner=owner, limit=limit), json)


@app.command()
def search(
    teacher: Annotated[str | None, typer.Option(metavar="MODEL", help=_MODEL_HELP.format("weights"))] = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="MODEL", help=_MODEL_HELP.format("tokenizer"))] = None,
    owner: Annotated[str | None, typer.Option(metavar="OWNER", help="Only of this user or organisation.")] = None,
    limit: LimitOption = 50,
    json: Json = False,
) -> None:
    """Find artifacts on the Hub whose teacher, or tokenizer, is this one."""
    _answer(lopd_store.search(owner=owner, teacher=teacher, tokenizer=tokenizer, limit=limit), json)


def _answer(found: list[Found], json: bool) -> None:
    if json:
        console.answer([one.to_json() for one in found])
        return
    for one in found:
        if one.problem is not None:
            console.note(f"note: {one.repository}: {one.problem}")
    rows = [one.to_json() for one in found if one.artifact is not None]
    if not rows:
        console.note("nothing found")
        return
    console.table(
        [
            (row["url"], ", ".join(one["name"] for one in row["teachers"]), f"{row['positions']:,}", row["consistency"])
            for row in rows
        ],
        header=("artifact", "teacher", "positions", "consistency"),
    )
