"""`lopd-store sign` and `lopd-store key`: vouch for an artifact, with a key pair."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lopd_store import signatures

from . import console
from .options import Json

app = typer.Typer()


@app.command()
def sign(
    artifact: Annotated[Path, typer.Argument(metavar="DIR", help="The artifact's directory.")],
    key: Annotated[
        Path, typer.Option(metavar="KEY", help="An Ed25519 private key, as `lopd-store key` or ssh-keygen makes it.")
    ],
    json: Json = False,
) -> None:
    """Sign the fingerprint of an artifact, for `verify --signed-by`."""
    made = signatures.sign(artifact, key=key)
    if json:
        console.answer(made.to_json())
    else:
        console.say(f"signed: {artifact}, {made.fingerprint}\nby {made.public_key}")


@app.command()
def key(
    name: Annotated[Path, typer.Argument(metavar="NAME", help="The private key to make; NAME.pub is to be shared.")],
    json: Json = False,
) -> None:
    """Make a key pair for signing; nothing is overwritten."""
    public_key = signatures.make_key(name)
    if json:
        console.answer({"private_key_file": str(name), "public_key_file": f"{name}.pub", "public_key": public_key})
    else:
        console.say(
            f"{name}: the private key, to be kept secret\n{name}.pub: the public key, to be shared\n{public_key}"
        )
