"""`lopd-store generate` as a user runs it: what it writes, and what it says of inputs that it cannot use."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lopd_store
from lopd_store import models
from lopd_store.rollouts import RolloutsFile
from tests.commands import Ran, interrupt_command, run_command

NOT_A_PROMPT = (
    "error: `prompts.jsonl`, row 0 is not a prompt\n"
    "  expected  either `prompt` (text) or `messages` (a list of {role, content})\n"
)


def generate(model: Path, prompts: Path | str, *more: object) -> Ran:
    return run_command(
        "lopd-store", "generate", "--model", model, "--prompts", prompts, "--output", "rollouts.parquet", *more
    )


def assert_refused(ran: Ran, code: int, text: str) -> None:
    """The whole of stderr, an empty stdout, and no file that was not there before."""
    assert (ran.code, ran.stdout, ran.stderr) == (code, "", text)
    assert not list(Path().glob("rollouts.parquet*"))


def test_an_answer_in_words_is_one_line_and_nothing_else_is_said(
    student_dir: Path, prompts_file: Path, here: Path
) -> None:
    ran = generate(student_dir, prompts_file, "--max-response-tokens", 8)
    tokens = int(RolloutsFile("rollouts.parquet").response_lengths.sum())
    assert (ran.code, ran.stderr) == (0, "")
    assert ran.stdout.startswith(f"rollouts.parquet: 6 rollouts, {tokens} response tokens, ")
    assert ran.stdout.count("\n") == 1


def test_an_answer_in_json_holds_the_same_facts(student_dir: Path, prompts_file: Path, here: Path) -> None:
    ran = generate(student_dir, prompts_file, "--max-response-tokens", 8, "--n", 2, "--limit", 3, "--json")
    file = RolloutsFile("rollouts.parquet")
    stopped = sum(rollout.finish_reason == "stop" for rollout in file.read())
    tokens = int(file.response_lengths.sum())
    assert (ran.code, ran.stderr) == (0, "")
    assert ran.json == {"output": "rollouts.parquet", "rollouts": 6, "tokens": tokens, "stopped": stopped}


def test_the_same_command_samples_the_same_ids_whatever_the_batch_size(
    student_dir: Path, prompts_file: Path, here: Path
) -> None:
    rollouts = []
    for size in (1, 4, 16):
        generate(student_dir, prompts_file, "--max-response-tokens", 8, "--batch-size", size, "--seed", 5)
        rollouts.append([rollout.response_ids.tolist() for rollout in RolloutsFile("rollouts.parquet").read()])
        Path("rollouts.parquet").unlink()
    assert rollouts[0] == rollouts[1] == rollouts[2]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_prompts_come_in_three_formats(student_dir: Path, here: Path, suffix: str) -> None:
    rows = [{"prompt": "def add(a, b):", "task": 1}, {"prompt": "for i in", "task": 2}]
    prompts = Path(f"prompts{suffix}")
    match suffix:
        case ".jsonl":
            prompts.write_text("\n\n".join(json.dumps(row) for row in rows))
        case ".json":
            prompts.write_text(json.dumps(rows))
        case _:
            pq.write_table(pa.Table.from_pylist(rows), prompts)
    ran = generate(student_dir, prompts, "--max-response-tokens", 4, "--json")
    assert ran.code == 0
    assert [rollout.prompt for rollout in RolloutsFile("rollouts.parquet").read()] == [row["prompt"] for row in rows]


def test_a_missing_prompts_file_is_a_usage_error(student_dir: Path, here: Path) -> None:
    ran = generate(student_dir, "prompts.jsonl")
    assert_refused(ran, 2, "error: no prompts at `prompts.jsonl`\n\nhint: name a .jsonl, .json or .parquet file\n")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            "",
            "error: `prompts.jsonl` has no prompts\n  expected  at least one row with `prompt` or `messages`\n",
        ),
        (
            '{"question": "2 + 2?", "answer": "4"}\n',
            NOT_A_PROMPT + "  actual    `question`, `answer`\n",
        ),
        (
            '{"prompt": "2 + 2?", "messages": [{"role": "user", "content": "2 + 2?"}]}\n',
            NOT_A_PROMPT + "  actual    `prompt`, `messages`\n",
        ),
        (
            '{"messages": [{"role": "user"}]}\n',
            NOT_A_PROMPT + "  actual    `messages`\n",
        ),
        (
            '"2 + 2?"\n',
            NOT_A_PROMPT + "  actual    str\n",
        ),
        (
            '{"prompt": ""}\n',
            "error: `prompts.jsonl`, row 0 is empty\n  expected  at least one token\n",
        ),
        (
            '{"prompt": "<|bos|><|bos|>2 + 2?"}\n',
            "error: `prompts.jsonl`, row 0 starts with two `<|bos|>`\n\n"
            "hint: leave the first one out of the text; the tokenizer adds it\n",
        ),
        (
            '{"prompt": "ok"}\n{"prompt": "2 +',
            "error: `prompts.jsonl, line 2` is not valid JSON: "
            "Unterminated string starting at: line 1 column 12 (char 11)\n",
        ),
        (
            '{"prompt": "ok"}\n{"prompt": "' + "a" * 300 + '"}\n',
            "error: `prompts.jsonl`, row 1: prompt and response do not fit the model's context\n"
            "  expected  at most 256 tokens\n"
            "  actual    300 prompt tokens + up to 4 response tokens\n\n"
            "hint: a prompt is never cut; leave it out, or lower `--max-response-tokens`\n",
        ),
    ],
    ids=[
        *("empty", "unknown columns", "prompt and messages", "no content", "not an object"),
        *("empty prompt", "two beginnings", "broken line", "too long"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused_with_their_row(
    student_dir: Path, here: Path, content: str, text: str
) -> None:
    Path("prompts.jsonl").write_text(content)
    assert_refused(generate(student_dir, "prompts.jsonl", "--max-response-tokens", 4), 1, text)


@pytest.mark.parametrize(
    ("damage", "code", "text"),
    [
        (
            lambda model: model.rename("elsewhere"),
            2,
            "error: no model at `model`\n"
            "  expected  a directory of safetensors, a .gguf file, or a Hub id such as `Qwen/Qwen3-8B`\n\n"
            "hint: check the path\n",
        ),
        (
            lambda model: (model / "model.safetensors").unlink(),
            1,
            "error: `model` has no weights\n  expected  *.safetensors\n  actual    none\n\nhint: check the path\n",
        ),
        (
            lambda model: (model / "model.safetensors").rename(model / "pytorch_model.bin"),
            1,
            "error: `model` has pickled weights, which can run code when opened\n"
            "  expected  *.safetensors or a .gguf file\n"
            "  actual    pytorch_model.bin\n\n"
            "hint: convert them with `save_pretrained` on a machine that trusts them\n",
        ),
        (
            lambda model: (model / "config.json").unlink(),
            1,
            "error: `model` has weights but no config.json\n\nhint: copy it from where the weights came\n",
        ),
        (
            lambda model: os.truncate(model / "model.safetensors", 5000),
            1,
            "error: `model.safetensors` is cut short at the tensor `model.embed_tokens.weight`\n",
        ),
    ],
    ids=["missing", "no weights", "pickled weights", "no config", "truncated weights"],
)
def test_a_model_that_cannot_be_used_is_refused(
    student_dir: Path, prompts_file: Path, here: Path, damage: object, code: int, text: str
) -> None:
    assert callable(damage)
    damage(Path(shutil.copytree(student_dir, "model")))
    assert_refused(generate(Path("model"), prompts_file, "--max-response-tokens", 8), code, text)


def test_a_model_of_the_hub_that_cannot_be_fetched_leaves_the_question_open(prompts_file: Path, here: Path) -> None:
    ran = generate(Path("acme/model"), prompts_file)  # the tests are offline
    assert (ran.code, ran.stdout) == (3, "")
    assert ran.stderr.startswith("error: `acme/model` could not be fetched: ")


def test_an_interrupted_generate_goes_on_to_the_same_bytes(student_dir: Path, prompts_file: Path, here: Path) -> None:
    command = ("lopd-store", "generate", "--model", student_dir, "--prompts", prompts_file, "--n", 30, "--output")
    short = ("--max-response-tokens", 12)
    journal = Path("rollouts.parquet.generating")
    ran = interrupt_command(
        *command, "rollouts.parquet", *short, when=lambda: journal.exists() and journal.stat().st_size > 20_000
    )
    assert (ran.code, ran.stdout) == (130, "")
    assert ran.stderr == "interrupted; run the same command again, and it goes on where it can\n"
    assert [path.name for path in Path().glob("rollouts*")] == [journal.name]
    kept = journal.read_bytes()
    other = run_command(*command, "rollouts.parquet", *short, "--seed", 1)
    assert (other.code, journal.read_bytes()) == (2, kept)
    assert other.stderr.startswith(f"error: `{journal}` was begun with other settings\n  expected  the same `record`\n")
    for name in ("rollouts.parquet", "undisturbed.parquet"):
        assert run_command(*command, name, *short).code == 0
    assert Path("rollouts.parquet").read_bytes() == Path("undisturbed.parquet").read_bytes()
    assert not journal.exists()


def test_a_response_ends_with_the_token_that_completes_a_stop_string(
    student_dir: Path, prompts_file: Path, here: Path
) -> None:
    options = ("--max-response-tokens", 24, "--n", 4)
    assert generate(student_dir, prompts_file, *options).code == 0
    free = RolloutsFile("rollouts.parquet").read()
    texts = [one.response or "" for one in free]
    stop = next(
        text[i : i + 2]
        for text in texts
        for i in range(3, len(text) - 4)
        if text[i : i + 2].isascii() and text[i : i + 2].isalpha()
    )
    Path("rollouts.parquet").unlink()
    assert generate(student_dir, prompts_file, *options, "--stop", stop, "--stop", "never said").code == 0
    record, ended = RolloutsFile("rollouts.parquet").record, 0
    assert record is not None and record.sampling.stop == (stop, "never said")
    for one, whole in zip(RolloutsFile("rollouts.parquet").read(), free, strict=True):
        assert one.response is not None and whole.response is not None
        count = len(one.response_ids)
        np.testing.assert_array_equal(one.response_ids, whole.response_ids[:count])
        assert (count < len(whole.response_ids)) <= (stop in one.response)
        assert (stop in whole.response) == (stop in one.response)
        if stop in one.response:
            ended += 1
            tokenizer = models.load_tokenizer(models.find(student_dir))
            assert one.finish_reason == "stop" and stop not in tokenizer.decode(one.response_ids[:-1])
    assert ended


def test_an_output_that_exists_is_never_overwritten(student_dir: Path, prompts_file: Path, here: Path) -> None:
    Path("rollouts.parquet").write_bytes(b"precious")
    ran = generate(student_dir, prompts_file)
    assert (ran.code, ran.stdout) == (2, "")
    assert ran.stderr == "error: `rollouts.parquet` exists\n\nhint: choose another `--output`, or move it away\n"
    assert Path("rollouts.parquet").read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("options", "place"),
    [
        (("--temperature", -1), "`temperature` is out of range"),
        (("--top-p", 0), "`top_p` is out of range"),
        (("--max-response-tokens", 0), "`max_response_tokens` is out of range"),
        (("--n", 0), "Invalid value for '--n'"),
        (("--limit", 0), "Invalid value for '--limit'"),
        (("--batch-size", 0), "Invalid value for '--batch-size'"),
        (("--dtype", "int8"), "Invalid value for '--dtype'"),
        (("--device", "abacus"), "the device `abacus` cannot be used"),
    ],
)
def test_an_option_out_of_range_is_a_usage_error(
    student_dir: Path, prompts_file: Path, here: Path, options: tuple[object, ...], place: str
) -> None:
    ran = generate(student_dir, prompts_file, *options)
    assert (ran.code, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"error: {place}")
    assert not list(here.iterdir())


def test_the_record_in_the_file_says_which_model_sampled_it(student_dir: Path, prompts_file: Path, here: Path) -> None:
    generate(student_dir, prompts_file, "--max-response-tokens", 4, "--temperature", 0.5, "--seed", 7)
    record = RolloutsFile("rollouts.parquet").record
    assert record is not None
    assert record.policy == lopd_store.identify(student_dir)
    assert (record.sampling.temperature, record.sampling.seed) == (0.5, 7)
