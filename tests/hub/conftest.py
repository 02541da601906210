"""A hub on this machine that speaks what huggingface_hub asks for, with faults on demand, and commands that talk to it.

Two servers, as there are in life: the hub itself, and the storage it sends large files to, which never sees a token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

from d2ls_infer.manifest import WeightsEntry
from d2ls_infer.nn import count_parameters
from d2ls_infer.weights import file_sha256, load_network, read_description

TOKEN = "hf_right"
REPO = "someone/toy"
FILE = "model.safetensors"


class Request(NamedTuple):
    """One request as it came, and the bytes of the body that went back."""

    server: str  # hub or storage
    method: str
    path: str
    headers: dict[str, str]
    sent: int


@dataclass
class Repo:
    """A repository: its commits' files, and its branches and tags."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], *, branch: str = "main") -> str:
        """A commit on a branch with these files beside those it has; its hash."""
        whole = self.commits.get(self.refs.get(branch, ""), {}) | files
        name = hashlib.sha1(repr((len(self.commits), sorted(whole.items()))).encode()).hexdigest()
        self.commits[name], self.refs[branch] = whole, name
        return name


@dataclass
class Faults:
    """What the hub does wrongly. cut: where a connection ends, for each of the next downloads."""

    cut: list[int] = field(default_factory=list)
    content: bytes | None = None  # stored bytes in place of the right ones
    delay_s: float = 0.0  # before the hub answers
    stall_s: float = 0.0  # before the storage does
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)  # of answers about files


class Hub:
    """The stand-in. `requests` lists what it was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.faults = Faults()
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        self.servers = [Server(self, HubHandler), Server(self, StorageHandler)]

    @property
    def url(self) -> str:
        return self.servers[0].url

    @property
    def storage(self) -> str:
        return self.servers[1].url

    def add(self, repo: str, files: dict[str, bytes], *, private: bool = False) -> str:
        """Commit files to a repository that is made where there is none; the commit."""
        self.stored |= {hashlib.sha256(content).hexdigest(): content for content in files.values()}
        return self.repos.setdefault(repo, Repo(private)).commit(files)

    def downloaded(self) -> int:
        """Bytes of files that have left the storage."""
        return sum(request.sent for request in self.requests if request.method == "GET")


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub, handler: type[Handler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.hub = hub
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


class Handler(BaseHTTPRequestHandler):
    """What both servers share: answers with a length, and the log."""

    protocol_version = "HTTP/1.1"
    server: Server
    kind = ""

    def log_message(self, *arguments: Any) -> None:
        pass

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = iter(lambda: self.rfile.read(int(self.rfile.readline(), 16)) + self.rfile.readline(), b"\r\n")
            return b"".join(chunk.removesuffix(b"\r\n") for chunk in chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, content: bytes = b"", *, cut: int | None = None, **headers: str) -> None:
        """Send an answer; with `cut`, only so many bytes of it before the connection ends."""
        sent = content if cut is None else content[:cut]
        self.send_response(status)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in ({"Content-Length": str(len(content))} | given).items():
            self.send_header(name, value)
        self.end_headers()
        sent = b"" if self.command == "HEAD" else sent
        with self.hub.lock:
            self.hub.requests.append(Request(self.kind, self.command, self.path, dict(self.headers), len(sent)))
        self.wfile.write(sent)
        if cut is not None:
            self.close_connection = True

    def json(self, values: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(values).encode(), Content_Type="application/json")


class HubHandler(Handler):
    """Repositories, files and commits."""

    kind = "hub"

    def refused(self, status: int, code: str, message: str, **headers: str) -> None:
        self.answer(status, b"", X_Error_Code=code, X_Error_Message=message, **headers)

    def opened(self, name: str) -> Repo | None:
        """The repository, if it is there for who asks; else the refusal is sent, which tells nobody what is there."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        repo = self.hub.repos.get(name)
        if token not in ("", TOKEN):
            self.refused(401, "", "Invalid credentials in Authorization header")
        elif repo is None or (repo.private and not token):
            self.refused(404 if token else 401, "RepoNotFound", "Repository not found")
        elif repo.gated:
            self.refused(403 if token else 401, "GatedRepo", "Access to this model is restricted")
        else:
            return repo
        return None

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        time.sleep(self.hub.faults.delay_s)
        path = unquote(urlsplit(self.path).path)
        if self.hub.faults.status:
            self.answer(self.hub.faults.status)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            if repo := self.opened(found[1]):
                sha = repo.refs.get(found[2] or "main")
                self.json({"id": found[1], "sha": sha, "private": repo.private, "siblings": [], "tags": []})
        elif (found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)) and (repo := self.opened(found[1])):
            self.resolve(repo, found[2], found[3])
        elif not found:
            self.answer(404)

    def resolve(self, repo: Repo, revision: str, file: str) -> None:
        """A file of a revision: large ones are in the storage."""
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            self.refused(404, "RevisionNotFound", "Invalid rev id")
        elif file not in repo.commits[commit]:
            self.refused(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
        elif file.endswith(".safetensors"):
            content = repo.commits[commit][file]
            digest = hashlib.sha256(content).hexdigest()
            about = {
                "X-Repo-Commit": commit, "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content)),
                "Location": f"{self.hub.storage}/{digest}",
            }  # fmt: skip
            self.answer(302, **(about | self.hub.faults.headers))
        else:
            content = repo.commits[commit][file]
            self.answer(200, content, X_Repo_Commit=commit, ETag=f'"{hashlib.sha1(content).hexdigest()}"')

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self.body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.refused(401, "", "Invalid username or password.")
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            private = asked.get("private") or asked.get("visibility") == "private"
            repo = self.hub.repos.setdefault(name, Repo(private=bool(private)))
            repo.commit({".gitattributes": b""})
            self.json({"url": f"{self.hub.url}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self.json({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/.+", path):
            modes = [
                {"path": file["path"], "shouldIgnore": False, "uploadMode": kind}
                for file in json.loads(body)["files"]
                for kind in ["lfs" if file["path"].endswith(".safetensors") else "regular"]
            ]
            self.json({"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                thing | {"actions": {"upload": {"href": f"{self.hub.storage}/{thing['oid']}"}}}
                for thing in json.loads(body)["objects"]
            ]
            self.json({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            self.commit(found[1], found[2], [json.loads(line) for line in body.splitlines()])

    def commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> None:
        """A commit as it is uploaded: one JSON object a line."""
        files = {}
        for line in lines[1:]:
            value = line["value"]
            stored = line["key"] == "lfsFile"
            files[value["path"]] = self.hub.stored[value["oid"]] if stored else base64.b64decode(value["content"])
        commit = self.hub.repos[name].commit(files, branch=branch)
        self.json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit, "success": True})


class StorageHandler(Handler):
    """Large files by their sha256, whole or from some byte on."""

    kind = "storage"

    def do_GET(self) -> None:
        content = self.hub.stored[self.path[1:]]
        if self.hub.faults.stall_s:
            self.hub.requests.append(Request(self.kind, self.command, self.path, dict(self.headers), 0))
            time.sleep(self.hub.faults.stall_s)
        if self.hub.faults.content is not None:
            content = self.hub.faults.content
        with self.hub.lock:
            cut = self.hub.faults.cut.pop(0) if self.hub.faults.cut else None
        if wanted := self.headers.get("Range"):
            first = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])  # type: ignore[index]
            whole = f"bytes {first}-{len(content) - 1}/{len(content)}"
            self.answer(206, content[first:], cut=cut, Content_Range=whole)
        else:
            self.answer(200, content, cut=cut)

    def do_PUT(self) -> None:
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == self.path[1:]
        self.hub.stored[self.path[1:]] = content
        self.answer(200)


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    try:
        yield hub
    finally:
        for server in hub.servers:
            server.shutdown()
            server.server_close()


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub without repositories."""
    with running() as started:
        yield started


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The client's folder: cache, token. Empty."""
    return tmp_path / "huggingface"


@pytest.fixture
def environment(hub: Hub, home: Path, tmp_path: Path) -> dict[str, str]:
    """The variables of a command that talks to the hub of this test and to no other, without a token."""
    ours = re.compile(r"(HF|HUGGING|D2LS)_|.*_proxy$", re.IGNORECASE)
    rest = {name: value for name, value in os.environ.items() if not ours.match(name)}
    return rest | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",  # its servers speak another protocol
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "PYTHONWARNINGS": "default",
    }


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def command() -> str:
    """Where the installed command is."""
    found = shutil.which("d2ls", path=sysconfig.get_path("scripts"))
    assert found is not None, "the package is not installed: pip install -e '.[dev]'"
    return found


@pytest.fixture
def run(command: str, environment: dict[str, str], tmp_path: Path) -> Run:
    """Run the installed command as a user does, against the hub; keywords are further variables."""

    def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [command, *map(str, arguments)],
            capture_output=True, text=True, cwd=tmp_path, env=environment | variables, check=False, timeout=120,
        )  # fmt: skip

    return run


@pytest.fixture
def here(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This process talks to the hub too, with the right token; the cache. The client read its variables long ago."""
    cache = home / "hub"
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(home.parent)
    yield cache
    if hasattr(huggingface_hub, "close_session"):  # the client's connections; before its version 1 it had none
        huggingface_hub.close_session()


@pytest.fixture(scope="session")
def entry_of(tiny_weights: Path) -> Callable[..., dict[str, Any]]:
    """A manifest's entry of the tiny weights file."""
    description = read_description(tiny_weights)
    num_params = count_parameters(load_network(tiny_weights, description))

    def entry(**changes: Any) -> dict[str, Any]:
        values = {
            "name": "toy", "summary": "a toy", "sha256": file_sha256(tiny_weights),
            "size": tiny_weights.stat().st_size, "num_params": num_params, "description": description.to_dict(),
        }  # fmt: skip
        return WeightsEntry.from_dict(values | changes).to_dict()

    return entry


@pytest.fixture
def manifest(hub: Hub, tiny_weights: Path, entry_of: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    """A manifest of one model, toy, which is on the hub."""
    commit = hub.add(REPO, {FILE: tiny_weights.read_bytes()})
    path = tmp_path / "models.json"
    entry = entry_of(hub={"repo": REPO, "revision": commit, "filename": FILE})
    path.write_text(json.dumps({"version": 1, "models": [entry]}))
    return path
