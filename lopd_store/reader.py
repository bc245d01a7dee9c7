"""Reading artifacts: the manifest at once, parts when they are needed.

    artifact = lopd_store.open("artifact")
    for part in artifact.parts():       # decoded one ahead in the background
        part.sampled_logprobs
    artifact.rollout(3)

Opening checks the manifest only; `verify` checks every byte.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lopd_store import gate, layout, manifest
from lopd_store.digest import digest_bytes
from lopd_store.errors import ArtifactError, InputError
from lopd_store.identity import ModelIdentity
from lopd_store.part import Part, read_part
from lopd_store.topk import TopK


@dataclass(frozen=True, kw_only=True)
class StoredRollout:
    """One rollout as stored; row j of everything per position speaks of response_ids[j]."""

    prompt_ids: npt.NDArray[np.uint32]
    response_ids: npt.NDArray[np.uint32]
    loss_mask: npt.NDArray[np.bool_]
    sampled_logprobs: npt.NDArray[np.float32]
    reference_logprobs: npt.NDArray[np.float32] | None
    topk: TopK | None


class Artifact:
    """An opened artifact: its manifest and fingerprint in memory, its parts on disk."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path = path
        self.manifest = manifest.parse(data, where=str(path / layout.MANIFEST))
        self.fingerprint = digest_bytes(data)

    def __len__(self) -> int:
        return self.manifest.counts.rollouts

    def part(self, number: int) -> Part:
        """Decode one part."""
        tokens, topk = (self.path / layout.part_file(number, kind) for kind in (layout.TOKENS, layout.TOPK))
        if not tokens.is_file():
            raise ArtifactError(
                f"`{layout.part_file(number, layout.TOKENS)}` is missing", hint=f"lopd-store verify {self.path}"
            )
        return read_part(tokens, topk if topk.is_file() else None)

    def parts(self) -> Iterator[Part]:
        """All parts in order; the next one is decoded while the caller works on this one."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            count = len(self.manifest.parts)
            following = pool.submit(self.part, 0)
            for number in range(count):
                part = following.result()
                if number + 1 < count:
                    following = pool.submit(self.part, number + 1)
                yield part

    def rollout(self, index: int) -> StoredRollout:
        """Rollout `index`, counted over the whole artifact; decodes the part that holds it."""
        if not 0 <= index < len(self):
            raise InputError(f"there is no rollout {index}", expected=f"0 to {len(self) - 1}")
        number = bisect.bisect_right(self._first_rollouts, index) - 1
        return rollout_of_part(self._kept_part(number), index - self._first_rollouts[number])

    @cached_property
    def _first_rollouts(self) -> list[int]:
        counts = [entry.counts.rollouts for entry in self.manifest.parts]
        return [sum(counts[:number]) for number in range(len(counts))]

    def _kept_part(self, number: int) -> Part:
        if self._kept is None or self._kept[0] != number:
            self._kept = (number, self.part(number))
        return self._kept[1]

    _kept: tuple[int, Part] | None = None


def rollout_of_part(part: Part, index: int) -> StoredRollout:
    """Rollout `index` of one part, as views of its arrays."""
    start, stop = (int(offset) for offset in part.rollout_offsets[index : index + 2])
    middle = start + int(part.prompt_lengths[index])
    first = int(part.position_offsets[index])
    positions = slice(first, first + stop - middle)
    reference = part.reference_logprobs
    return StoredRollout(
        prompt_ids=part.token_ids[start:middle],
        response_ids=part.token_ids[middle:stop],
        loss_mask=part.loss_mask[positions],
        sampled_logprobs=part.sampled_logprobs[positions],
        reference_logprobs=None if reference is None else reference[positions],
        topk=None if part.topk is None else part.topk.slice(positions.start, positions.stop),
    )


def open(path: str | Path, *, student: ModelIdentity | None = None) -> Artifact:
    """Open a sealed artifact; given a student's identity, the gate must find it consistent.

    Raises InputError where there is no artifact, ArtifactError where its manifest is wrong, ConsistencyError
    where the gate refuses.
    """
    directory = Path(path)
    file = directory / layout.MANIFEST
    if not file.is_file():
        raise layout.no_artifact(directory)
    artifact = Artifact(directory, manifest.read_bytes(file))
    if student is not None:
        gate.enforce(gate.judge(artifact.manifest.inputs, student))
    return artifact
