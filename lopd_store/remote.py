"""Object storage as the place where an artifact goes: `s3://bucket/name`, or any other address that fsspec knows.

Parts are scored into a build in progress on this machine and each is sent as soon as it is done: its files, then its
note; then the files here are removed. The manifest goes last and only once, so what lacks one is no artifact. A
build resumed anywhere reads from the notes which parts are there. Two builders that send the same part send the same
bytes, so nothing here needs a lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lopd_store import building as in_progress
from lopd_store import layout, strictjson
from lopd_store.building import COMMAND, PLAN, SFT_AUDIT, TOOLS
from lopd_store.durable import write_durably
from lopd_store.errors import ArtifactError, InputError, LopdError, UnavailableError
from lopd_store.plan import Plan
from lopd_store.scoring import DONE, is_done, note_path, read_note


def is_remote(output: str | Path) -> bool:
    """Whether an output is an address rather than a path."""
    return "://" in str(output)


class Remote:
    """A prefix in object storage that an artifact is being made under."""

    def __init__(self, address: str) -> None:
        try:
            import fsspec
        except ImportError as error:
            raise InputError("object storage needs fsspec", hint='pip install "lopd[s3]"') from error
        self.address = address.rstrip("/")
        if self.address.startswith("hf:"):
            raise InputError(
                f"`{address}` is on the Hub, where nothing is built",
                hint="build into a directory, and `lopd-store push` it",
            )
        if not self.address.partition("://")[2]:
            raise InputError(f"`{address}` has no name", expected="for example s3://bucket/name")
        try:
            options = {"auto_mkdir": True} if self.address.startswith("file:") else {}
            self._files, self._root = fsspec.core.url_to_fs(self.address, **options)
        except (ImportError, ValueError) as error:
            raise InputError(
                f"`{address}` cannot be opened", actual=str(error), hint='pip install "lopd[s3]"'
            ) from error
        name = self._root.rstrip("/").rpartition("/")[2]
        self.building = layout.building_directory(Path(name))  # here, until the parts are sent

    def require_free(self) -> None:
        """Raise InputError where an artifact is there already."""
        if self._read(layout.MANIFEST) is not None:
            raise InputError(f"`{self.address}` exists", hint="choose another `--output`")

    def begin(self, plan: Plan, command: list[str]) -> None:
        """Leave the plan there, or check that what is there follows the same; fetch the notes of the parts there."""
        data = strictjson.pretty(plan.to_json())
        if not self._create(PLAN, data):
            found = strictjson.loads(self._read(PLAN) or b"", where=f"{self.address}/{PLAN}")
            in_progress.require_same(plan.to_json(), found, self.address)
        self._create(COMMAND, strictjson.pretty(command))
        self.fetch()

    def fetch(self) -> None:
        """Bring the build in progress here up to what is there: plan and notes, not parts."""
        (self.building / layout.PARTS).mkdir(parents=True, exist_ok=True)
        (self.building / DONE).mkdir(exist_ok=True)
        for name in (*TOOLS, *(f"{DONE}/{name}" for name in self._names(DONE))):
            if not (self.building / name).is_file() and (data := self._read(name)) is not None:
                write_durably(self.building / name, data)

    def send_what_is_missing(self, numbers: Iterable[int]) -> None:
        """Send what an earlier run has made and not sent; a part that is neither here nor there is not done."""
        if (self.building / SFT_AUDIT).is_file():
            self._create(SFT_AUDIT, (self.building / SFT_AUDIT).read_bytes())
        there = set(self._names(DONE))
        for number in numbers:
            if is_done(self.building, number) and f"{number:05d}.json" not in there:
                if (self.building / layout.part_file(number, layout.TOPK)).is_file():
                    self.send(number)
                else:
                    note_path(self.building, number).unlink()

    def send(self, number: int) -> None:
        """Send a part that is done, its note last, and remove its files here."""
        note = read_note(self.building, number)
        paths = {kind: self.building / layout.part_file(number, kind) for kind in note.files}
        for kind, path in paths.items():
            self._write(layout.part_file(number, kind), path.read_bytes())
        self._create(f"{DONE}/{number:05d}.json", note_path(self.building, number).read_bytes())
        for path in paths.values():
            path.unlink()

    def seal(self, plan: Plan, data: bytes) -> None:
        """Check that every file is there, send card, build record and manifest, and remove what only a build has."""
        sizes = self._sizes(layout.PARTS)
        for number in range(len(plan.parts)):
            for kind, digests in in_progress.checked_note(self.building, number, plan).files.items():
                name = layout.part_file(number, kind)
                if sizes.get(name) != digests.size:
                    raise ArtifactError(
                        f"`{self.address}/{name}` is not what was sent",
                        expected=f"{digests.size} bytes",
                        actual=f"{sizes[name]} bytes" if name in sizes else "nothing",
                        hint=f"remove `{self.address}/{DONE}/{number:05d}.json` and score the part again",
                    )
        for name in (layout.BUILD_RECORD, layout.CARD):
            self._write(name, (self.building / name).read_bytes())
        if not self._create(layout.MANIFEST, data) and self._read(layout.MANIFEST) != data:
            raise InputError(f"`{self.address}` exists", hint="choose another `--output`")
        left = [name for name in TOOLS if self._read(name) is not None]
        left += [f"{DONE}/{name}" for name in self._names(DONE)]
        with self._errors():
            self._files.rm([self._path(name) for name in left])
        in_progress.remove(self.building)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _read(self, name: str) -> bytes | None:
        with self._errors():
            try:
                return bytes(self._files.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def _write(self, name: str, data: bytes) -> None:
        with self._errors():
            self._files.pipe_file(self._path(name), data)

    def _create(self, name: str, data: bytes) -> bool:
        """Write what must not be there yet; whether it was not."""
        with self._errors():
            try:
                self._files.pipe_file(self._path(name), data, mode="create")
            except Exception:  # not every server says which condition failed
                if self._read(name) is None:
                    raise
                return False
            return True

    def _sizes(self, directory: str) -> dict[str, int]:
        """The files under a directory, by their names, with their sizes."""
        with self._errors():
            self._files.invalidate_cache()
            try:
                found = self._files.ls(self._path(directory), detail=True)
            except FileNotFoundError:
                return {}
        return {f"{directory}/{item['name'].rpartition('/')[2]}": int(item["size"]) for item in found}

    def _names(self, directory: str) -> list[str]:
        return [name.removeprefix(f"{directory}/") for name in self._sizes(directory)]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Say that it was the storage that refused or did not answer."""
        try:
            yield
        except PermissionError as error:
            raise InputError(
                f"`{self.address}` refuses access",
                actual=_first_line(error),
                hint="give the credentials as its client expects them, for S3 in AWS_ACCESS_KEY_ID and others",
            ) from error
        except FileNotFoundError as error:
            raise InputError(f"no such place as `{self.address}`", actual=_first_line(error)) from error
        except LopdError:
            raise
        except Exception as error:  # each library below fsspec has errors of its own
            raise UnavailableError(
                f"`{self.address}` did not answer as it should",
                actual=_first_line(error),
                hint="run the same command again: what is done stays",
            ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
