"""The directory of a build in progress: begun once, worked on by one builder or by one per share, sealed at the end.

plan.json says what is to be made, `done/` which parts are. A builder holds a lock that the system takes back when the
process ends, however it ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import shlex
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lopd_store import layout, plots, strictjson
from lopd_store.card import render_card
from lopd_store.digest import digest_bytes
from lopd_store.durable import NO_LOCKS, remove_unfinished, sync_directory, write_durably
from lopd_store.errors import DataError, InputError, LopdError, UnavailableError
from lopd_store.manifest import Manifest, render, total
from lopd_store.noise import Noise
from lopd_store.part import read_part
from lopd_store.plan import Plan, differences
from lopd_store.scoring import DONE, DoneNote, is_done, read_note
from lopd_store.statistic import SftAudit, add_up

PLAN = "plan.json"
NOISE = "noise.json"  # of the engine, as it was before the first part
COMMAND = "command.json"  # what was typed, for people who have to type it again
SFT_AUDIT = "sft-audit.json"
SKIPPED = "skipped_rollouts"  # in the manifest's annotations
TOOLS = (PLAN, COMMAND, NOISE, SFT_AUDIT)
_LOCK = "lock"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MAX_DIFFERENCES = 4


@dataclass(frozen=True, kw_only=True)
class Share:
    """Every `of`-th part: what one job of a batch scheduler scores; counted from 1."""

    index: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Share:
        """Read `I/N`."""
        index, slash, of = text.partition("/")
        if not (slash and index.isdecimal() and of.isdecimal() and 1 <= int(index) <= int(of) <= layout.MAX_PARTS):
            raise InputError(f"`--part {text}` is not a share of the parts", expected="I/N, from 1/N to N/N")
        return cls(index=int(index), of=int(of))

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"

    def parts(self, count: int) -> range:
        """The numbers of its parts, of so many."""
        return range(self.index - 1, count, self.of)


def begin(building: Path, plan: Plan, command: Sequence[str]) -> None:
    """Make the directory of the build in progress, or check that the one there follows the same plan."""
    path, wanted = building / PLAN, plan.to_json()
    if path.is_file():
        found = strictjson.loads(path.read_bytes(), where=str(path))
        if any((building / DONE).glob("*.json")):
            require_same(wanted, found, str(building))
            return
        if found != wanted:
            (building / SFT_AUDIT).unlink(missing_ok=True)
    (building / layout.PARTS).mkdir(parents=True, exist_ok=True)
    (building / DONE).mkdir(exist_ok=True)
    write_durably(building / COMMAND, strictjson.pretty(list(command)))
    write_durably(path, strictjson.pretty(wanted))


def write_noise(building: Path, noise: Noise) -> None:
    """Note the noise of the engine; it merely happened, so it is in build.json and not in the manifest."""
    write_durably(building / NOISE, strictjson.pretty(noise.to_json()))


def read_noise(building: Path) -> dict[str, Any] | None:
    """What was noted of the noise, or None where nothing was."""
    path = building / NOISE
    return dict(strictjson.loads(path.read_bytes(), where=str(path))) if path.is_file() else None


def require_same(wanted: dict[str, Any], found: Any, where: str) -> None:
    """Raise InputError, naming what changed, where the plan of a build in progress is another one."""
    changed = list(differences(wanted, found))
    if not changed:
        return
    named = [(f"`{path}` {_short(old)}", _short(new)) for path, new, old in changed[:_MAX_DIFFERENCES]]
    more = f", and {len(changed) - _MAX_DIFFERENCES} more" if len(changed) > _MAX_DIFFERENCES else ""
    libraries = all(path.startswith("versions.") for path, *_ in changed)
    raise InputError(
        f"`{where}` was begun with another plan",
        expected=", ".join(old for old, _ in named) + more,
        actual=", ".join(new for _, new in named) + more,
        hint=("install what it was begun with" if libraries else "go on with the old settings")
        + f", or remove `{where}` to begin anew",
    )


@contextmanager
def locked(building: Path, share: Share | None = None) -> Iterator[None]:
    """Keep every other builder out, or with a share those that score the same share or everything.

    The lock is the system's, so a killed builder leaves none; what is written into the file only says who it was.
    """
    building.mkdir(parents=True, exist_ok=True)
    name = f"{_LOCK}.all" if share is None else f"{_LOCK}.{share.index}-of-{share.of}"
    with (building / _LOCK).open("a") as common, (building / name).open("a+") as own:
        try:
            fcntl.flock(common, fcntl.LOCK_NB | (fcntl.LOCK_EX if share is None else fcntl.LOCK_SH))
            fcntl.flock(own, fcntl.LOCK_NB | fcntl.LOCK_EX)
        except BlockingIOError as error:
            raise InputError(
                f"another build works on `{building}`",
                actual="; ".join(_holders(building)) or "it has just begun or just ended",
                hint="wait for it, or stop it: a build that was killed leaves no lock",
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise  # else a file system without locks: two builders would make the same bytes twice
        own.truncate(0)
        own.write(f"process {os.getpid()} on {socket.gethostname()}, since {_now()}")
        own.flush()
        yield


@contextmanager
def what_is_done_stays(building: Path, share: Share | None) -> Iterator[None]:
    """Leave nothing behind where the inputs turn out to be wrong at the first part; say where there is no room."""
    try:
        yield
    except LopdError:
        if share is None and not any((building / DONE).glob("*.json")):
            remove(building)
        raise
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise UnavailableError(
            f"no room for `{building}`",
            actual=os.strerror(error.errno),
            hint="make room and run the same command again: what is done stays",
        ) from error


def copy_tools(source: Path, building: Path) -> None:
    """Make a build in progress of the plan of another one, where there is none; its parts are not copied."""
    (building / layout.PARTS).mkdir(parents=True, exist_ok=True)
    (building / DONE).mkdir(exist_ok=True)
    for name in TOOLS:
        if (source / name).is_file() and not (building / name).is_file():
            write_durably(building / name, (source / name).read_bytes())
    for path in source.glob(f"{_LOCK}.*-of-*"):  # which shares there are
        (building / path.name).touch()


def read_plan(building: Path) -> Plan:
    """The plan of a build in progress."""
    path = building / PLAN
    if not path.is_file():
        raise InputError(f"no build in progress at `{building}`", expected=f"a directory with `{PLAN}`")
    return Plan.from_json(strictjson.loads(path.read_bytes(), where=str(path)), where=str(path))


def missing_parts(building: Path, plan: Plan) -> list[int]:
    """The numbers of the parts that are not done."""
    return [number for number in range(len(plan.parts)) if not is_done(building, number)]


def require_whole(building: Path, plan: Plan) -> None:
    """Raise DataError, with the commands to type, where parts are missing."""
    missing = missing_parts(building, plan)
    without_audit = plan.sft_data is not None and not (building / SFT_AUDIT).is_file()
    if not missing and not without_audit:
        return
    shares = _shares_of(building, [0, *missing] if without_audit else missing)
    command = ["lopd-store", "build", *strictjson.loads((building / COMMAND).read_bytes(), where=COMMAND)]
    lines = [shlex.join([*command, *(["--part", str(share)] if share else [])]) for share in shares]
    raise DataError(
        f"`{building}` is not whole",
        expected=f"{len(plan.parts)} parts",
        actual=f"{len(missing)} missing: {', '.join(map(str, missing[:10]))}{', …' if len(missing) > 10 else ''}"
        if missing
        else "the audit of the SFT data is missing",
        hint="score what is missing:\n" + "\n".join(f"  {line}" for line in lines),
    )


def write_seal(plan: Plan, building: Path, *, workers: int | None) -> bytes:
    """Write manifest, card and build record; gives the manifest's bytes."""
    remove_unfinished(building / layout.PARTS)
    notes = [checked_note(building, number, plan) for number in range(len(plan.parts))]
    entries = tuple(note.entry for note in notes)
    skipped = sorted([*plan.skipped, *(bad for note in notes for bad in note.skipped)], key=lambda bad: bad.row)
    audits = [note.audit for note in notes if note.audit is not None]
    rollouts_audit = add_up(audits) if audits else None
    manifest = Manifest(
        counts=total(entries),
        encoding=plan.encoding,
        inputs=(replace(plan.inputs, sft_audit=read_sft_audit(building, plan), rollouts_audit=rollouts_audit),),
        parts=entries,
        reference_logprobs=plan.reference_logprobs,
        text=plan.text,
        annotations={SKIPPED: len(skipped)} if skipped else {},
    )
    data = render(manifest)
    seconds = sum(note.seconds for note in notes)
    happened = {
        "finished": _now(),
        "seconds": round(seconds, 3),  # of scoring, of all workers together
        "positions_per_second": round(manifest.counts.positions / max(seconds, 1e-9), 1),  # of one worker
        "workers": workers,  # None where several jobs scored
        "threads": plan.threads,
        "tensor_parallel_size": plan.tensor_parallel_size,
        "device": plan.device,
        "plan": plan.digest,
        "noise": read_noise(building),
        "padding": _mean_padding(notes),
        "skipped": [{"row": bad.row, "why": bad.why} for bad in skipped],
        "python": platform.python_version(),
        "versions": plan.versions,
    }
    write_durably(building / layout.BUILD_RECORD, strictjson.pretty(happened))
    write_card(building, manifest, data)
    write_durably(building / layout.MANIFEST, data)
    return data


def _mean_padding(notes: Sequence[DoneNote]) -> float | None:
    """Mass that the teacher gives to ids beyond its tokenizer's, the mean over all positions; part of every tail."""
    positions, sums = sum(note.counts.positions for note in notes), [note.padding for note in notes]
    known = [one for one in sums if one is not None]
    return sum(known) / positions if positions and len(known) == len(sums) else None


def write_card(directory: Path, manifest: Manifest, data: bytes) -> None:
    """Write the card of the artifact whose manifest has these bytes, and its plots.

    They are of the first part, which is not here any more where an artifact is built into object storage.
    """
    images: dict[str, bytes] = {}
    tokens, topk = (directory / layout.part_file(0, kind) for kind in (layout.TOKENS, layout.TOPK))
    if tokens.is_file() and topk.is_file():
        counts, where = manifest.parts[0].counts, layout.part_name(0)
        part = read_part(tokens.read_bytes(), topk.read_bytes(), manifest.encoding, counts, where=where)
        images = plots.draw(part)
    for name, image in images.items():
        (directory / name).parent.mkdir(exist_ok=True)
        write_durably(directory / name, image)
    write_durably(directory / layout.CARD, render_card(manifest, digest_bytes(data), plots=list(images)).encode())


def read_sft_audit(building: Path, plan: Plan) -> SftAudit | None:
    """What the audit of the SFT data has found; None where there is none to audit."""
    if plan.sft_data is None:
        return None
    path = building / SFT_AUDIT
    return SftAudit.from_json(strictjson.loads(path.read_bytes(), where=str(path)), where=str(path))


def rename_into_place(building: Path, output: Path) -> None:
    """Let a build whose manifest is written appear as an artifact."""
    building.rename(output)
    sync_directory(output.parent)
    # What a resumed build needs goes last: killed before this, the same call finds every part done and seals again.
    _remove_tools(output)


def checked_note(building: Path, number: int, plan: Plan) -> DoneNote:
    """The note of a part that is done; raises DataError where it was scored under another plan."""
    note = read_note(building, number)
    if note.plan != plan.digest:
        raise DataError(
            f"part {number} of `{building}` was scored under another plan",
            expected=plan.digest,
            actual=note.plan,
            hint=f"remove `{building / DONE}/{number:05d}.json` and score it again",
        )
    return note


def remove(building: Path) -> None:
    """Remove a build in progress that nobody needs any more; files of others stay."""
    for name in (layout.PARTS, layout.PLOTS):
        shutil.rmtree(building / name, ignore_errors=True)
    for name in (layout.MANIFEST, layout.CARD, layout.BUILD_RECORD):
        (building / name).unlink(missing_ok=True)
    _remove_tools(building)
    with suppress(OSError):  # not empty: somebody else's files
        building.rmdir()


def _remove_tools(directory: Path) -> None:
    """Everything that only a build in progress has."""
    for name in TOOLS:
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / DONE, ignore_errors=True)
    remove_unfinished(directory)
    for path in (directory / _LOCK, *directory.glob(f"{_LOCK}.*")):
        path.unlink(missing_ok=True)


def _holders(building: Path) -> list[str]:
    """What the builders that hold a lock have written into it."""
    return [words for path in sorted(building.glob(f"{_LOCK}.*")) if (words := _words_of_holder(path))]


def _words_of_holder(path: Path) -> str:
    with suppress(OSError), path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_NB | fcntl.LOCK_SH)
        except BlockingIOError:
            return file.read(500)
    return ""


def _shares_of(building: Path, missing: Sequence[int]) -> list[Share | None]:
    """The shares that the missing parts belong to, as the locks of their builders tell; else everything."""
    counts = {int(path.name.rpartition("-")[2]) for path in building.glob(f"{_LOCK}.*-of-*")}
    if len(counts) != 1:
        return [None]
    (of,) = counts
    return [Share(index=index, of=of) for index in sorted({number % of + 1 for number in missing})]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else strictjson.canonical(value).decode()
    return text if len(text) <= 40 else f"{text[:24]}…"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
