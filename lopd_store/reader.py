"""Reading artifacts: the manifest at once, parts when they are needed.

    artifact = lopd_store.open("artifact")      # or hf://acme/dapo-17k-qwen3-8b@TAG, s3://bucket/artifact
    for part in artifact.parts():       # fetched and decoded ahead in the background
        part.sampled_logprobs
    artifact.rollout(3)

Opening reads the manifest only; a part is compared with its xxh3 when it is read, and `verify` checks everything else.
A part that comes from elsewhere is compared with its sha256 before that, and kept in a bounded cache.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from lopd_store import gate, layout, manifest, sources
from lopd_store.cache import read_cached
from lopd_store.contents import check_contents
from lopd_store.digest import FileDigests, digest_bytes
from lopd_store.errors import ArtifactError, InputError
from lopd_store.hub import require_fingerprint
from lopd_store.identity import ModelIdentity
from lopd_store.manifest import Manifest
from lopd_store.part import Part, read_part
from lopd_store.topk import TopK
from lopd_store.view import MAX_VIEW_BYTES, View, parse_view, read_view, whole

ReadFile = Callable[[str, FileDigests], bytes]


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
    """An opened artifact, or a copy of a part of one: manifest and fingerprint in memory, parts elsewhere."""

    def __init__(
        self, place: str | Path, data: bytes, view_of: Callable[[Manifest, str], View], read: ReadFile
    ) -> None:
        self.place = str(place)  # a directory or a URL
        self.path = Path(place)
        self.manifest_bytes = data
        self.manifest = manifest.parse(data, where=f"{place}/{layout.MANIFEST}")
        self.fingerprint = digest_bytes(data)
        self.view = view_of(self.manifest, self.fingerprint)
        self._read_file = read

    def __len__(self) -> int:
        """Rollouts of the artifact, also of those that a partial copy lacks."""
        return self.manifest.counts.rollouts

    @property
    def rollouts(self) -> range:
        """The numbers of the rollouts that are here: all, but in a copy of some parts."""
        starts = [*self._first_rollouts, len(self)]
        return range(starts[self.view.parts.start], starts[self.view.parts.stop])

    def rollouts_of(self, index: int) -> range:
        """The numbers of those of `rollouts` that are of this input of the manifest."""
        parts, here = self.manifest.parts_of(index), self.view.parts
        starts, first = [*self._first_rollouts, len(self)], max(parts.start, here.start)
        return range(starts[first], starts[max(first, min(parts.stop, here.stop))])

    def part(self, number: int, *, check: bool = False) -> Part:
        """Decode one part; raises ArtifactError where its bytes are not those of the manifest.

        With `check`, also where its values break a rule of the format, as `verify` would find. Whoever trains on a part
        that nobody may have verified asks for it.
        """
        if number not in self.view.parts:
            raise InputError(
                f"there is no part {number} in `{self.place}`",
                expected=f"{self.view.parts.start} to {self.view.parts.stop - 1}",
            )
        contents = {kind: self._read(number, kind) for kind in (layout.TOKENS, layout.TOPK) if kind in self.view.kinds}
        for found in check_contents(number, contents, self.manifest) if check else ():
            raise replace(found, hint=f"this is what `{self.place}` holds: ask whoever made it").to_error()
        return read_part(
            contents[layout.TOKENS],
            contents.get(layout.TOPK),
            self.manifest.encoding,
            self.manifest.parts[number].counts,
            where=layout.part_name(number),
        )

    def parts(self, *, ahead: int = 1, check: bool = False) -> Iterator[Part]:
        """All parts in order, checked or not; the next `ahead` are decoded while the caller works on this one."""
        waiting: deque[Future[Part]] = deque()
        with ThreadPoolExecutor(max_workers=max(ahead, 1)) as pool:
            for number in self.view.parts:
                waiting.append(pool.submit(self.part, number, check=check))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def batches(self, positions: int, *, check: bool = False) -> Iterator[Part]:
        """All rollouts in order, in batches of whole rollouts with at most so many positions (one rollout at least).

        A batch is flat arrays with offsets, views of its part without copy or padding; none spans two parts.
        `torch.from_numpy` takes them as they are. With `check`, each part's values are checked first, see `part`.
        """
        for part in self.parts(check=check):
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
        data = self._read_file(name, entry)
        if len(data) != entry.size or xxhash.xxh3_128_hexdigest(data) != entry.xxh3_128:
            raise ArtifactError(f"`{name}` was damaged", hint=f"lopd-store verify {self.place}")
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


def open(place: str | Path, *, student: ModelIdentity | None = None) -> Artifact:
    """Open a sealed artifact, in a directory or at a URL; given a student's identity, the gate must find it consistent.

    Raises InputError where there is no artifact, ArtifactError where its manifest is wrong, ConsistencyError
    where the gate refuses.
    """
    artifact = open_source(sources.find(place)) if sources.is_url(place) else _open_directory(Path(place))
    if student is not None:
        gate.enforce(gate.judge(artifact.manifest.inputs, student))
    return artifact


def _open_directory(directory: Path) -> Artifact:
    file = directory / layout.MANIFEST
    if file.is_symlink() or not file.is_file():
        raise layout.no_artifact(directory)

    def read(name: str, entry: FileDigests) -> bytes:
        path = directory / name
        if path.parent.is_symlink() or path.is_symlink() or not path.is_file():
            raise ArtifactError(f"`{name}` is missing or not a plain file", hint=f"lopd-store verify {directory}")
        # The size first, so that a manifest cannot make us ask for more memory than there are bytes to read.
        return path.read_bytes() if path.stat().st_size == entry.size else b""

    return Artifact(directory, manifest.read_bytes(file), partial(read_view, directory), read)


def open_source(source: sources.Source, *, fingerprint: str | None = None) -> Artifact:
    """Open an artifact where it is; refuses any other than the one with this fingerprint, where one is given."""
    data = source.read(layout.MANIFEST, manifest.MAX_MANIFEST_BYTES)
    if data is None:
        raise ArtifactError(
            f"`{source.name}` is not an artifact", expected=f"`{layout.MANIFEST}`", actual="no such file"
        )
    view = source.read(layout.VIEW, MAX_VIEW_BYTES)
    artifact = Artifact(
        source.name,
        data,
        lambda manifest, fingerprint: whole(manifest) if view is None else parse_view(view, manifest, fingerprint),
        lambda name, entry: read_cached(name, entry, source.fetch),
    )
    require_fingerprint(artifact.fingerprint, source.name, wanted=fingerprint, revision=source.revision)
    return artifact
