"""What only real processes show: the whole chain as it is typed, worker processes, and Ctrl-C while they work."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lopd_store
from tests.commands import Ran, interrupt_process, run_command, run_process, wait_for_the_end_of
from tests.hub.server import HubServer

INTERRUPTED = (
    "finishing what is in hand; Ctrl-C again stops at once, and loses it\n"
    "interrupted; run the same command again, and it goes on where it can\n"
)


def answer_of(ran: Ran) -> dict[str, object]:
    """The JSON on stdout of a command that went well, and said nothing else."""
    assert (ran.code, ran.stderr) == (0, "")
    facts = ran.json
    assert isinstance(facts, dict)
    return facts


def test_the_whole_chain_from_prompts_to_a_pulled_artifact(
    teacher_dir: Path, student_dir: Path, prompts_file: Path, here: Path, hub_server: HubServer, hub_env: dict[str, str]
) -> None:
    shutil.copytree(teacher_dir, "teacher")
    shutil.copytree(student_dir, "student")
    shutil.copy(prompts_file, "prompts.jsonl")

    def store(line: str) -> dict[str, object]:
        return answer_of(run_process("lopd-store", *line.split(), "--json", env=hub_env))

    sample = "generate --prompts prompts.jsonl --n 3 --max-response-tokens 24"
    assert run_command("lopd-store", *f"{sample} --model teacher --output sft.parquet".split()).code == 0
    store(f"{sample} --model student --output rollouts.parquet")
    parts = "--part-positions 100 --rollouts rollouts.parquet --sft sft.parquet"
    built = store(f"build --teacher teacher {parts} --workers 2 --output artifact")
    assert built["parts"] == 4
    assert built["consistency"] == "consistent"
    verified = store("verify artifact")
    assert verified["ok"] is True
    assert verified["fingerprint"] == built["fingerprint"]
    assert store("inspect artifact") == built
    pushed = store("push artifact acme/art")
    assert pushed["fingerprint"] == built["fingerprint"]
    pulled = store(f"pull acme/art --fingerprint {built['fingerprint']} --output pulled")
    assert pulled == {**built, "path": "pulled"}

    lopd_store.build(  # the same with one worker, in this process
        teacher="teacher", rollouts="rollouts.parquet", sft="sft.parquet", part_positions=100, output="again"
    )
    for path in Path("again").rglob("*"):
        if path.is_file() and path.name != "build.json":
            assert path.read_bytes() == Path("artifact", path.relative_to("again")).read_bytes(), path
            if path.name != "README.md":
                assert path.read_bytes() == Path("pulled", path.relative_to("again")).read_bytes(), path


def test_an_error_in_a_worker_is_told_like_one_in_this_process(
    teacher_dir: Path, rollouts_file: Path, here: Path
) -> None:
    shutil.copytree(teacher_dir, "teacher")
    config = json.loads(Path("teacher/config.json").read_text())
    Path("teacher/config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    build = ("build", "--teacher", "teacher", "--rollouts", rollouts_file, "--part-positions", 100)
    ran = run_command("lopd-store", *build, "--workers", 2, "--output", "artifact")
    assert (ran.code, ran.stdout) == (1, "")
    assert ran.stderr.startswith("error: the weights of `teacher` are not those of its config\n  expected  ")
    assert ran == run_command("lopd-store", *build, "--workers", 1, "--output", "artifact")
    assert [path.name for path in here.iterdir()] == ["teacher"]


def test_an_interrupted_build_goes_on_to_the_same_artifact(teacher_dir: Path, rollouts_file: Path, here: Path) -> None:
    build = ("build", "--teacher", teacher_dir, "--rollouts", rollouts_file, "--part-positions", 1)
    first = Path("artifact.building/done/00000.json")
    ran = interrupt_process("lopd-store", *build, "--workers", 2, "--output", "artifact", when=first.exists)
    assert ran == Ran(code=130, stdout="", stderr=INTERRUPTED)
    assert not Path("artifact").exists()
    assert len(list(first.parent.iterdir())) < 18
    scored = Path("artifact.building/parts/00000.topk.zarr.zip").stat().st_mtime_ns

    resumed = run_command("lopd-store", *build, "--workers", 1, "--output", "artifact", "--json")
    assert Path("artifact/parts/00000.topk.zarr.zip").stat().st_mtime_ns == scored
    assert not Path("artifact.building").exists()
    unbroken = run_command("lopd-store", *build, "--workers", 1, "--output", "unbroken", "--json")
    assert resumed.json == {**unbroken.json, "path": "artifact"}


def test_a_worker_ends_when_its_parent_is_killed(here: Path) -> None:
    Path("parent.py").write_text(
        "import multiprocessing, os, signal\n"
        "from lopd_store.workers import _end_with_parent\n"
        "if __name__ == '__main__':\n"
        "    ours, theirs = multiprocessing.get_context('spawn').Pipe()\n"
        "    worker = multiprocessing.get_context('spawn').Process(target=_end_with_parent, args=(theirs,))\n"
        "    worker.start()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    parent = subprocess.Popen([sys.executable, "parent.py"], start_new_session=True)
    assert parent.wait(timeout=60) == -signal.SIGKILL
    wait_for_the_end_of(parent.pid)
