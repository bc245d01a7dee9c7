"""A git-like repository in memory, as the Hub keeps one: files, commits, branches and tags; nothing about HTTP.

Everything is deterministic: the same commits in the same order have the same object ids and dates.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath

LFS_SUFFIXES = (".bin", ".parquet", ".png", ".safetensors", ".zip")
FIRST_COMMIT = datetime(2026, 1, 1, tzinfo=UTC)


class HubError(Exception):
    """A request that the Hub refuses: the HTTP status, the text of `X-Error-Message` and the `X-Error-Code`."""

    def __init__(self, status: int, message: str, *, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        text = message.encode("ascii", "backslashreplace").decode()  # a header holds no more
        self.headers = {"X-Error-Message": text, **({"X-Error-Code": code} if code else {}), **(headers or {})}


@dataclass(frozen=True, kw_only=True)
class File:
    """A stored file; `data` is what it is, the other fields are what the Hub says it is."""

    data: bytes
    size: int
    oid: str  # SHA-1 of the git blob: of the bytes or, in LFS, of the pointer to them
    sha256: str | None = None  # of the bytes, in LFS only
    pointer_size: int = 0  # in LFS only

    @classmethod
    def regular(cls, data: bytes) -> "File":
        return cls(data=data, size=len(data), oid=git_blob_oid(data))

    @classmethod
    def lfs(cls, data: bytes) -> "File":
        sha256 = hashlib.sha256(data).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
        return cls(data=data, size=len(data), oid=git_blob_oid(pointer), sha256=sha256, pointer_size=len(pointer))


@dataclass(frozen=True, kw_only=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    date: datetime
    files: Mapping[str, File]


@dataclass(kw_only=True)
class PullRequest:
    """A pull request; its branch is `refs/pr/NUMBER`."""

    number: int
    title: str
    author: str
    status: str = "draft"  # or "open", "closed", "merged"

    @property
    def branch(self) -> str:
        return f"refs/pr/{self.number}"


@dataclass(kw_only=True)
class Repository:
    """One repository; a new one has the Hub's own first commit, which holds `.gitattributes`."""

    type: str  # "model", "dataset" or "space"
    id: str  # OWNER/NAME
    private: bool = False
    gated: bool | str = False  # False, "auto" or "manual"
    commits: dict[str, Commit] = field(default_factory=dict)  # by object id, oldest first
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: list[PullRequest] = field(default_factory=list)

    def __post_init__(self) -> None:
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        self.commit("main", {".gitattributes": File.regular(attributes.encode())}, title="initial commit")

    def commit(self, branch: str, files: Mapping[str, File], *, title: str, message: str = "") -> Commit:
        """Make `files` the whole content of the branch."""
        parent = self.branches.get(branch)
        content = [parent, len(self.commits), title, message, {path: files[path].oid for path in sorted(files)}]
        commit = Commit(
            oid=hashlib.sha1(json.dumps(content).encode()).hexdigest(),
            parent=parent,
            title=title,
            message=message,
            date=FIRST_COMMIT + timedelta(minutes=len(self.commits)),
            files=dict(sorted(files.items())),
        )
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a full object id names."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return self.commits[oid]

    def merge(self, request: PullRequest) -> Commit:
        """What the owner of a repository does with a pull request on its page."""
        request.status = "merged"
        return self.commit("main", self.at(request.branch).files, title=f"Merge {request.title}")

    def history(self, revision: str) -> Iterator[Commit]:
        """The commit and its ancestors, newest first."""
        commit = self.at(revision)
        yield commit
        while commit.parent is not None:
            commit = self.commits[commit.parent]
            yield commit

    def overwrite(self, path: str, data: bytes, *, revision: str, honest: bool) -> None:
        """Change a file inside an existing commit, which no honest Hub does; see `HubServer.overwrite`."""
        commit = self.at(revision)
        before = commit.files.get(path)
        if before is not None and not honest:
            after = replace(before, data=data)
        else:
            after = File.lfs(data) if path.endswith(LFS_SUFFIXES) else File.regular(data)
        self.commits[commit.oid] = replace(commit, files={**commit.files, path: after})


def list_entries(files: Mapping[str, File], folder: str, *, recursive: bool) -> dict[str, File | None]:
    """The paths in a folder, in order; "" is the root, and the value of a folder is None."""
    entries: dict[str, File | None] = {}
    for path, file in files.items():
        entries[path] = file
        entries.update((str(parent), None) for parent in PurePosixPath(path).parents if parent.name)
    start = f"{folder}/" if folder else ""
    return {
        path: entries[path]
        for path in sorted(entries)
        if path.startswith(start) and (recursive or "/" not in path.removeprefix(start))
    }


def git_blob_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
