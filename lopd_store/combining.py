"""Combining: one artifact out of several, each with a teacher and a domain of its own; nothing is scored again.

    combine("of-math", "of-code", output="both")                # built with `--domain`
    combine(("math", "a"), ("code", "b"), output="both")        # built without

One student trains on all of it, and the gate holds every domain to its own SFT teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from lopd_store import layout, reader, sources, strictjson
from lopd_store import manifest as manifests
from lopd_store.building import SKIPPED, write_card
from lopd_store.durable import link_or_copy, making, write_durably
from lopd_store.errors import ArtifactError, InputError
from lopd_store.identity import TOKENIZER_FIELDS
from lopd_store.manifest import Inputs, Manifest
from lopd_store.plan import differences
from lopd_store.provenance import DOMAINS_EXPECTED, are_domains
from lopd_store.reader import Artifact
from lopd_store.verifier import OnBytes, verify


def combine(
    *artifacts: str | Path | tuple[str, str | Path], output: str | Path, on_bytes: OnBytes | None = None
) -> Artifact:
    """Make one artifact of several, in this order, and verify it before it appears at `output`; returns it opened.

    Each is a directory, or (domain, directory) where the artifact itself names none. Files are linked where the file
    system can, which takes no room. The same artifacts in the same order give the same fingerprint. `on_bytes` hears
    (bytes verified, in all). Raises InputError where they do not go together, ArtifactError where one is not right.
    """
    output = Path(output)
    if output.exists():
        raise InputError(f"`{output}` exists", hint="choose another `--output`, or move it away")
    if len(artifacts) < 2:
        raise InputError("there is nothing to combine", expected="two artifacts or more", actual=len(artifacts))
    named = [one if isinstance(one, tuple) else (None, one) for one in artifacts]
    opened = [_open(path) for _, path in named]
    for one in opened[1:]:
        _check_fits(opened[0], one)
    inputs = [_named(one, domain) for one, (domain, _) in zip(opened, named, strict=True)]
    data = manifests.render(_manifest(opened, inputs))
    manifest = manifests.parse(data)  # the writer's own check
    with making(output) as combining:
        (combining / layout.PARTS).mkdir(parents=True)
        _link_parts(opened, combining)
        write_durably(combining / layout.BUILD_RECORD, strictjson.pretty(_happened(opened)))
        write_durably(combining / layout.MANIFEST, data)
        if not verify(combining, on_bytes=on_bytes).ok:
            _refuse(opened, combining)
        write_card(combining, manifest, data)  # its plots are drawn from a part, which has to be right
    return reader.open(output)


def _open(path: str | Path) -> Artifact:
    if sources.is_url(path):
        raise InputError(f"`{path}` is not on this machine", hint="`lopd-store pull` brings it here")
    artifact = reader.open(path)
    if not artifact.view.is_whole(artifact.manifest):
        raise InputError(f"`{path}` is a copy of a part of an artifact", hint="combine whole artifacts")
    return artifact


def _check_fits(first: Artifact, other: Artifact) -> None:
    """What one manifest says once, both must have in common; so must teachers the meaning of a token id."""
    wanted, found = first.manifest, other.manifest
    teachers = wanted.inputs[0].teacher, found.inputs[0].teacher
    if names := [name for name in TOKENIZER_FIELDS if name in teachers[0].differences(teachers[1])]:
        shown = [", ".join(f"{name} {getattr(one, name)}" for name in names) for one in teachers]
        _do_not_fit(first, other, "another tokenizer", shown, "one student can only read one tokenizer's ids")
    if changed := list(differences(wanted.encoding.to_json(), found.encoding.to_json())):
        shown = [", ".join(f"`{name}` {values[side]}" for name, *values in changed) for side in (0, 1)]
        hint = "build all with the same `--k-max`, `--coverage` and so on, and with `--reference` all or none"
        _do_not_fit(first, other, "another encoding", shown, hint)
    for name, what, hint in (
        ("reference_logprobs", "reference log-probs", "`lopd-store generate` keeps them, and `build` takes them over"),
        ("text", "text", "build all with `--no-text`, or none"),
    ):
        claims = [getattr(one, name) for one in (wanted, found)]
        if claims[0] != claims[1]:
            shown = [what if claim else f"no {what}" for claim in claims]
            _do_not_fit(first, other, f"only one has {what}", shown, hint)


def _do_not_fit(first: Artifact, other: Artifact, what: str, shown: Sequence[str], hint: str) -> NoReturn:
    raise InputError(
        f"`{other.place}` does not go with `{first.place}`: {what}", expected=shown[0], actual=shown[1], hint=hint
    )


def _named(artifact: Artifact, domain: str | None) -> tuple[Inputs, ...]:
    """The inputs of an artifact, with the domain that was given to one that has none."""
    inputs = artifact.manifest.inputs
    if domain is None and inputs[0].domain is None:
        raise InputError(f"`{artifact.place}` names no domain", hint=f"name it: DOMAIN={artifact.place}")
    if domain is None:
        return inputs
    if inputs[0].domain is not None:
        raise InputError(
            f"`{artifact.place}` names what it is of itself",
            expected=", ".join(str(one.domain) for one in inputs),
            actual=domain,
            hint=f"leave out `{domain}=`",
        )
    return (replace(inputs[0], domain=domain),)


def _manifest(opened: Sequence[Artifact], inputs: Sequence[tuple[Inputs, ...]]) -> Manifest:
    """The manifest of all of them together, part after part."""
    first = opened[0].manifest
    listed = tuple(one for of_one in inputs for one in of_one)
    if not are_domains(domains := [one.domain for one in listed]):
        raise InputError(
            "the artifacts do not have a domain each", expected=DOMAINS_EXPECTED, actual=", ".join(map(str, domains))
        )
    parts = []
    for number, artifact in enumerate(opened):
        before = sum(map(len, inputs[:number]))
        parts += [replace(part, input=before + part.input) for part in artifact.manifest.parts]
    if len(parts) > layout.MAX_PARTS:
        raise InputError(f"{len(parts)} parts are too many", expected=f"at most {layout.MAX_PARTS}")
    skipped = [artifact.manifest.annotations.get(SKIPPED) for artifact in opened]
    skipped_in_all = sum(count for count in skipped if isinstance(count, int))
    return Manifest(
        counts=manifests.total(parts),
        encoding=first.encoding,
        inputs=listed,
        parts=tuple(parts),
        reference_logprobs=first.reference_logprobs,
        text=first.text,
        annotations={SKIPPED: skipped_in_all} if skipped_in_all else {},
    )


def _link_parts(opened: Sequence[Artifact], combining: Path) -> None:
    """Give the files of all parts their new numbers."""
    parts = [(artifact, number) for artifact in opened for number in range(len(artifact.manifest.parts))]
    for new, (artifact, number) in enumerate(parts):
        for kind in layout.FILE_KINDS:
            name = layout.part_file(number, kind)
            if not (artifact.path / name).is_file():
                raise ArtifactError(f"`{artifact.path / name}` is missing", hint=f"lopd-store verify {artifact.path}")
            link_or_copy(artifact.path / name, combining / layout.part_file(new, kind))


def _happened(opened: Sequence[Artifact]) -> dict[str, object]:
    """What build.json says of a combination."""
    of = [
        {"fingerprint": artifact.fingerprint, "domains": [one.domain for one in artifact.manifest.inputs]}
        for artifact in opened
    ]
    return {"finished": datetime.now(UTC).isoformat(timespec="seconds"), "combined": of}


def _refuse(opened: Sequence[Artifact], combining: Path) -> NoReturn:
    """Raise what is wrong in the first artifact that does not verify; else in what was made of them."""
    for directory in [*(artifact.path for artifact in opened), combining]:
        for found in verify(directory).findings[:1]:
            error = found.to_error()
            raise ArtifactError(
                f"`{directory}`: {error.message}",
                code=error.code,
                expected=error.expected,
                actual=error.actual,
                hint=f"lopd-store verify {directory}",
            )
    raise ArtifactError(f"`{combining}` was wrong, and is not any more", hint="run the same command again")
