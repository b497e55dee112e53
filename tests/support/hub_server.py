"""A local HTTP server in the place of the hub."""

import base64
import contextlib
import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from support.paths import ROOT

OLD, NEW = "a" * 40, "b" * 40
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights",
    "merges.txt": b"#version: 0.2\n",
    "README.md": b"# card",
    "pytorch_model.bin": b"\x80\x04pickle",
    "consolidated.pth": b"\x80\x04pickle",
    "onnx/config.json": b"{}",
}
WANTED = {"config.json", "model.safetensors", "merges.txt"}


class Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of huggingface.co that a download and an upload need, and its errors.

    Uploads are asked for no large files, so all come in the commit.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        url = urlsplit(self.path)
        self.server.asked.append((self.command, url.path))
        part = unquote(url.path).strip("/").split("/")
        token = self.headers.get("Authorization")
        if token == "Bearer expired":
            return self.error(401, None, "Invalid credentials in Authorization header")
        if part[:2] == ["api", "models"] and len(part) == 2:
            asked = [repo for repo in self.server.repos if self.asks_for(repo, url.query)]
            return self.json([{"id": repo} for repo in asked])
        repo, rest = "/".join(part[2:4]), part[4:]
        if part[0] != "api":
            repo, rest = "/".join(part[:2]), part[2:]
        if repo not in self.server.repos:
            return self.error(404 if token else 401, "RepoNotFound" if token else None)
        granted = token == "Bearer granted"
        if not granted and (repo == "owner/gated-info" or (part[0] != "api" and "gated" in repo)):
            return self.error(403 if token else 401, "GatedRepo")
        if rest == ["refs"]:
            names = ["main", "release-1"]
            refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": NEW} for n in names]
            return self.json({"branches": refs, "tags": [], "converts": []})
        kind, revision = rest[:2]
        sha = {"main": self.server.main, "release-1": OLD, OLD: OLD, NEW: NEW}.get(revision)
        if sha is None:
            return self.error(404, "RevisionNotFound")
        if kind == "revision":
            files = [{"rfilename": name} for name in self.server.files]
            return self.json({"id": repo, "sha": sha, "siblings": files})
        if kind == "tree":
            entry = {"type": "file", "oid": "0" * 40}
            files = self.server.files.items()
            return self.json([{**entry, "path": n, "size": len(b)} for n, b in files])
        body, name = self.server.files["/".join(rest[2:])], "/".join(rest[2:])
        return self.answer(200, body, {"X-Repo-Commit": sha, "ETag": f'"{hash(name) % 10**9}"'})

    do_HEAD = do_GET  # noqa: N815 - the library's name

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.command, self.path))
        (repo,) = self.server.repos
        if self.headers.get("Authorization") != "Bearer granted":
            return self.error(401, None, "Invalid username or password.")
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            return self.json({"url": f"{self.server.endpoint}/{repo}", "id": repo})
        if self.path.startswith("/api/validate-yaml"):
            return self.json({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            known = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return self.json({"files": [{"path": name, **known} for name in names]})
        assert "/commit/" in self.path
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del self.server.files[value["path"]]
        url = f"{self.server.endpoint}/{repo}/commit/{NEW}"
        return self.json({"commitUrl": url, "commitOid": NEW})

    def asks_for(self, repo: str, query: str) -> bool:
        asked = parse_qs(query)
        return repo.split("/")[0] in asked.get("author", []) or any(
            word in repo for word in asked.get("search", [])
        )

    def json(self, value):
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def error(self, status: int, code: str | None, message: str = "no"):
        self.answer(
            status, b"", {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        )

    def answer(self, status: int, body: bytes, headers: dict[str, str]):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    """The hub: its repositories, the files of each and their newest commit, and what was asked."""

    def __init__(self, files: dict[str, bytes], repos: tuple[str, ...]):
        super().__init__(("127.0.0.1", 0), Hub)
        self.files, self.repos, self.main = files, repos, NEW
        self.asked: list[tuple[str, str]] = []
        self.created: dict | None = None  # what a repository was made with
        self.endpoint = f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def serving(files: dict[str, bytes], *repos: str) -> Iterator[Server]:
    """A hub on this machine while the context lasts."""
    with Server(files, repos) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def environment(home: Path, **more: str) -> dict[str, str]:
    """The environment of someone who never used the hub, with `more` variables."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSF"))}
    return {
        **{k: v for k, v in kept.items() if "proxy" not in k.lower()},
        "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT), **more,
    }  # fmt: skip
