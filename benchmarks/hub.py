"""Sharing in numbers, against the local Hub of the tests: beside the bare client, on loopback, in one process.

    python benchmarks/hub.py                 # `make bench-hub`
    python benchmarks/hub.py --small         # in seconds; keeps no results

Push and pull compare every byte with its digest and stand beside `upload_folder` and `snapshot_download` of the same
files, as fast as it goes and over a line of 1 Gbit/s. The server is Python in a process of its own, on the same cores,
so the ratios count and not the speeds. A push of what this machine has neither built nor verified decodes every value,
too: what its ratio can be follows from the processor time that each side takes.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from distributions import Distributions, made_up, scored
from measure import machine, medians
from parts import encode, make_manifest, make_part, repeat_part
from report import Row, table_of_rows, write_section

import lopd_store
from lopd_store import layout
from lopd_store.cache import cache_directory
from lopd_store.digest import digest_contents
from lopd_store.encoding import make_encoding
from lopd_store.manifest import PartEntry, render
from lopd_store.part import rollouts_file

HERE = Path(__file__).parent
REPOSITORY = "acme/benchmark"
LINE = 125e6  # bytes per second: 1 Gbit/s


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=HERE / ".cache", help="where scored distributions are kept")
    parser.add_argument("--results", type=Path, default=HERE / "RESULTS.md", help="the file whose section is rewritten")
    parser.add_argument("--small", action="store_true", help="made-up data, in seconds; keeps no results")
    options = parser.parse_args()
    data = made_up() if options.small else Distributions.load(scored(options.cache))
    positions, parts, repeats = (1 << 12, 3, 1) if options.small else (1 << 20, 12, 5)
    with tempfile.TemporaryDirectory() as name, local_hub(Path(name)) as hub:
        artifact = write_artifact(Path(name) / "artifact", data, positions, parts)
        size = sum(path.stat().st_size for path in (artifact / layout.PARTS).iterdir())
        rows = list(measure_speed(artifact, Path(name), hub, size, repeats))
        hub.set_speed(LINE)
        rows += measure_line(artifact, Path(name), hub, size, repeats)
        hub.set_speed(None)
        rows += measure_reading(artifact, hub)
    text = "\n\n".join(
        [
            f"{datetime.now(UTC):%Y-%m-%d}, {machine()}. {parts} parts of about {positions:,} positions, "
            f"{size / 1e6:,.0f} MB; medians of {repeats}, taking turns. Push and pull compare every byte with its "
            "digest, which the bare client does not, and a push of what this machine has neither built nor verified "
            "before verifies every value beside the transfer; all of it and the server share the cores. What the "
            "processor time of a verification and of the bare client and its server, on all cores, would allow such a "
            "push at best is a limit of the machine, not a result.",
            table_of_rows(rows),
        ]
    )
    print(text)
    if not options.small:
        write_section(options.results, "Hub", text)


def measure_speed(artifact: Path, scratch: Path, hub: Hub, size: int, repeats: int) -> Iterator[Row]:
    """Push and pull beside the bare client on loopback, and how many requests a push makes."""
    (verifying,) = medians(lambda: lopd_store.verify(artifact).require_ok(), repeats=repeats)
    yield Row(what="verify alone", value=size / verifying / 1e6, unit="MB/s")
    _, needed = processor_seconds(hub, lambda: lopd_store.verify(artifact).require_ok())
    for verb, bare, ours, target in transfers(artifact, scratch, hub):
        theirs, mine = medians(bare, ours, repeats=repeats)
        yield Row(what=f"{verb}, the bare client", value=size / theirs / 1e6, unit="MB/s")
        yield Row(what=f"{verb}", value=size / mine / 1e6, unit="MB/s")
        yield Row(what=f"{verb} beside the bare client", value=100 * theirs / mine, unit="%", target=target)
        if target is None:
            _, spent = processor_seconds(hub, bare)
            at_best = (needed + spent) / (os.cpu_count() or 1)
            yield Row(what=f"{verb}, at best", value=min(100 * theirs / at_best, 100), unit="%")
    before, _ = hub.count()
    hub.reset()
    lopd_store.push(artifact, REPOSITORY)
    yield Row(what="requests of a push", value=hub.count()[0] - before, unit="requests")
    before, _ = hub.count()
    lopd_store.push(artifact, REPOSITORY)
    yield Row(what="requests of the same push again", value=hub.count()[0] - before, unit="requests")


def measure_line(artifact: Path, scratch: Path, hub: Hub, size: int, repeats: int) -> Iterator[Row]:
    """The same over a line of a speed that networks have."""
    for verb, bare, ours, target in transfers(artifact, scratch, hub):
        theirs, mine = medians(bare, ours, repeats=repeats)
        yield Row(what=f"{verb} at 1 Gbit/s", value=size / mine / 1e6, unit="MB/s")
        yield Row(what=f"{verb} at 1 Gbit/s beside the bare client", value=100 * theirs / mine, unit="%", target=target)


def transfers(
    artifact: Path, scratch: Path, hub: Hub
) -> Iterator[tuple[str, Callable[[], object], Callable[[], object], float | None]]:
    """What is done, the bare client's work, ours and the target. A pull gets what the push before it has left there."""
    from huggingface_hub import HfApi, snapshot_download

    def bare_push() -> None:
        hub.reset()
        HfApi().create_repo(REPOSITORY, repo_type="dataset")
        HfApi().upload_folder(repo_id=REPOSITORY, repo_type="dataset", folder_path=artifact)

    def push() -> None:
        hub.reset()
        lopd_store.push(artifact, REPOSITORY)

    def push_unverified() -> None:
        shutil.rmtree(cache_directory() / "verified")
        push()

    def bare_pull() -> None:
        shutil.rmtree(scratch / "bare", ignore_errors=True)
        snapshot_download(REPOSITORY, repo_type="dataset", local_dir=scratch / "bare")

    def pull() -> None:
        shutil.rmtree(scratch / "pulled", ignore_errors=True)
        lopd_store.pull(REPOSITORY, output=scratch / "pulled")

    yield "push", bare_push, push, 80
    yield "push of what was not verified", bare_push, push_unverified, None
    yield "pull", bare_pull, pull, 80


def processor_seconds(hub: Hub, work: Callable[[], object]) -> tuple[float, float]:
    """What this process spends on some work, and what it and the server spend together."""
    ours, both = time.process_time(), time.process_time() + hub.seconds()
    work()
    return time.process_time() - ours, time.process_time() + hub.seconds() - both


def measure_reading(artifact: Path, hub: Hub) -> Iterator[Row]:
    """What has to come before a first batch, and for a look."""
    pushed = lopd_store.push(artifact, REPOSITORY)
    _, before = hub.count()
    opened = lopd_store.open(f"hf://{REPOSITORY}@{pushed.tag}")
    _, inspected = hub.count()
    yield Row(what="bytes to inspect", value=(inspected - before) / 1e3, unit="kB", target=200, at_most=True)
    next(opened.parts(ahead=0))
    _, batched = hub.count()
    files = opened.manifest.parts[0].files
    part = files[layout.TOKENS].size + files[layout.TOPK].size
    yield Row(
        what="bytes before the first batch, nothing read ahead",
        value=(batched - before) / part,
        unit="parts",
        target=1.05,
        at_most=True,
    )


def write_artifact(directory: Path, data: Distributions, positions: int, parts: int) -> Path:
    """An artifact whose parts differ, so that nobody is spared an upload."""
    encoding, entries = make_encoding(), []
    whole = repeat_part(make_part(data, encoding), positions)
    (directory / layout.PARTS).mkdir(parents=True)
    for number in range(parts):
        part = whole.slice(number, len(whole.prompt_lengths))
        lengths = {"prompt_length": part.prompt_lengths, "response_length": np.diff(part.position_offsets).astype("i4")}
        contents = dict(zip(layout.FILE_KINDS, (rollouts_file(dict(lengths)), *encode(part, encoding)), strict=True))
        for kind, content in contents.items():
            (directory / layout.part_file(number, kind)).write_bytes(content)
        files = {kind: digest_contents(content) for kind, content in contents.items()}
        entries.append(PartEntry(counts=part.counts, files=files))
    manifest = make_manifest(tuple(entries), encoding, data.vocab_size)
    (directory / layout.MANIFEST).write_bytes(render(manifest))
    return directory


@dataclass(frozen=True, kw_only=True)
class Hub:
    """The server in its process."""

    pipe: Connection

    def reset(self) -> None:
        """Forget every repository and every object."""
        self.pipe.send("reset")
        self.pipe.recv()

    def set_speed(self, bytes_per_second: float | None) -> None:
        """Let the line have a speed, or none."""
        self.pipe.send(bytes_per_second)
        self.pipe.recv()

    def seconds(self) -> float:
        """The server's processor time so far."""
        self.pipe.send("seconds")
        seconds: float = self.pipe.recv()
        return seconds

    def count(self) -> tuple[int, int]:
        """Requests so far, and bytes sent in answer."""
        self.pipe.send("count")
        requests, sent = self.pipe.recv()
        return requests, sent


@contextmanager
def local_hub(scratch: Path) -> Iterator[Hub]:
    """Start a Hub on loopback and lead the client of this process to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,))
    process.start()
    endpoint, token = ours.recv()
    os.environ |= {
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": token,
        "HF_HOME": str(scratch / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "XDG_CACHE_HOME": str(scratch / "cache"),
    }
    os.environ.pop("HF_HUB_OFFLINE", None)
    from huggingface_hub import constants

    importlib.reload(constants)  # something may have imported it before
    try:
        yield Hub(pipe=ours)
    finally:
        ours.send("end")
        process.join()


def _serve(pipe: Connection) -> None:
    sys.path.insert(0, str(HERE.parent))
    from tests.hub.server import HubServer

    with HubServer() as server:
        pipe.send((server.endpoint, server.token))
        while (asked := pipe.recv()) != "end":
            if asked == "reset":
                server.repos.clear()
                server.lfs_objects.clear()
                server.lfs_uploads.clear()
            elif not isinstance(asked, str):
                server.bytes_per_second = asked
            pipe.send(time.process_time() if asked == "seconds" else (len(server.requests), server.sent))


if __name__ == "__main__":
    main()
