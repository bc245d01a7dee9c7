"""`lopd-store record`: sft-data, rollouts, checkpoint. Declares what other tools sampled or fine-tuned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lopd_store.declare import declare_checkpoint, declare_rollouts
from lopd_store.identity import ModelIdentity

from . import console
from .options import Json, parse_domains

app = typer.Typer(
    help="Declare who sampled or fine-tuned what our tools did not make; it stays marked as declared.",
    no_args_is_help=True,
)

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="Rollouts with token ids, NAME.parquet.")]
OutputOption = Annotated[Path, typer.Option(metavar="FILE", help="The same rollouts with the record, NAME.parquet.")]
TemperatureOption = Annotated[
    float | None, typer.Option(metavar="T", help="At which it was sampled, where that is known; 0 is greedy.")
]
TopPOption = Annotated[
    float | None, typer.Option(metavar="P", help="Mass that it was drawn from, where that is known.")
]
PromptsOption = Annotated[Path | None, typer.Option(metavar="FILE", help="The prompts, where they are a file.")]


@app.command("sft-data")
def sft_data(
    file: FileArgument,
    teacher: Annotated[str, typer.Option(metavar="MODEL", help="The model that wrote the responses.")],
    output: OutputOption,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    prompts: PromptsOption = None,
    json: Json = False,
) -> None:
    """Declare which teacher wrote SFT data."""
    _declare(file, teacher, output, temperature, top_p, prompts, json)


@app.command()
def rollouts(
    file: FileArgument,
    policy: Annotated[str, typer.Option(metavar="MODEL", help="The reference policy that sampled the responses.")],
    output: OutputOption,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    prompts: PromptsOption = None,
    json: Json = False,
) -> None:
    """Declare which reference policy sampled rollouts; the record beside it goes along."""
    _declare(file, policy, output, temperature, top_p, prompts, json)


@app.command()
def checkpoint(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The checkpoint; its record is written into it.")],
    base: Annotated[str, typer.Option(metavar="MODEL", help="The model that the fine-tuning started from.")],
    sft_data: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="What it was tuned on, its record read; once per domain as DOMAIN=FILE."),
    ] = None,
    sft_teacher: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help="The teacher, where the data does not name it; also DOMAIN=MODEL."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the record that is there.")] = False,
    json: Json = False,
) -> None:
    """Declare what a checkpoint was fine-tuned from, and which teacher wrote its SFT data."""
    with console.progress("identity", "bytes") as meter:
        record = declare_checkpoint(
            directory,
            base=base,
            sft_data=parse_domains(sft_data, "--sft-data") if sft_data else None,
            sft_teacher=parse_domains(sft_teacher, "--sft-teacher") if sft_teacher else None,
            force=force,
            on_bytes=meter.update,
        )
    if json:
        console.answer({"checkpoint": str(directory), "record": record.to_json()})
        return
    teachers = [
        ("" if one.domain is None else f"{one.domain}: ") + _model(one.teacher) for one in record.sft if one.teacher
    ]
    console.say(f"{directory}: declared, tuned from {_model(record.base)}, SFT teacher {', '.join(teachers)}")


def _declare(
    file: Path,
    policy: str,
    output: Path,
    temperature: float | None,
    top_p: float | None,
    prompts: Path | None,
    json: bool,
) -> None:
    with console.progress("identity", "bytes") as meter:
        record = declare_rollouts(
            file,
            policy=policy,
            output=output,
            temperature=temperature,
            top_p=top_p,
            prompts=prompts,
            on_bytes=meter.update,
        )
    if json:
        console.answer({"output": str(output), "record": record.to_json()})
    else:
        console.say(f"{output}: declared, sampled by {_model(record.policy)}")


def _model(identity: ModelIdentity) -> str:
    return f"{identity.name} (weights {identity.weights[7:19]}…)"
