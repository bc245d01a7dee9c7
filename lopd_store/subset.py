"""Subsets: a copy that holds a part of an artifact, says so, and can be verified and trained on by itself.

subset("artifact", output="sampled", only="sampled")        # token files alone
subset("artifact", output="first", parts=range(0, 4))
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from lopd_store import layout, reader, sources, strictjson
from lopd_store.durable import link_or_copy, making, write_durably
from lopd_store.errors import ArtifactError, InputError
from lopd_store.verifier import OnBytes, verify
from lopd_store.view import View

Only = Literal["sampled"]


def subset(
    path: str | Path,
    *,
    output: str | Path,
    only: Only | None = None,
    parts: range | None = None,
    on_bytes: OnBytes | None = None,
) -> reader.Artifact:
    """Copy some files of an artifact and verify the copy before it appears at `output`; returns it opened.

    `only="sampled"` leaves out top-k and tables, `parts` all other parts. Manifest and fingerprint stay the artifact's.
    Files are linked where the file system can, which takes no room.
    """
    if sources.is_url(path):
        raise InputError(f"`{path}` is not on this machine", hint="`lopd-store pull` takes `--only` and `--parts`, too")
    artifact, output = reader.open(path), Path(output)
    if output.exists():
        raise InputError(f"`{output}` exists", hint="choose another `--output`, or move it away")
    chosen = choose(artifact.view, only, parts)
    with making(output) as copying:
        (copying / layout.PARTS).mkdir(parents=True)
        for name in chosen.files():
            if not (artifact.path / name).is_file():
                raise ArtifactError(f"`{name}` is missing", hint=f"lopd-store verify {artifact.path}")
            link_or_copy(artifact.path / name, copying / name)
        for name in (layout.MANIFEST, *layout.documents(artifact.path)):
            (copying / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(artifact.path / name, copying / name)
        if not chosen.is_whole(artifact.manifest):
            write_view(copying, chosen, artifact.fingerprint)
        verify(copying, on_bytes=on_bytes).require_ok()
    return reader.open(output)


def choose(view: View, only: Only | None, parts: range | None) -> View:
    """The view of a part of what there is."""
    if parts is not None and not (view.parts.start <= parts.start < parts.stop <= view.parts.stop and parts.step == 1):
        raise InputError(
            "`parts` is out of range",
            expected=f"{view.parts.start}:{view.parts.stop} or less",
            actual=f"{parts.start}:{parts.stop}",
        )
    return View(kinds=(layout.TOKENS,) if only else view.kinds, parts=parts or view.parts)


def write_view(directory: Path, view: View, fingerprint: str) -> None:
    """Let a copy say what it holds."""
    write_durably(directory / layout.VIEW, strictjson.pretty(view.to_json(fingerprint)))
