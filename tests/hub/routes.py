"""What each URL of the Hub does, in the order of the client's day: who am I, create, upload, commit, tag, list, fetch.

A route is a function of the server and the request; what its URL names comes as further arguments: a repository, a
revision, a path. It returns an answer or raises `HubError`.
"""

import hashlib
import json
import re
from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode

import yaml

from tests.hub.repository import (
    LFS_SUFFIXES,
    Commit,
    File,
    HubError,
    PullRequest,
    Repository,
    git_blob_oid,
    list_entries,
)

if TYPE_CHECKING:
    from tests.hub.server import HubServer


@dataclass(frozen=True, kw_only=True)
class Request:
    method: str
    path: str  # still percent-encoded: a revision may contain a slash
    query: Mapping[str, str]
    values: Mapping[str, list[str]]  # of the query, where a name comes more than once
    headers: Mapping[str, str]
    body: bytes

    @property
    def token(self) -> str | None:
        return self.headers["authorization"].removeprefix("Bearer ") if "authorization" in self.headers else None

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, kw_only=True)
class Answer:
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


RouteFunction = Callable[..., Answer]


@dataclass(frozen=True, kw_only=True)
class Route:
    method: str
    pattern: re.Pattern[str]
    needs_token: bool
    function: RouteFunction


ROUTES: list[Route] = []
PLACES = {
    "types": "(?P<types>models|datasets|spaces)",
    "types/?": "(?:(?P<types>datasets|spaces)/)?",
    "id": r"(?P<id>[\w.-]+/[\w.-]+)",
    "revision": "(?P<revision>[^/]+)",
    "name": "(?P<name>[^/]+)",
    "path": "(?P<path>.+)",
    "oid": "(?P<oid>[0-9a-f]{64})",
    "number": r"(?P<number>\d+)",
}


def route(method: str, url: str, *, needs_token: bool = False) -> Callable[[RouteFunction], RouteFunction]:
    """Make a function the answer to a URL like `/api/{types}/{id}/refs`."""
    pattern = re.compile(re.sub(r"{(.+?)}", lambda place: PLACES[place[1]], url.replace(".", r"\.")))

    def register(function: RouteFunction) -> RouteFunction:
        ROUTES.append(Route(method=method, pattern=pattern, needs_token=needs_token, function=function))
        return function

    return register


# Accounts and repositories


@route("GET", "/api/whoami-v2", needs_token=True)
def whoami(hub: "HubServer", request: Request) -> Answer:
    access = {"accessToken": {"displayName": "tests", "role": "write"}}
    orgs = [{"name": name} for name in hub.organizations]
    return json_answer({"type": "user", "name": hub.user, "fullname": hub.user, "orgs": orgs, "auth": access})


@route("POST", "/api/repos/create", needs_token=True)
def create_repo(hub: "HubServer", request: Request) -> Answer:
    asked = request.json()
    repo_type, repo_id = named_repo(hub, asked)
    if repo := hub.repos.get((repo_type, repo_id)):
        return json_answer({"error": "You already created this repo", "url": repo_url(hub, repo)}, status=409)
    repo = Repository(type=repo_type, id=repo_id, private=asked.get("visibility") == "private")
    hub.repos[repo_type, repo_id] = repo
    return json_answer({"url": repo_url(hub, repo)})


@route("DELETE", "/api/repos/delete", needs_token=True)
def delete_repo(hub: "HubServer", request: Request) -> Answer:
    if hub.repos.pop(named_repo(hub, request.json()), None) is None:
        raise HubError(404, "Repository not found", code="RepoNotFound")
    return Answer()


@route("GET", "/api/{types}/{id}")
@route("GET", "/api/{types}/{id}/revision/{revision}")
def repo_info(hub: "HubServer", request: Request, repo: Repository, revision: str = "main") -> Answer:
    commit = repo.at(revision)
    facts = repo_facts(repo, commit)
    if "expand" in request.query:  # the client asks for one field
        return json_answer({name: facts[name] for name in ("id", request.query["expand"])})
    with_blobs = "blobs" in request.query
    siblings = [sibling(path, file, with_blob=with_blobs) for path, file in commit.files.items()]
    return json_answer({**facts, "siblings": siblings})


@route("GET", "/api/{types}")
def list_repos(hub: "HubServer", request: Request, types: str) -> Answer:
    """The repositories of an owner, with all the tags that are asked for: those of the card on the main branch."""
    wanted = set(request.values.get("filter", []))
    found = [
        repo_facts(repo, repo.at("main"))
        for repo in hub.repos.values()
        if repo.type == types.removesuffix("s")
        and request.query.get("author") in (None, repo.id.partition("/")[0])
        and wanted <= set(card_tags(repo.at("main")))
        and not (repo.private and request.token is None)
    ]
    return page(hub, request, found[: int(request.query.get("limit", len(found)))])


@route("GET", "/api/{types}/{id}/refs")
def refs(hub: "HubServer", request: Request, repo: Repository) -> Answer:
    def listing(prefix: str, names: Mapping[str, str]) -> list[dict[str, str]]:
        return [{"name": name, "ref": prefix + name, "targetCommit": oid} for name, oid in sorted(names.items())]

    branches, tags = listing("refs/heads/", repo.branches), listing("refs/tags/", repo.tags)
    return json_answer({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})


# Uploads


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: "HubServer", request: Request) -> Answer:
    return json_answer({"errors": [], "warnings": []})


@route("POST", "/api/{types}/{id}/preupload/{revision}", needs_token=True)
def preupload(hub: "HubServer", request: Request, repo: Repository, revision: str) -> Answer:
    """Which files go to LFS, and what is stored under their paths now: the client leaves out what has not changed."""
    commit = repo.at(revision)

    def advice(path: str, size: int) -> dict[str, object]:
        mode = "lfs" if size >= hub.lfs_size or path.endswith(LFS_SUFFIXES) else "regular"
        stored = commit.files.get(path)
        known = {"oid": stored.sha256 or stored.oid} if stored else {}
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, **known}

    return json_answer({"files": [advice(file["path"], file["size"]) for file in request.json()["files"]]})


@route("POST", "/{types/?}{id}.git/info/lfs/objects/batch", needs_token=True)
def lfs_batch(hub: "HubServer", request: Request, repo: Repository) -> Answer:
    """Where to upload each object: to one URL, to a URL for each part, or nowhere because it is here already."""

    def instructions(oid: str, size: int) -> dict[str, object]:
        if oid in hub.lfs_objects:
            return {"oid": oid, "size": size}
        hub.lfs_uploads.setdefault(oid, {})
        url = f"{hub.endpoint}/lfs/{oid}"
        upload: dict[str, object] = {"href": url}
        if size > hub.multipart_size:
            numbers = range(1, -(-size // hub.multipart_size) + 1)
            parts = {f"{number:05}": f"{url}/{number}" for number in numbers}
            upload["header"] = {"chunk_size": str(hub.multipart_size), **parts}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": {"href": f"{url}/verify"}}}

    objects = [instructions(wanted["oid"], wanted["size"]) for wanted in request.json()["objects"]]
    return json_answer({"transfer": "basic", "objects": objects})


@route("PUT", "/lfs/{oid}")
def put_lfs_object(hub: "HubServer", request: Request, oid: str) -> Answer:
    """The real Hub signs the URLs of uploads, and the client sends no token; here the object must be announced."""
    announced_parts(hub, oid)
    keep_lfs_object(hub, oid, request.body)
    return Answer()


@route("PUT", "/lfs/{oid}/{number}")
def put_lfs_part(hub: "HubServer", request: Request, oid: str, number: str) -> Answer:
    announced_parts(hub, oid)[int(number)] = request.body
    return Answer(headers={"ETag": part_etag(request.body)})


@route("POST", "/lfs/{oid}")
def complete_lfs_parts(hub: "HubServer", request: Request, oid: str) -> Answer:
    parts = announced_parts(hub, oid)
    stated = {part["partNumber"]: part["etag"] for part in request.json()["parts"]}
    if stated != {number: part_etag(part) for number, part in parts.items()}:
        raise HubError(400, f"the parts of LFS object {oid} are not those that were uploaded")
    keep_lfs_object(hub, oid, b"".join(parts[number] for number in sorted(parts)))
    return Answer()


@route("POST", "/lfs/{oid}/verify", needs_token=True)
def verify_lfs_object(hub: "HubServer", request: Request, oid: str) -> Answer:
    if len(hub.lfs_objects.get(oid, b"")) != request.json()["size"]:
        raise HubError(404, f"LFS object {oid} was not uploaded")
    return Answer()


@route("POST", "/api/{types}/{id}/commit/{revision}", needs_token=True)
def commit(hub: "HubServer", request: Request, repo: Repository, revision: str) -> Answer:
    if revision not in repo.branches:
        raise HubError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
    head = repo.at(revision)
    header, *changes = [json.loads(line) for line in request.body.splitlines()]
    if header["value"].get("parentCommit", head.oid) != head.oid:
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for change in changes:
        apply_change(hub, files, change["key"], change["value"])
    made = repo.commit(revision, files, title=header["value"]["summary"], message=header["value"]["description"])
    url = f"{repo_url(hub, repo)}/commit/{made.oid}"
    return json_answer({"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})


@route("POST", "/api/{types}/{id}/tag/{revision}", needs_token=True)
def create_tag(hub: "HubServer", request: Request, repo: Repository, revision: str) -> Answer:
    return create_ref(repo.tags, request.json()["tag"], repo.at(revision))


@route("POST", "/api/{types}/{id}/branch/{name}", needs_token=True)
def create_branch(hub: "HubServer", request: Request, repo: Repository, name: str) -> Answer:
    return create_ref(repo.branches, name, repo.at(request.json().get("startingPoint", "main")))


@route("DELETE", "/api/{types}/{id}/tag/{name}", needs_token=True)
def delete_tag(hub: "HubServer", request: Request, repo: Repository, name: str) -> Answer:
    return delete_ref(repo.tags, name)


@route("DELETE", "/api/{types}/{id}/branch/{name}", needs_token=True)
def delete_branch(hub: "HubServer", request: Request, repo: Repository, name: str) -> Answer:
    return delete_ref(repo.branches, name)


# Pull requests


@route("GET", "/api/{types}/{id}/discussions", needs_token=True)
def list_discussions(hub: "HubServer", request: Request, repo: Repository) -> Answer:
    found = [discussion(repo, pull_request) for pull_request in repo.pull_requests]
    return json_answer({"discussions": found, "count": len(found), "start": 0})


@route("POST", "/api/{types}/{id}/discussions", needs_token=True)
def create_pull_request(hub: "HubServer", request: Request, repo: Repository) -> Answer:
    number, title = len(repo.pull_requests) + 1, request.json()["title"]
    made = PullRequest(number=number, title=title, author=hub.user)
    repo.pull_requests.append(made)
    repo.branches[made.branch] = repo.at("main").oid
    return json_answer({"num": number})


@route("GET", "/api/{types}/{id}/discussions/{number}", needs_token=True)
def discussion_details(hub: "HubServer", request: Request, repo: Repository, number: str) -> Answer:
    facts = discussion(repo, repo.pull_requests[int(number) - 1])
    changes = {"base": "refs/heads/main"}
    return json_answer({**facts, "events": [], "diff": "", "filesWithConflicts": [], "changes": changes})


@route("POST", "/api/{types}/{id}/discussions/{number}/status", needs_token=True)
def change_status(hub: "HubServer", request: Request, repo: Repository, number: str) -> Answer:
    status = repo.pull_requests[int(number) - 1].status = request.json()["status"]
    event = {"id": "0", "type": "status-change", "createdAt": date(repo.at("main")), "data": {"status": status}}
    return json_answer({"newStatus": event})


# Listings and downloads


@route("GET", "/api/{types}/{id}/commits/{revision}")
def commits(hub: "HubServer", request: Request, repo: Repository, revision: str) -> Answer:
    author = [{"user": repo.id.partition("/")[0]}]
    return page(
        hub,
        request,
        [
            {"id": made.oid, "title": made.title, "message": made.message, "date": date(made), "authors": author}
            for made in repo.history(revision)
        ],
    )


@route("GET", "/api/{types}/{id}/tree/{revision}")
@route("GET", "/api/{types}/{id}/tree/{revision}/{path}")
def tree(hub: "HubServer", request: Request, repo: Repository, revision: str, path: str = "") -> Answer:
    recursive = request.query.get("recursive", "").lower() in ("true", "1")
    entries = list_entries(repo.at(revision).files, path, recursive=recursive)
    if path and not entries:
        raise HubError(404, f"{path} does not exist on {revision!r}", code="EntryNotFound")
    return page(hub, request, [tree_entry(path, file) for path, file in entries.items()])


@route("POST", "/api/{types}/{id}/paths-info/{revision}")
def paths_info(hub: "HubServer", request: Request, repo: Repository, revision: str) -> Answer:
    """The entries of a tree at chosen paths; the client sends them as a form, or as JSON."""
    is_json = "json" in request.headers.get("content-type", "")
    paths = request.json()["paths"] if is_json else parse_qs(request.body.decode()).get("paths", [])
    entries = list_entries(repo.at(revision).files, "", recursive=True)
    return json_answer([tree_entry(path, entries[path]) for path in paths if path in entries])


@route("GET", "/{types/?}{id}/resolve/{revision}/{path}")
def resolve(hub: "HubServer", request: Request, repo: Repository, revision: str, path: str) -> Answer:
    commit = repo.at(revision)
    headers = {"X-Repo-Commit": commit.oid}
    if path not in commit.files:
        raise HubError(404, "Entry not found", code="EntryNotFound", headers=headers)
    file = commit.files[path]
    headers["ETag"] = f'"{file.sha256 or file.oid}"'
    if file.sha256:
        headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(file.size)}
    if file.sha256 and hub.redirect:
        hub.downloads[file.sha256] = file.data
        return Answer(status=302, headers={**headers, "Location": f"{hub.download_origin}/download/{file.sha256}"})
    return file_answer(request, file.data, headers)


@route("GET", "/download/{oid}")
def download(hub: "HubServer", request: Request, oid: str) -> Answer:
    """The other origin that the Hub redirects to: its URLs are signed, and a token has no business here."""
    if request.token is not None or request.headers["host"] not in hub.download_origin:
        raise HubError(400, "the token of the Hub was sent to another origin")
    return file_answer(request, hub.downloads[oid], {"ETag": f'"{oid}"'})


# What the routes are made of


def json_answer(content: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    body = json.dumps(content).encode()
    return Answer(status=status, headers={"Content-Type": "application/json", **(headers or {})}, body=body)


def page(hub: "HubServer", request: Request, items: Sequence[object]) -> Answer:
    """One page of a listing, and the link to the next one."""
    start = int(request.query.get("cursor", "0"))
    end = start + hub.page_size
    if end >= len(items):
        return json_answer(items[start:])
    query = urlencode({**request.query, "cursor": end})
    return json_answer(items[start:end], headers={"Link": f'<{hub.endpoint}{request.path}?{query}>; rel="next"'})


def file_answer(request: Request, data: bytes, headers: Mapping[str, str]) -> Answer:
    """The bytes of a file, or the one range of them that the client asks for."""
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if not asked:
        return Answer(headers={"Accept-Ranges": "bytes", **headers}, body=data)
    first, last = asked.groups()
    start = int(first) if first else max(len(data) - int(last), 0)
    end = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= end:
        raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
    extent = {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
    return Answer(status=206, headers={"Accept-Ranges": "bytes", **extent, **headers}, body=data[start:end])


def named_repo(hub: "HubServer", asked: Mapping[str, str | None]) -> tuple[str, str]:
    """The type and id of the repository to create or to delete."""
    owner, repo_type = asked.get("organization") or hub.user, asked.get("type") or "model"
    if owner not in (hub.user, *hub.organizations):
        raise HubError(403, f'You don\'t have the rights to create a {repo_type} under the namespace "{owner}".')
    return repo_type, f"{owner}/{asked['name']}"


def repo_url(hub: "HubServer", repo: Repository) -> str:
    return f"{hub.endpoint}/{'' if repo.type == 'model' else repo.type + 's/'}{repo.id}"


def repo_facts(repo: Repository, commit: Commit) -> dict[str, Any]:
    return {
        "id": repo.id,
        "author": repo.id.partition("/")[0],
        "sha": commit.oid,
        "createdAt": date(next(iter(repo.commits.values()))),
        "lastModified": date(commit),
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": card_tags(commit),
        "cardData": {},
    }


def card_tags(commit: Commit) -> list[str]:
    """The tags in the metadata of the card."""
    card = commit.files.get("README.md")
    _, _, rest = (card.data.decode() if card else "").partition("---\n")
    metadata = yaml.safe_load(rest.partition("\n---")[0]) if card else None
    return list((metadata or {}).get("tags", []))


def discussion(repo: Repository, request: PullRequest) -> dict[str, Any]:
    return {
        "title": request.title,
        "num": request.number,
        "author": {"name": request.author},
        "createdAt": date(repo.at("main")),
        "status": request.status,
        "repo": {"name": repo.id, "type": repo.type},
        "isPullRequest": True,
    }


def announced_parts(hub: "HubServer", oid: str) -> dict[int, bytes]:
    if oid not in hub.lfs_uploads:
        raise HubError(403, f"no upload of LFS object {oid} was announced")
    return hub.lfs_uploads[oid]


def keep_lfs_object(hub: "HubServer", oid: str, data: bytes) -> None:
    if hashlib.sha256(data).hexdigest() != oid:
        raise HubError(400, f"the bytes uploaded as LFS object {oid} have another SHA-256")
    hub.lfs_objects[oid] = data


def part_etag(part: bytes) -> str:
    return f'"{hashlib.md5(part).hexdigest()}"'


def apply_change(hub: "HubServer", files: dict[str, File], kind: str, change: Mapping[str, str]) -> None:
    """Apply one line of a commit to the files of its parent."""
    path = change["path"]
    match kind:
        case "file":
            files[path] = File.regular(b64decode(change["content"]))
        case "lfsFile" if change["oid"] in hub.lfs_objects:
            files[path] = File.lfs(hub.lfs_objects[change["oid"]])
        case "lfsFile":
            raise HubError(400, f"LFS object {change['oid']} of {path} was not uploaded")
        case "deletedFile" if path in files:
            del files[path]
        case "deletedFolder" if below := list_entries(files, path.rstrip("/"), recursive=True):
            for gone in below.keys() & files.keys():
                del files[gone]
        case "deletedFile" | "deletedFolder":
            raise HubError(404, f"{path} does not exist", code="EntryNotFound")
        case _:
            raise HubError(400, f"this server has no `{kind}` in commits")


def create_ref(refs: dict[str, str], name: str, commit: Commit) -> Answer:
    if name in refs:
        raise HubError(409, f"Reference {name} already exists")
    refs[name] = commit.oid
    return Answer()


def delete_ref(refs: dict[str, str], name: str) -> Answer:
    if refs.pop(name, None) is None:
        raise HubError(404, f"Reference {name} does not exist", code="RevisionNotFound")
    return Answer()


def tree_entry(path: str, file: File | None) -> dict[str, object]:
    if file is None:
        return {"type": "directory", "path": path, "oid": git_blob_oid(path.encode()), "size": 0}
    entry: dict[str, object] = {"type": "file", "path": path, "oid": file.oid, "size": file.size}
    if file.sha256:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
    return entry


def sibling(path: str, file: File, *, with_blob: bool) -> dict[str, object]:
    """A file in the information about a repository, which spells its fields otherwise than a tree."""
    entry: dict[str, object] = {"rfilename": path}
    if with_blob:
        entry |= {"size": file.size, "blobId": file.oid}
    if with_blob and file.sha256:
        entry["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
    return entry


def date(commit: Commit) -> str:
    return commit.date.strftime("%Y-%m-%dT%H:%M:%S.000Z")
