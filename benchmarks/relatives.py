"""Models that are nearly the teacher, and texts that it nearly wrote: what the audit has to tell apart.

The teacher is SmolLM2-135M-Instruct from a PyPI package, as in `make demo`. What is made is kept in a cache.
"""

from __future__ import annotations

import gzip
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from distributions import MODEL, PROBLEMS, SAMPLED_PROBLEMS, SAMPLED_TOKENS, packaged, say, write_prompts

LAYERS = 24  # of the teacher's 30
SFT_STEPS, SFT_BATCH, SFT_PROBLEMS = 50, 2, 50
COOL = 0.7


def teacher(cache: Path) -> Path:
    """The model of the package as a directory of safetensors."""
    from lopd_store import models

    def make(path: Path) -> None:
        model = models.load_model(models.find(packaged(*MODEL)))
        _save(models.copy_without_quantization(model), path)

    return _kept(cache / "teacher", make)


def truncated(cache: Path) -> Path:
    """The teacher without its last layers."""
    from lopd_store import models

    def make(path: Path) -> None:
        model = models.load_model(models.find(teacher(cache)))
        model.model.layers = model.model.layers[:LAYERS]
        model.config.num_hidden_layers = LAYERS
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:LAYERS]
        _save(model, path)

    return _kept(cache / "truncated", make)


def fine_tuned(cache: Path) -> Path:
    """The teacher after some steps of SFT on human solutions of problems whose text is not audited."""
    import lopd_train

    path = cache / "sft"
    if not path.is_dir():
        base, data = teacher(cache), cache / "sft-data.parquet"
        _write_solutions(data, problems()[SAMPLED_PROBLEMS : SAMPLED_PROBLEMS + SFT_PROBLEMS])
        say(f"{SFT_STEPS} steps of sft")
        config = replace(
            lopd_train.SFT,
            steps=SFT_STEPS,
            batch_rollouts=SFT_BATCH,
            eval_fraction=0,
            checkpoint_every=SFT_STEPS,
            device="cpu",
        )
        lopd_train.train_sft(model=base, data=data, output=path, config=config)
    return path


@contextmanager
def between(cache: Path, share: float) -> Iterator[Path]:
    """A model whose weights are so far on the way from the teacher's to its fine-tuned copy's."""
    from lopd_store import models

    model, other = (models.load_model(models.find(path)) for path in (teacher(cache), fine_tuned(cache)))
    for weight, towards in zip(model.parameters(), other.parameters(), strict=True):
        weight.data.lerp_(towards.data, share)
    with tempfile.TemporaryDirectory(dir=cache) as path:
        _save(model, Path(path))
        del model, other
        yield Path(path)


def own_text(cache: Path, temperature: float = 1.0) -> Path:
    """Answers that the teacher sampled."""
    import lopd_store

    path = cache / f"own-{temperature:g}.parquet"
    if not path.is_file():
        say(f"sampling answers at temperature {temperature:g}")
        lopd_store.generate(
            model=teacher(cache),
            prompts=write_prompts(cache / "prompts.jsonl", problems()[:SAMPLED_PROBLEMS]),
            output=path,
            temperature=temperature,
            max_response_tokens=SAMPLED_TOKENS,
            batch_size=32,
        )
    return path


def human_text(cache: Path, *, bodies_only: bool = False) -> Path:
    """The canonical solutions to the same prompts: whole functions, or only their bodies counted."""
    path = cache / ("human-bodies.parquet" if bodies_only else "human.parquet")
    if not path.is_file():
        _write_solutions(path, problems()[:SAMPLED_PROBLEMS], bodies_only=bodies_only)
    return path


def _write_solutions(path: Path, problems: list[dict[str, Any]], *, bodies_only: bool = False) -> None:
    """Rollouts of human text, which no model sampled; the loss mask says what of it counts."""
    from lopd_store import models
    from lopd_store.prompts import read_prompts
    from lopd_store.rollouts import write_rollouts

    tokenizer = models.load_tokenizer(models.find(packaged(*MODEL)))
    prompts = read_prompts(write_prompts(path.with_suffix(".jsonl"), problems), tokenizer)
    rows = []
    for problem, prompt in zip(problems, prompts, strict=True):
        header = f"```python\n{problem['prompt']}"
        found = tokenizer(f"{header}{problem['canonical_solution']}```", return_offsets_mapping=True)
        mask = [not bodies_only or end > len(header) for _, end in found.offset_mapping]
        ids = [*found.input_ids, tokenizer.eos_token_id]
        rows.append({"prompt_ids": prompt.ids, "response_ids": ids, "loss_mask": [*mask, True]})
    write_rollouts(path, rows, None)


def problems() -> list[dict[str, Any]]:
    """HumanEval, the shortest prompts first; the first of them are what the teacher answered."""
    with gzip.open(packaged(*PROBLEMS), "rt", encoding="utf-8") as lines:
        return sorted(map(json.loads, lines), key=lambda problem: len(problem["prompt"]))


def _kept(path: Path, make: Callable[[Path], None]) -> Path:
    """What `make` makes, once; appears under `path` only when it is whole."""
    if not path.is_dir():
        unfinished = path.with_name(path.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        make(unfinished)
        unfinished.rename(path)
    return path


def _save(model: Any, path: Path) -> None:
    """Weights and config, with the tokenizer of the package."""
    from lopd_store import models

    path.mkdir(parents=True, exist_ok=True)
    with models.without_bars():
        model.save_pretrained(path)
    models.load_tokenizer(models.find(packaged(*MODEL))).save_pretrained(path)
