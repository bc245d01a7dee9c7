"""What a source lists, beside what the manifest says: a remote copy is compared without downloading a part of it.

The sha256 of a file in the manifest is, without its prefix, the id that the Hub's LFS gives it. Other sources know
sizes alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lopd_store import layout
from lopd_store.checks import Finding, finding
from lopd_store.manifest import Manifest
from lopd_store.sources import Listed
from lopd_store.view import View


def check_listing(manifest: Manifest, view: View, listed: Mapping[str, Listed]) -> Iterator[Finding]:
    """A020 every file of the view is listed, A021 with its size, A022 and its sha256 where the source says one."""
    for number in view.parts:
        for kind in view.kinds:
            path, entry = layout.part_file(number, kind), manifest.parts[number].files[kind]
            there = listed.get(path)
            if there is None:
                yield finding("A020", path, "a file is missing or not a plain file")
            elif there.size != entry.size:
                yield finding("A021", path, "size differs", f"{entry.size} bytes", f"{there.size} bytes")
            elif there.sha256 not in (None, entry.sha256):
                yield finding("A022", path, "digest differs", entry.sha256, there.sha256)
