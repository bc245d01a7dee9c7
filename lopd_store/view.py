"""Views: copies that hold a part of an artifact and say so.

A copy without a view holds every file of the manifest. `view.json` names the artifact by its fingerprint and says which
kinds of files of which parts this copy holds; everything else about it, the manifest included, is the artifact's own.
The sampled-only view, token files alone, is what the objective `sampled` trains on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopd_store import layout, strictjson
from lopd_store.errors import ArtifactError
from lopd_store.manifest import Manifest

_FORMAT = "lopd-view"
MAX_VIEW_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class View:
    """Which files of an artifact a copy holds."""

    kinds: tuple[str, ...]  # in the order of `layout.FILE_KINDS`, token files always among them
    parts: range

    @property
    def has_topk(self) -> bool:
        """Whether the copy holds top-k files."""
        return layout.TOPK in self.kinds

    def is_whole(self, manifest: Manifest) -> bool:
        """Whether nothing is left out."""
        return self == whole(manifest)

    def files(self) -> list[str]:
        """The relative path of every file of a part that the copy holds."""
        return [layout.part_file(number, kind) for number in self.parts for kind in self.kinds]

    def to_json(self, fingerprint: str) -> dict[str, Any]:
        """What view.json holds."""
        parts = [self.parts.start, self.parts.stop]
        return {"format": _FORMAT, "fingerprint": fingerprint, "kinds": list(self.kinds), "parts": parts}


def whole(manifest: Manifest) -> View:
    """The view of everything."""
    return View(kinds=layout.FILE_KINDS, parts=range(len(manifest.parts)))


def read_view(directory: Path, manifest: Manifest, fingerprint: str) -> View:
    """The view of a copy; everything where it has no view.json. Raises ArtifactError where that is wrong."""
    path = directory / layout.VIEW
    if not path.exists() and not path.is_symlink():
        return whole(manifest)
    if path.is_symlink() or not path.is_file():
        raise ArtifactError(f"`{layout.VIEW}` is not a plain file", code="A003")
    with path.open("rb") as file:
        return parse_view(file.read(MAX_VIEW_BYTES + 1), manifest, fingerprint)


def parse_view(data: bytes, manifest: Manifest, fingerprint: str) -> View:
    """The view of this artifact that these bytes are. Raises ArtifactError where they are none."""
    value = strictjson.loads(data, where=layout.VIEW, max_bytes=MAX_VIEW_BYTES)
    kinds, parts = (value.get("kinds"), value.get("parts")) if isinstance(value, dict) else (None, None)
    if (
        isinstance(kinds, list)
        and isinstance(parts, list)
        and [kind for kind in layout.FILE_KINDS if kind in kinds] == kinds
        and layout.TOKENS in kinds
        and len(parts) == 2
        and all(type(number) is int for number in parts)
        and 0 <= parts[0] < parts[1] <= len(manifest.parts)
    ):
        view = View(kinds=tuple(kinds), parts=range(*parts))
        if view.to_json(fingerprint) == value:
            return view
    raise ArtifactError(
        f"`{layout.VIEW}` is not a view of this artifact",
        code="A003",
        expected=f"kinds of files and a range of parts of {fingerprint}",
        actual=repr(value)[:300],
    )
