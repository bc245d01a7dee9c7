"""Reading artifacts: the manifest at once, parts when they are needed.

    artifact = lopd_store.open("artifact")
    for part in artifact.parts():       # decoded ahead in the background
        part.sampled_logprobs
    artifact.rollout(3)

Opening reads the manifest only; a part is compared with its xxh3 when it is read, and `verify` checks everything else.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from lopd_store import gate, layout, manifest
from lopd_store.digest import digest_bytes
from lopd_store.errors import ArtifactError, InputError
from lopd_store.identity import ModelIdentity
from lopd_store.part import Part, read_part
from lopd_store.topk import TopK
from lopd_store.view import read_view


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
    """An opened artifact, or a copy of a part of one: manifest and fingerprint in memory, parts on disk."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path = path
        self.manifest = manifest.parse(data, where=str(path / layout.MANIFEST))
        self.fingerprint = digest_bytes(data)
        self.view = read_view(path, self.manifest, self.fingerprint)

    def __len__(self) -> int:
        """Rollouts of the artifact, also of those that a partial copy lacks."""
        return self.manifest.counts.rollouts

    @property
    def rollouts(self) -> range:
        """The numbers of the rollouts that are here: all, but in a copy of some parts."""
        starts = [*self._first_rollouts, len(self)]
        return range(starts[self.view.parts.start], starts[self.view.parts.stop])

    def part(self, number: int) -> Part:
        """Decode one part; raises ArtifactError where its bytes are not those of the manifest."""
        if number not in self.view.parts:
            raise InputError(
                f"there is no part {number} in `{self.path}`",
                expected=f"{self.view.parts.start} to {self.view.parts.stop - 1}",
            )
        topk = self._read(number, layout.TOPK) if self.view.has_topk else None
        return read_part(
            self._read(number, layout.TOKENS),
            topk,
            self.manifest.encoding,
            self.manifest.parts[number].counts,
            where=layout.part_name(number),
        )

    def parts(self, *, ahead: int = 1) -> Iterator[Part]:
        """All parts in order; the next `ahead` are decoded while the caller works on this one."""
        waiting: deque[Future[Part]] = deque()
        with ThreadPoolExecutor(max_workers=max(ahead, 1)) as pool:
            for number in self.view.parts:
                waiting.append(pool.submit(self.part, number))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def batches(self, positions: int) -> Iterator[Part]:
        """All rollouts in order, in batches of whole rollouts with at most so many positions (one rollout at least).

        A batch is flat arrays with offsets, views of its part without copy or padding; none spans two parts.
        `torch.from_numpy` takes them as they are.
        """
        for part in self.parts():
            start = 0
            while start < len(part.prompt_lengths):
                room = part.position_offsets[start] + positions
                stop = max(int(np.searchsorted(part.position_offsets, room, side="right")) - 1, start + 1)
                yield part.slice(start, stop)
                start = stop

    def rollout(self, index: int) -> StoredRollout:
        """Rollout `index`, counted over the whole artifact; decodes the part that holds it, and keeps that one."""
        if not 0 <= index < len(self):
            raise InputError(f"there is no rollout {index}", expected=f"0 to {len(self) - 1}")
        number = bisect.bisect_right(self._first_rollouts, index) - 1
        if self._kept is None or self._kept[0] != number:
            self._kept = (number, self.part(number))
        return rollout_of_part(self._kept[1], index - self._first_rollouts[number])

    _kept: tuple[int, Part] | None = None

    @cached_property
    def _first_rollouts(self) -> list[int]:
        counts = [entry.counts.rollouts for entry in self.manifest.parts]
        return [0, *np.cumsum(counts[:-1]).tolist()]

    def _read(self, number: int, kind: str) -> bytes:
        name, entry = layout.part_file(number, kind), self.manifest.parts[number].files[kind]
        path = self.path / name
        if path.parent.is_symlink() or path.is_symlink() or not path.is_file():
            raise ArtifactError(f"`{name}` is missing or not a plain file", hint=f"lopd-store verify {self.path}")
        # The size first, so that a manifest cannot make us ask for more memory than there are bytes to read.
        data = path.read_bytes() if path.stat().st_size == entry.size else b""
        if len(data) != entry.size or xxhash.xxh3_128_hexdigest(data) != entry.xxh3_128:
            raise ArtifactError(f"`{name}` was damaged", hint=f"lopd-store verify {self.path}")
        return data


def rollout_of_part(part: Part, index: int) -> StoredRollout:
    """Rollout `index` of one part, as views of its arrays."""
    one = part.slice(index, index + 1)
    middle = int(one.prompt_lengths[0])
    return StoredRollout(
        prompt_ids=one.token_ids[:middle],
        response_ids=one.token_ids[middle:],
        loss_mask=one.loss_mask,
        sampled_logprobs=one.sampled_logprobs,
        reference_logprobs=one.reference_logprobs,
        topk=one.topk,
    )


def open(path: str | Path, *, student: ModelIdentity | None = None) -> Artifact:
    """Open a sealed artifact; given a student's identity, the gate must find it consistent.

    Raises InputError where there is no artifact, ArtifactError where its manifest is wrong, ConsistencyError
    where the gate refuses.
    """
    directory = Path(path)
    file = directory / layout.MANIFEST
    if file.is_symlink() or not file.is_file():
        raise layout.no_artifact(directory)
    artifact = Artifact(directory, manifest.read_bytes(file))
    if student is not None:
        gate.enforce(gate.judge(artifact.manifest.inputs, student))
    return artifact
