"""`lopd-store`: generate, build, verify, inspect, push, pull, identity."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import lopd_store
from lopd_store import gate
from lopd_store.errors import InputError
from lopd_store.reader import Artifact

from . import console

app = typer.Typer(
    help="Teacher log-probs as a training artifact: make it, check it, share it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Dtype(StrEnum):
    """Precision in which a model runs."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Engine(StrEnum):
    """What runs the teacher."""

    transformers = "transformers"


Json = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]
ModelOption = Annotated[str, typer.Option(help="A directory of safetensors, a GGUF file, or a Hub id.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")]


@app.command()
def generate(
    model: ModelOption,
    prompts: Annotated[Path, typer.Option(help="JSONL, JSON or Parquet with `prompt` or `messages`.")],
    output: Annotated[Path, typer.Option(help="The rollouts file to write, NAME.parquet.")],
    n: Annotated[int, typer.Option("--n", help="Responses per prompt.")] = 1,
    temperature: Annotated[float, typer.Option(help="1 samples from the model itself; 0 is greedy.")] = 1.0,
    top_p: float = 1.0,
    max_response_tokens: int = 512,
    limit: Annotated[int | None, typer.Option(help="Use only the first prompts.")] = None,
    batch_size: int = 16,
    seed: int = 0,
    dtype: Dtype = Dtype.float32,
    device: DeviceOption = None,
    json: Json = False,
) -> None:
    """Sample responses: SFT data with the teacher, rollouts with the student."""
    with console.progress("generate", "tokens") as meter:
        result = lopd_store.generate(
            model=model,
            prompts=prompts,
            output=output,
            temperature=temperature,
            top_p=top_p,
            max_response_tokens=max_response_tokens,
            samples_per_prompt=n,
            seed=seed,
            batch_size=batch_size,
            limit=limit,
            dtype=dtype.value,
            device=device,
            on_progress=lambda done, total, tokens: meter.update(
                tokens, None if not done else tokens / done * total, f"{done} of {total} responses"
            ),
        )
    if json:
        console.answer({**vars(result), "output": str(result.output)})
        return
    console.say(
        f"{result.output}: {result.rollouts:,} rollouts, {result.tokens:,} response tokens, "
        f"{result.stopped:,} ended with a stop token"
    )


@app.command()
def build(
    teacher: ModelOption,
    rollouts: Annotated[Path, typer.Option(help="Rollouts of the reference policy, NAME.parquet.")],
    output: Annotated[Path, typer.Option(help="The artifact to make, a directory.")],
    sft: Annotated[
        Path | None, typer.Option(help="SFT data, checkpoint or record, where the rollouts do not carry it.")
    ] = None,
    k_max: Annotated[int, typer.Option(help="At most this many ids per position.")] = 64,
    k_min: Annotated[int, typer.Option(help="At least this many.")] = 1,
    coverage: Annotated[float, typer.Option(help="Stop once this much mass is stored; 1 keeps k_max.")] = 0.99,
    exact: Annotated[bool, typer.Option("--exact", help="Keep float32 log-probs, unrounded.")] = False,
    engine: Engine = Engine.transformers,
    dtype: Dtype = Dtype.float32,
    device: DeviceOption = None,
    workers: Annotated[int | None, typer.Option(help="Processes; by default one per processor.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads of each worker.")] = 1,
    batch_tokens: Annotated[int, typer.Option(help="Tokens per forward pass, padding included.")] = 4096,
    part_positions: Annotated[int | None, typer.Option(help="Positions per part; by default up to 2^20.")] = None,
    json: Json = False,
) -> None:
    """Score rollouts with the teacher and seal the result as an artifact."""
    with console.progress("build", "positions") as meter:
        artifact = lopd_store.build(
            teacher=teacher,
            rollouts=rollouts,
            output=output,
            sft=sft,
            exact=exact,
            k_min=k_min,
            k_max=k_max,
            coverage=coverage,
            engine=engine.value,
            dtype=dtype.value,
            device=device,
            workers=workers,
            threads=threads,
            batch_tokens=batch_tokens,
            part_positions=part_positions,
            on_progress=meter.update,
        )
    facts = _facts(artifact)
    if json:
        console.answer(facts)
        return
    _say_facts(facts)
    if facts["consistency"] != "consistent":
        finding = gate.judge(artifact.manifest.inputs).findings[0]
        console.note(f"note: training will refuse this artifact: {finding.reason}")


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(help="The artifact's directory.")],
    quick: Annotated[bool, typer.Option("--quick", help="Sizes and xxh3 only.")] = False,
    student: Annotated[str | None, typer.Option(help="Also ask the gate about this student.")] = None,
    json: Json = False,
) -> None:
    """Check every byte, every structure and every value of an artifact."""
    identity = None if student is None else lopd_store.identify(student)
    with console.progress("verify", "bytes") as meter:
        report = lopd_store.verify(artifact, quick=quick, student=identity, on_bytes=meter.update)
    if json:
        console.answer(report.to_json())
    elif report.ok:
        console.say(f"ok: {artifact}, {report.files} files, {report.bytes:,} bytes, {report.fingerprint}")
    else:
        for finding in report.findings:
            console.fail(finding.to_error())
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def inspect(
    artifact: Annotated[Path, typer.Argument(help="The artifact's directory.")],
    rollout: Annotated[int | None, typer.Option(help="Show this rollout token by token.")] = None,
    model: Annotated[str | None, typer.Option(help="Whose tokenizer turns ids into text, for --rollout.")] = None,
    json: Json = False,
) -> None:
    """Show what is in an artifact and where it came from."""
    opened = lopd_store.open(artifact)
    if rollout is None:
        facts = _facts(opened)
        if json:
            console.answer(facts)
        else:
            _say_facts(facts)
        return
    positions = _positions(opened, rollout, model)
    if json:
        console.answer({"rollout": rollout, "positions": positions})
        return
    console.table(
        [
            (p["position"], _shown(p["token"]), f"{p['sampled_logprob']:.3f}", "" if p["loss"] else "no", _top(p))
            for p in positions
        ],
        header=("position", "token", "teacher", "loss", "top-5 of the teacher"),
    )


@app.command()
def push(
    artifact: Annotated[Path, typer.Argument(help="The artifact's directory.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    json: Json = False,
) -> None:
    """Verify an artifact and push it to a dataset repository on the Hub."""
    with console.progress("verify", "bytes") as meter:
        pushed = lopd_store.push(artifact, repository, private=private, on_bytes=meter.update)
    if json:
        console.answer(vars(pushed))
    else:
        console.say(f"{pushed.url} at {pushed.tag}\n{pushed.fingerprint}")


@app.command()
def pull(
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME")],
    output: Annotated[Path, typer.Option(help="The directory to make.")],
    fingerprint: Annotated[str | None, typer.Option(help="Accept this artifact and no other.")] = None,
    revision: Annotated[str | None, typer.Option(help="A tag, branch or commit.")] = None,
    json: Json = False,
) -> None:
    """Download an artifact from the Hub and verify it."""
    with console.progress("verify", "bytes") as meter:
        artifact = lopd_store.pull(
            repository, output=output, fingerprint=fingerprint, revision=revision, on_bytes=meter.update
        )
    facts = _facts(artifact)
    if json:
        console.answer(facts)
    else:
        _say_facts(facts)


@app.command()
def identity(
    model: Annotated[str, typer.Argument(help="A directory of safetensors, a GGUF file, or a Hub id.")],
    json: Json = False,
) -> None:
    """Print the digests that say which model this is."""
    facts = lopd_store.identify(model).to_json()
    if json:
        console.answer(facts)
    else:
        console.table([(name, "none" if value is None else value) for name, value in facts.items()])


def _facts(artifact: Artifact) -> dict[str, Any]:
    """What `inspect --json` answers."""
    manifest = artifact.manifest
    inputs, counts = manifest.inputs, manifest.counts
    size = sum(file.size for part in manifest.parts for file in part.files.values())
    return {
        "path": str(artifact.path),
        "fingerprint": artifact.fingerprint,
        "version": manifest.version,
        "counts": counts.to_json(),
        "parts": len(manifest.parts),
        "bytes": size,
        "bytes_per_position": round(size / max(counts.positions, 1), 2),
        "mean_k": round(counts.entries / max(counts.positions, 1), 2),
        "encoding": manifest.encoding.to_json(),
        "reference_logprobs": manifest.reference_logprobs,
        "teacher": inputs.teacher.to_json(),
        "scoring": inputs.scoring.to_json(),
        "sft": inputs.sft.to_json(),
        "rollouts": None if inputs.rollouts is None else inputs.rollouts.to_json(),
        "consistency": gate.judge(inputs).state,
    }


def _say_facts(facts: dict[str, Any]) -> None:
    counts, selection = facts["counts"], facts["encoding"]["selection"]
    sft, rollouts = facts["sft"], facts["rollouts"]
    console.table(
        [
            ("artifact", facts["path"]),
            ("fingerprint", facts["fingerprint"]),
            ("format", f"lopd {facts['version']}, {facts['encoding']['profile']}"),
            ("rollouts", f"{counts['rollouts']:,} in {facts['parts']} parts"),
            ("positions", f"{counts['positions']:,} of {counts['tokens']:,} tokens"),
            ("top-k", f"mean k {facts['mean_k']}; at most {selection['k_max']}, coverage {selection['coverage']:g}"),
            ("size", f"{facts['bytes']:,} bytes, {facts['bytes_per_position']} per position"),
            ("teacher", _model(facts["teacher"])),
            ("SFT teacher", f"{_model(sft['teacher']) if sft['teacher'] else 'unknown'} ({sft['status']})"),
            ("reference policy", _model(rollouts["policy"]) if rollouts else "unknown"),
            ("consistency", facts["consistency"]),
        ]
    )


def _model(identity: dict[str, Any]) -> str:
    revision = f" @ {identity['revision'][:12]}" if identity["revision"] else ""
    return f"{identity['name']}{revision}  weights {identity['weights'][7:19]}…"


def _positions(artifact: Artifact, rollout: int, model: str | None) -> list[dict[str, Any]]:
    """Each position of a rollout with the teacher's log-prob and its five most likely ids."""
    decode = _decoder(artifact, model)
    stored = artifact.rollout(rollout)
    topk = stored.topk
    offsets = None if topk is None else topk.offsets
    positions = []
    for position, token in enumerate(stored.response_ids.tolist()):
        top = []
        if topk is not None and offsets is not None:
            entries = slice(int(offsets[position]), int(offsets[position + 1]))
            top = list(zip(topk.ids[entries].tolist()[:5], topk.logprobs[entries].tolist()[:5], strict=True))
        positions.append(
            {
                "position": position,
                "id": token,
                "token": decode(token),
                "loss": bool(stored.loss_mask[position]),
                "sampled_logprob": float(stored.sampled_logprobs[position]),
                "top": [{"id": id, "token": decode(id), "logprob": logprob} for id, logprob in top],
            }
        )
    return positions


def _decoder(artifact: Artifact, model: str | None) -> Any:
    """Turns an id into text with the tokenizer of `model`, which must be the artifact's; without one, into `#id`."""
    if model is None:
        return lambda id: f"#{id}"
    from lopd_store import models
    from lopd_store.identity import tokenizer_digest

    tokenizer = models.load_tokenizer(models.find(model))
    wanted = artifact.manifest.inputs.teacher.tokenizer
    if (found := tokenizer_digest(tokenizer)) != wanted:
        raise InputError(f"`{model}` has another tokenizer than the artifact", expected=wanted, actual=found)
    return lambda id: tokenizer.decode([id])


def _shown(token: str) -> str:
    return token if token.startswith("#") else repr(token)


def _top(position: dict[str, Any]) -> str:
    return "  ".join(f"{_shown(entry['token'])} {entry['logprob']:.2f}" for entry in position["top"])


def main() -> None:
    """The entry point of `lopd-store`."""
    console.run(app)
