"""`lopd-store verify`, `inspect`, `audit`, `identity` and `subset`: look at what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import lopd_store
from lopd_store import sources
from lopd_store.errors import InputError

from . import console, facts
from .lineage import show as show_lineage
from .options import (
    MODEL_HELP,
    SAMPLING,
    ArtifactArgument,
    DeviceOption,
    Dtype,
    DtypeOption,
    Json,
    ModelOption,
    OnlyOption,
    PartsOption,
    SignedByOption,
    identify_student,
    parse_parts,
)

app = typer.Typer()


@app.command()
def verify(
    artifact: ArtifactArgument,
    quick: Annotated[bool, typer.Option("--quick", help="Sizes and xxh3 only; of a URL what is listed there.")] = False,
    student: Annotated[str | None, typer.Option(metavar="MODEL", help="Also ask the gate about this student.")] = None,
    signed_by: SignedByOption = None,
    rescore: Annotated[int, typer.Option(metavar="N", min=0, help="Also score this many random rollouts again.")] = 0,
    sft_data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The SFT data: also audit it under the teacher again.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The teacher, for --rescore and --sft-data.")
    ] = None,
    json: Json = False,
) -> None:
    """Check every byte, every structure and every value of an artifact."""
    identity = identify_student(student)
    with (
        console.progress("verify", "bytes") as meter,
        console.progress("score again", "rollouts", at_once=False) as again,
        console.progress("audit", "positions", at_once=False) as audited,
    ):
        report = lopd_store.verify(
            artifact,
            quick=quick,
            student=identity,
            signed_by=signed_by,
            rescore=rescore,
            teacher=teacher,
            sft_data=sft_data,
            on_bytes=meter.update,
            on_rollouts=again.update,
            on_audited=audited.update,
        )
    if json:
        console.answer(report.to_json())
    elif report.ok:
        looked = "as it is listed there, no part read, " if sources.is_url(artifact) else "sizes and xxh3 only, "
        depth = (looked if quick else "") + ("a partial copy, " if report.partial else "")
        depth += "" if signed_by is None else f"signed by {signed_by}, "
        if report.rescored is not None:
            depth += f"{len(report.rescored.rollouts)} rollouts scored again, "
        if report.sft_audit is not None:
            depth += f"{report.sft_audit.found.positions:,} positions of SFT data audited again, "
        console.say(f"ok: {artifact}, {report.files} files, {report.bytes:,} bytes, {depth}{report.fingerprint}")
    else:
        for finding in report.findings:
            console.fail(finding.to_error())
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def inspect(
    artifact: ArtifactArgument,
    rollout: Annotated[int | None, typer.Option(metavar="I", help="Show this rollout token by token.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Whose tokenizer turns ids into text, for --rollout.")
    ] = None,
    lineage: Annotated[
        bool, typer.Option("--lineage", help="Draw the chain from the SFT teacher to an artifact or a checkpoint.")
    ] = False,
    json: Json = False,
) -> None:
    """Show what is in an artifact and where it came from."""
    if lineage:
        if rollout is not None or model is not None:
            raise InputError("`--lineage` goes with neither `--rollout` nor `--model`")
        show_lineage(Path(artifact), json=json)
        return
    if model is not None and rollout is None:
        raise InputError("`--model` goes with `--rollout`", hint=f"lopd-store inspect {artifact} --rollout 0")
    opened = lopd_store.open(artifact)
    if rollout is None:
        facts.answer(opened, json)
        return
    positions = facts.positions(opened, rollout, model)
    if json:
        console.answer({"rollout": rollout, "positions": positions})
        return
    console.table(
        [
            (p["position"], facts.shown(p), f"{p['sampled_logprob']:.3f}", "" if p["loss"] else "no", facts.top(p))
            for p in positions
        ],
        header=("position", "token", "teacher", "loss", "top-5 of the teacher"),
    )


@app.command()
def audit(
    model: ModelOption,
    data: Annotated[Path, typer.Option(metavar="FILE", help="Rollouts or SFT data, NAME.parquet.")],
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help="By default as recorded in the file.", rich_help_panel=SAMPLING)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="P", help="By default as recorded in the file.", rich_help_panel=SAMPLING)
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Use only the first rollouts.")] = None,
    positions: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Use about so many positions, spread over the file.")
    ] = None,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = None,
    json: Json = False,
) -> None:
    """Test whether responses were sampled from a model; exit code 1 if not, 3 if there is too little text to tell."""
    with console.progress("audit", "positions") as meter:
        found = lopd_store.audit(
            model=model,
            data=data,
            temperature=temperature,
            top_p=top_p,
            limit=limit,
            positions=positions,
            dtype=dtype.value,
            device=device,
            on_progress=meter.update,
        )
    if json:
        console.answer(found.to_json())
    else:
        overall, (low, high) = found.overall, found.overall.interval
        verdict = "too little to compare" if found.verdict == "too little" else found.verdict
        console.table(
            [
                ("verdict", f"{verdict} with samples of {found.model.name}"),
                ("z", f"{overall.z:.2f}  (p {overall.p_value:.2g})"),
                ("effect", f"{overall.effect:+.4f} nat per token  (95 %: {low:+.4f} to {high:+.4f})"),
                ("positions", f"{overall.positions:,}, of which {overall.outside:,} could not have been drawn"),
                ("sampling", f"temperature {found.temperature:g}, top-p {found.top_p:g}"),
            ]
        )
    raise typer.Exit({"consistent": 0, "inconsistent": 1, "too little": 3}[found.verdict])


@app.command()
def subset(
    artifact: ArtifactArgument,
    output: Annotated[Path, typer.Option(metavar="DIR", help="The copy to make.")],
    only: OnlyOption = None,
    parts: PartsOption = None,
    json: Json = False,
) -> None:
    """Copy a part of an artifact, which says that it is partial and can be verified by itself."""
    with console.progress("verify", "bytes") as meter:
        copy = lopd_store.subset(
            artifact,
            output=output,
            only=None if only is None else "sampled",
            parts=parse_parts(parts),
            on_bytes=meter.update,
        )
    facts.answer(copy, json)


@app.command()
def identity(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    other: Annotated[str | None, typer.Argument(metavar="[OTHER]", help="Say where this one differs.")] = None,
    json: Json = False,
) -> None:
    """Show the identity of a model; of two, whether they are the same (exit code 0) and where they differ (1)."""
    with console.progress("identity", "bytes") as meter:
        if other is None:
            answer = lopd_store.identify(model, on_bytes=meter.update).to_json()
        else:
            comparison = lopd_store.compare(model, other, on_bytes=meter.update)
            answer = comparison.to_json()
    if json:
        console.answer(answer)
    elif other is None:
        console.table([(name, "none" if value is None else value) for name, value in answer.items()])
    elif comparison.same:
        console.say(f"{model} and {other} are the same model")
    else:
        console.say(f"{model} and {other} differ in {', '.join(comparison.differences)}")
        console.table([(name, words) for name, all_words in comparison.differences.items() for words in all_words])
    if other is not None and not comparison.same:
        raise typer.Exit(1)
