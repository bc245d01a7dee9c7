"""One worker, two processes, two jobs with a share each, and Ray make one artifact; so does Ray when an actor dies."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

import lopd_store
from tests.artifacts import random_pairs, save_rollouts
from tests.commands import run_command, run_process

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts for twelve parts."""
    path = tmp_path_factory.mktemp("rollouts") / "rollouts.parquet"
    return save_rollouts(path, random_pairs([(5, 40)] * 12), logprob=-1.5)


@pytest.fixture(scope="module")
def wanted(teacher_dir: Path, rollouts: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The fingerprint of what one worker makes."""
    output = tmp_path_factory.mktemp("one") / "artifact"
    return lopd_store.build(teacher=teacher_dir, rollouts=rollouts, output=output, part_positions=40).fingerprint


@pytest.fixture
def build(teacher_dir: Path, rollouts: Path, tmp_path: Path) -> tuple[object, ...]:
    return (
        "build",
        "--teacher",
        teacher_dir,
        "--rollouts",
        rollouts,
        "--part-positions",
        40,
        "--output",
        tmp_path / "a",
    )


def test_two_processes_make_the_artifact_of_one_worker(build: tuple[object, ...], wanted: str) -> None:
    ran = run_process("lopd-store", *build, "--workers", 2, "--json")
    assert ran.code == 0 and ran.json["fingerprint"] == wanted, ran.stderr


def test_two_shares_make_the_artifact_of_one_worker(build: tuple[object, ...], wanted: str, tmp_path: Path) -> None:
    for share in ("1/2", "2/2"):
        assert run_command("lopd-store", *build, "--workers", 1, "--part", share).code == 0
    ran = run_command("lopd-store", "merge", "--output", tmp_path / "a", "--json")
    assert ran.code == 0 and ran.json["fingerprint"] == wanted, ran.stderr


def test_a_ray_cluster_makes_the_artifact_of_one_worker(build: tuple[object, ...], wanted: str) -> None:
    ran = run_process("lopd-store", *build, "--ray", "local", "--workers", 2, "--json")
    assert ran.code == 0 and ran.json["fingerprint"] == wanted, ran.stderr


def test_the_part_of_an_actor_that_was_killed_is_done_again(
    build: tuple[object, ...], wanted: str, tmp_path: Path
) -> None:
    import ray

    killed: list[int] = []

    def kill_an_actor() -> None:
        """Once a part is done, kill one of the actors at work."""
        done = tmp_path / "a.building" / "done"
        while not (done.is_dir() and list(done.iterdir())):
            time.sleep(0.01)
        killed.append(actors()[0])
        os.kill(killed[0], signal.SIGKILL)

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        killer = threading.Thread(target=kill_an_actor)
        killer.start()
        ran = run_command("lopd-store", *build, "--ray", "local", "--workers", 2, "--json")
        killer.join()
    finally:
        ray.shutdown()
    assert ran.code == 0 and ran.json["fingerprint"] == wanted, ran.stderr
    record = json.loads((tmp_path / "a" / "build.json").read_text())
    assert len(killed) == 1 and record["workers"] == 2


def actors() -> list[int]:
    """The processes of the actors that score."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::_Scorer"):
                found.append(int(path.parent.name))
        except OSError:
            continue  # it ended meanwhile
    return found


def test_an_error_on_a_cluster_is_told_like_one_in_this_process(build: tuple[object, ...], tmp_path: Path) -> None:
    ran = run_process("lopd-store", *build, "--ray", "127.0.0.1:1", "--workers", 2)
    assert ran.code == 3 and "error: no Ray cluster at `127.0.0.1:1`" in ran.stderr


def test_nodes_have_no_worker_between_them(build: tuple[object, ...]) -> None:
    """On two nodes of three processors there is a worker of two threads each; a third would wait for ever."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=3)
        ran = run_process("lopd-store", *build, "--ray", cluster.address, "--threads", 2)
    finally:
        cluster.shutdown()
    assert ran.code == 0, ran.stderr
