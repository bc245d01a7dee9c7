"""`lopd-train`: sft and opd. Each takes one option per setting of `TrainConfig`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

import lopd_train
from lopd_store import gate
from lopd_train import OPD, SFT, OnProgress, Progress, RunResult, TrainConfig
from lopd_train.config import help_of

from . import console

app = typer.Typer(
    help="Training on teacher log-probs: SFT first, then offline on-policy distillation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelOption = Annotated[
    str, typer.Option(metavar="MODEL", help="A directory of safetensors, a GGUF file, or a Hub id.")
]
OutputOption = Annotated[Path, typer.Option(metavar="DIR", help="The model to make, as `save_pretrained` writes it.")]
Json = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]


@app.callback()
def lopd_train_command(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=console.show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take the options that go before a command."""


def with_config(defaults: TrainConfig) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option per setting in place of its parameter `config`."""
    names = [item.name for item in fields(TrainConfig)]
    kinds = get_type_hints(TrainConfig)

    def option(name: str) -> inspect.Parameter:
        help_text = typer.Option(help=help_of(name), rich_help_panel="Settings")
        return inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=getattr(defaults, name),
            annotation=Annotated[kinds[name], help_text],
        )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**arguments: Any) -> None:
            config = TrainConfig(**{name: arguments.pop(name) for name in names})
            command(config=config, **arguments)

        signature = inspect.signature(command, eval_str=True)
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in signature.parameters.values()
            if parameter.name != "config"
        ]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = signature.replace(parameters=own + [option(name) for name in names])  # type: ignore[attr-defined]
        return run

    return decorate


@app.command()
@with_config(SFT)
def sft(
    model: ModelOption,
    data: Annotated[Path, typer.Option(metavar="FILE", help="SFT data, as `lopd-store generate` writes it.")],
    output: OutputOption,
    config: TrainConfig,
    json: Json = False,
) -> None:
    """Train a model on the responses of a teacher, and record which teacher it was."""
    with _shown("sft") as on_progress:
        result = lopd_train.train_sft(model=model, data=data, output=output, config=config, on_progress=on_progress)
    _answer(result, json)


@app.command()
@with_config(OPD)
def opd(
    artifact: Annotated[Path, typer.Option(metavar="DIR", help="The teacher's log-probs on the student's rollouts.")],
    student: ModelOption,
    output: OutputOption,
    config: TrainConfig,
    allow_unknown_sft_teacher: Annotated[
        bool, typer.Option(f"--{gate.ALLOW_UNKNOWN}", help="Train though a provenance is not known.")
    ] = False,
    allow_inconsistent_teacher: Annotated[
        bool, typer.Option(f"--{gate.ALLOW_INCONSISTENT}", help="Train though the gradient is biased.")
    ] = False,
    json: Json = False,
) -> None:
    """Train a student on a teacher's stored log-probs; refuses unless the teacher is the one of its SFT."""
    allowed = {gate.ALLOW_UNKNOWN: allow_unknown_sft_teacher, gate.ALLOW_INCONSISTENT: allow_inconsistent_teacher}
    with _shown("opd") as on_progress:
        result = lopd_train.train_opd(
            artifact=artifact,
            student=student,
            output=output,
            config=config,
            overrides=[name for name, allow in allowed.items() if allow],
            on_progress=on_progress,
        )
    _answer(result, json)


@contextmanager
def _shown(description: str) -> Iterator[OnProgress]:
    """Show the progress of a run, and how to go on after Ctrl-C."""

    def show(progress: Progress) -> None:
        words = [f"step {progress.step} of {progress.steps}", progress.activity]
        words += [f"{name} {progress.metrics[name]:.4g}" for name in ("loss", "advantage") if name in progress.metrics]
        meter.update(progress.done, progress.total, ", ".join(words))

    try:
        with console.progress(description, "rollouts") as meter:
            yield show
    except KeyboardInterrupt as stopped:
        if str(stopped):
            console.note(str(stopped))
        raise


def _answer(result: RunResult, json: bool) -> None:
    if json:
        console.answer({**vars(result), "output": str(result.output)})
        return
    console.say(f"{result.output}: {result.steps:,} steps")
    for name in result.first_eval.keys() - {"tokens"}:
        before, after, tokens = result.first_eval[name], result.last_eval[name], result.last_eval["tokens"]
        words = f"held-out {name.replace('_', ' ')}"
        console.say(f"{words}: {before:.4f} -> {after:.4f} nats per position, over {tokens:,} positions")


def main() -> None:
    """The entry point of `lopd-train`."""
    console.run(app)


if __name__ == "__main__":
    main()
