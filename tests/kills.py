"""Kill builds with SIGKILL at random moments, and go on with each until it is sealed.

    python -m tests.kills TEACHER ROLLOUTS DIRECTORY KILLS SEED

How many builds were killed, and the fingerprints of all that were sealed, go into DIRECTORY/found.json. The builds are
forks of this process, which has loaded everything but the model, so that fifty of them take seconds.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import lopd_store
from lopd_store import layout


def main(teacher: str, rollouts: str, directory: str, kills: str, seed: str) -> None:
    """Run the builds and write `found.json`."""
    generator, output = random.Random(int(seed)), Path(directory) / "killed"
    sealed, killed, resumed = list[str](), 0, 0

    def build(to: Path) -> str:
        return lopd_store.build(teacher=teacher, rollouts=rollouts, output=to, k_max=40, part_positions=1).fingerprint

    build(Path(directory) / "warm")
    started = time.monotonic()
    undisturbed = build(Path(directory) / "undisturbed")
    seconds = time.monotonic() - started
    while killed < int(kills):
        resumed += layout.building_directory(output).exists()
        if (child := os.fork()) == 0:
            build(output)
            os._exit(0)
        time.sleep(generator.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        if output.exists():
            sealed.append(lopd_store.open(output).fingerprint)
            shutil.rmtree(output)
    sealed.append(build(output))
    found = {"undisturbed": undisturbed, "killed": killed, "resumed": resumed, "sealed": sealed}
    (Path(directory) / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
