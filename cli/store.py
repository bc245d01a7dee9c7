"""`lopd-store`: its commands, each with what belongs to it in a file of its own."""

from __future__ import annotations

from typing import Annotated

import typer

from . import checking, combine, console, export, making, record, share, sign

app = typer.Typer(
    help="Teacher log-probs as a training artifact: make it, check it, share it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(making.app)
app.add_typer(checking.app)
app.add_typer(combine.app)
app.add_typer(share.app)
app.add_typer(export.app, name="export")
app.add_typer(record.app, name="record")
app.add_typer(sign.app)


@app.callback()
def lopd_store_command(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=console.show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take the options that go before a command."""


def main() -> None:
    """The entry point of `lopd-store`."""
    console.run(app)
