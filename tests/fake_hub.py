"""A model hub on loopback: the few routes of Hugging Face's that a download and an upload take, over real HTTP."""

import base64
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_a_token_that_may_write"


class FakeHub:
    """Repositories by owner/name: served from directories, or filled by uploads. `requests` is what was asked for."""

    def __init__(self) -> None:
        self.repositories: dict[str, Path] = {}
        self.uploaded: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.url = ""

    def environment(self, home: Path, token: str = "") -> dict[str, str]:
        """What a process needs to take this for the hub, with a cache of its own."""
        given = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        dropped = ("HF_TOKEN", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN")
        kept = {name: value for name, value in os.environ.items() if name not in dropped}
        return kept | given | ({"HF_TOKEN": token} if token else {})

    def downloads(self, name: str) -> list[str]:
        """The files of a repository that were sent, in order."""
        start = f"GET /{name}/resolve/"
        return [asked.split("/", 5)[-1] for asked in self.requests if asked.startswith(start)]


class _Server(ThreadingHTTPServer):
    """Answers for `hub`, on a port of its own."""

    def __init__(self, hub: FakeHub):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        hub.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> FakeHub:
        assert isinstance(self.server, _Server)
        return self.server.hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {unquote(self.path)}")
        path = unquote(urlsplit(self.path).path)
        api = path.startswith("/api/")
        for prefix in ("/api", "/models", "/datasets"):
            path = path.removeprefix(prefix)
        owner, name, kind, *rest = [*path.strip("/").split("/"), "", ""]
        directory = self.hub.repositories.get(f"{owner}/{name}")
        if directory is None:
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        commit = hashlib.sha1(str(directory).encode()).hexdigest()
        if api and kind == "tree":
            return self.answer(200, [_entry(directory, file) for file in sorted(directory.rglob("*"))])
        if api:
            return self.answer(200, {"id": f"{owner}/{name}", "sha": commit, "siblings": []})
        file = directory.joinpath(*rest[1:-2])
        if kind != "resolve" or not file.is_file():
            return self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        return self.answer(200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.hub.requests.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.hub.uploaded.setdefault(name, {})["visibility"] = str(asked.get("visibility", asked)).encode()
            return self.answer(200, {"url": f"{self.hub.url}/{name}"})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            rows = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self.answer(200, {"files": rows})
        if "/commit/" in self.path:
            return self.answer(200, self.commit(body))
        return self.answer(200, {"errors": [], "warnings": []})

    def commit(self, body: bytes) -> dict[str, str]:
        """Keep the files of a commit; what is answered."""
        name = "/".join(self.path.removeprefix("/api/models/").split("/")[:2])
        for line in body.splitlines():
            row = json.loads(line)
            if row["key"] == "file":
                self.hub.uploaded[name][row["value"]["path"]] = base64.b64decode(row["value"]["content"])
        return {"commitOid": "0" * 40, "commitUrl": f"{self.hub.url}/{name}/commit/{'0' * 40}"}

    def answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _entry(directory: Path, file: Path) -> dict[str, object]:
    """A row of a repository's list of files."""
    kind = "directory" if file.is_dir() else "file"
    oid = hashlib.sha1(file.name.encode()).hexdigest()
    size = file.stat().st_size if file.is_file() else 0
    return {"type": kind, "path": str(file.relative_to(directory)), "size": size, "oid": oid}


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A running one."""
    hub = FakeHub()
    server = _Server(hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
