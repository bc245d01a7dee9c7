"""A Hugging Face Hub on loopback, for tests: the real `huggingface_hub` client talks to it through `HF_ENDPOINT`.

It keeps everything in memory, speaks the part of the protocol that `huggingface_hub` 2.4 uses without Xet, and keeps
the rules that a push or a pull can trip over: who may write, stale parents, LFS objects that are not what their
digest says, error codes, pages. The fixtures in `tests.hub.fixtures` start one and lead the client to it:

    def test_a_new_repository_has_no_tags(hub: HubServer) -> None:
        HfApi().create_repo("acme/art", repo_type="dataset")
        assert hub.tags("acme/art") == {}

A test may set any option at any time, for example `hub.page_size = 2`. The files: `repository.py` is what a
repository holds, `routes.py` is what each URL does, this one is the server around them.
"""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, parse_qsl, unquote

from tests.hub.repository import HubError, Repository
from tests.hub.routes import ROUTES, Answer, Request, Route, json_answer


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A broken connection: before the request is handled, or once `after` bytes of its answer's body are sent."""

    after: int | None = None


@dataclass(frozen=True, kw_only=True)
class Garbled:
    """The answer with other bytes in its body, as many as before."""


@dataclass(frozen=True, kw_only=True)
class Slow:
    """The answer, some time later."""

    seconds: float


PIECE = 256 << 10  # bytes that are sent or read at once
BUFFERED_SECONDS = 0.05  # of a line's speed
Fault = Answer | Cut | Garbled | Slow | None


@dataclass(kw_only=True)
class HubServer:
    """The server: `with HubServer() as hub:` starts and stops it. The first fields are its options."""

    token: str = "the-token-of-acme"
    user: str = "acme"  # whose token it is
    organizations: tuple[str, ...] = ()  # where, beside their own namespace, the user may create repositories
    redirect: bool = False  # send LFS downloads to another origin, as the real Hub does
    page_size: int = 1000
    lfs_size: int = 1 << 20  # files this large are LFS; so is everything with an LFS suffix
    multipart_size: int = 8 << 20  # larger LFS files are uploaded in parts of this size
    bytes_per_second: float | None = None  # of bodies, each way, over all connections; None: as fast as it goes
    fault: Callable[[str, str], Fault] | None = None  # (method, path) -> what happens instead

    sent: int = 0  # bytes of the bodies of all answers
    requests: list[tuple[str, str]] = field(default_factory=list)  # (method, path), decoded, without the query
    repos: dict[tuple[str, str], Repository] = field(default_factory=dict)  # by type and id
    lfs_objects: dict[str, bytes] = field(default_factory=dict)  # by SHA-256
    lfs_uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)  # announced objects, and their parts so far
    downloads: dict[str, bytes] = field(default_factory=dict)  # what the other origin serves, by SHA-256

    def __enter__(self) -> "HubServer":
        self._lock = threading.RLock()
        self._line = threading.Lock()
        self._is_free = dict.fromkeys(("in", "out"), 0.0)  # when the line has carried all that it was given
        self._http = _HttpServer(self)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    @property
    def download_origin(self) -> str:
        """The same server under another name, so that the client sees another origin."""
        return f"http://localhost:{self._http.server_address[1]}"

    def repo(self, repo_id: str, *, repo_type: str = "dataset") -> Repository:
        return self.repos[repo_type, repo_id]

    def files(self, repo_id: str, revision: str = "main", *, repo_type: str = "dataset") -> dict[str, bytes]:
        """The bytes of every file at a revision, the Hub's own `.gitattributes` included."""
        return {path: file.data for path, file in self.repo(repo_id, repo_type=repo_type).at(revision).files.items()}

    def tags(self, repo_id: str, *, repo_type: str = "dataset") -> dict[str, str]:
        """The commit that each tag names."""
        return dict(self.repo(repo_id, repo_type=repo_type).tags)

    def overwrite(
        self,
        repo_id: str,
        path: str,
        data: bytes,
        *,
        revision: str = "main",
        honest: bool = False,
        repo_type: str = "dataset",
    ) -> None:
        """Change or plant a file inside an existing commit, as a broken or malicious Hub would.

        The Hub goes on stating the old size and digests, unless it is `honest`: then it states those of the new bytes.
        """
        with self._lock:
            self.repo(repo_id, repo_type=repo_type).overwrite(path, data, revision=revision, honest=honest)

    def pace(self, way: str, count: int) -> None:
        """Wait until a line of this speed has carried so many bytes more."""
        if self.bytes_per_second is not None:
            with self._line:
                now = time.monotonic()
                begun = max(self._is_free[way], now - BUFFERED_SECONDS)  # it goes on while its ends are busy
                self._is_free[way] = begun + count / self.bytes_per_second
                seconds = self._is_free[way] - now
            threading.Event().wait(seconds)  # a test may have made `time.sleep` do nothing

    def answer(self, request: Request) -> Answer:
        """Find the request's route, check who asks, and let the route answer."""
        with self._lock:
            try:
                for route in ROUTES:
                    if route.method == request.method and (found := route.pattern.fullmatch(request.path)):
                        return route.function(self, request, **self._arguments(request, route, found.groupdict()))
                raise HubError(404, f"no such route: {request.method} {request.path}")
            except HubError as error:
                return json_answer({"error": error.message}, status=error.status, headers=error.headers)

    def _arguments(self, request: Request, route: Route, found: dict[str, str | None]) -> dict[str, Any]:
        """The values in the URL, decoded, with the repository itself in the place of its type and id."""
        if request.token not in (None, self.token):
            raise HubError(401, "Invalid credentials in Authorization header")
        if route.needs_token and request.token is None:
            raise HubError(401, "Invalid username or password.")
        arguments: dict[str, Any] = {name: unquote(value) for name, value in found.items() if value is not None}
        if "id" in arguments:
            repo = self.repos.get((arguments.pop("types", "models").removesuffix("s"), arguments.pop("id")))
            if repo is None or (repo.private and request.token is None):
                # One answer for both: a stranger does not learn which private repositories exist.
                raise HubError(404 if request.token else 401, "Repository not found", code="RepoNotFound")
            arguments["repo"] = repo
        return arguments


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = False  # closing the server waits for them: nothing outlives a test
    request_queue_size = 64

    def __init__(self, hub: HubServer) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    """One request per connection (HTTP/1.0), so that closing the server never waits for an idle client."""

    server: _HttpServer
    timeout = 30

    def serve(self) -> None:
        hub = self.server.hub
        path, _, query = self.path.partition("?")
        body = b"".join(self._receive(int(self.headers["Content-Length"] or 0)))
        hub.requests.append((self.command, unquote(path)))
        fault = hub.fault(self.command, unquote(path)) if hub.fault else None
        if isinstance(fault, Cut) and fault.after is None:
            return
        if isinstance(fault, Slow):
            threading.Event().wait(fault.seconds)  # a test may have made `time.sleep` do nothing
        request = Request(
            method="GET" if self.command == "HEAD" else self.command,
            path=path,
            query=dict(parse_qsl(query)),
            values=parse_qs(query),
            headers={name.lower(): value for name, value in self.headers.items()},
            body=body,
        )
        answer = fault if isinstance(fault, Answer) else hub.answer(request)
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            body = answer.body[: fault.after if isinstance(fault, Cut) else None]
            hub.sent += len(body)
            for start in range(0, len(body), PIECE):
                piece = body[start : start + PIECE]
                hub.pace("out", len(piece))
                self.wfile.write(bytes(byte ^ 1 for byte in piece) if isinstance(fault, Garbled) else piece)

    def _receive(self, size: int) -> Iterator[bytes]:
        for start in range(0, size, PIECE):
            count = min(PIECE, size - start)
            self.server.hub.pace("in", count)
            yield self.rfile.read(count)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve  # noqa: N815 - http.server looks for these names

    def log_message(self, format: str, *args: object) -> None:
        pass
