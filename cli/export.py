"""`lopd-store export`: trl, lightning-opd, distillkit, axolotl. Write an artifact as another trainer's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import lopd_store
from lopd_store.interop.target import Format

from . import console
from .options import AllowInconsistentOption, AllowUnknownOption, Json, OnBadRollout, identify_student, overrides

app = typer.Typer(
    help="Write an artifact in the format of another trainer, behind the same gate as training.",
    no_args_is_help=True,
)

ArtifactArgument = Annotated[str, typer.Argument(metavar="DIR", help="The artifact's directory.")]
FileOption = Annotated[Path, typer.Option("--output", metavar="FILE", help="The file to make, NAME.parquet.")]
DirectoryOption = Annotated[Path, typer.Option("--output", metavar="DIR", help="The directory to make.")]
KOption = Annotated[
    int | None,
    typer.Option("--k", metavar="N", min=1, help="Entries of every row; by default as many as any position can have."),
]
StudentOption = Annotated[
    str | None, typer.Option(metavar="MODEL", help="The model to be trained: ask the gate about it, too.")
]


@app.command()
def trl(
    artifact: ArtifactArgument,
    output: FileOption,
    student: StudentOption = None,
    allow_unknown_sft_teacher: AllowUnknownOption = False,
    allow_inconsistent_teacher: AllowInconsistentOption = False,
    json: Json = False,
) -> None:
    """Ids, log-probs and the ragged top-k as a plain Parquet table, for TRL or a loop of your own."""
    allowed = overrides(allow_unknown_sft_teacher, allow_inconsistent_teacher)
    _export("trl", artifact, output, student, allowed, json)


@app.command("lightning-opd")
def lightning_opd(
    artifact: ArtifactArgument,
    output: FileOption,
    tokenizer: Annotated[
        str, typer.Option(metavar="MODEL", help="A model with the artifact's tokenizer, for the prompts as text.")
    ],
    on_bad_rollout: Annotated[
        OnBadRollout, typer.Option(metavar="fail|skip", help="A prompt that text does not hold: stop, or leave it out.")
    ] = OnBadRollout.fail,
    student: StudentOption = None,
    allow_unknown_sft_teacher: AllowUnknownOption = False,
    allow_inconsistent_teacher: AllowInconsistentOption = False,
    json: Json = False,
) -> None:
    """Lightning-OPD's Parquet, which slime reads: prompts as text, and the sampled tokens' log-probs."""
    allowed = overrides(allow_unknown_sft_teacher, allow_inconsistent_teacher)
    options = {"tokenizer": tokenizer, "on_bad_rollout": on_bad_rollout.value}
    _export("lightning-opd", artifact, output, student, allowed, json, **options)


@app.command()
def distillkit(
    artifact: ArtifactArgument,
    output: DirectoryOption,
    k: KOption = None,
    student: StudentOption = None,
    allow_unknown_sft_teacher: AllowUnknownOption = False,
    allow_inconsistent_teacher: AllowInconsistentOption = False,
    json: Json = False,
) -> None:
    """DistillKit's compressed distributions, in a configuration that loses nothing, and the YAML that decodes them."""
    allowed = overrides(allow_unknown_sft_teacher, allow_inconsistent_teacher)
    _export("distillkit", artifact, output, student, allowed, json, k=k)


@app.command()
def axolotl(
    artifact: ArtifactArgument,
    output: FileOption,
    k: KOption = None,
    student: StudentOption = None,
    allow_unknown_sft_teacher: AllowUnknownOption = False,
    allow_inconsistent_teacher: AllowInconsistentOption = False,
    json: Json = False,
) -> None:
    """Axolotl's prepared rows for knowledge distillation, for `skip_prepare_dataset: true`."""
    allowed = overrides(allow_unknown_sft_teacher, allow_inconsistent_teacher)
    _export("axolotl", artifact, output, student, allowed, json, k=k)


def _export(
    format: Format, artifact: str, output: Path, student: str | None, allowed: list[str], json: bool, **options: Any
) -> None:
    identity = identify_student(student)
    with (
        console.progress("verify", "bytes", at_once=False) as verified,
        console.progress("export", "positions", at_once=False) as written,
    ):
        exported = lopd_store.export(
            artifact,
            format,
            output=output,
            student=identity,
            overrides=allowed,
            on_bytes=verified.update,
            on_positions=written.update,
            **options,
        )
    for note in exported.notes:
        console.warn(note)
    if exported.left_out:
        console.note(f"note: rollouts left out: {exported.left_out:,}")
    if json:
        console.answer(exported.to_json())
        return
    counts = f"{exported.rollouts:,} rollouts, {exported.positions:,} positions, {exported.bytes:,} bytes"
    forced = "".join(f", --{name}" for name in exported.record["overrides"])
    console.say(f"{output}: {counts}; {exported.record['verdict']}{forced}, {exported.record['fingerprint']}")
