"""Google Cloud Storage on localhost, in memory: as much of its JSON API as the libraries speak.

TensorStore, gcsfs and google-cloud-storage talk to it over HTTP as they do to the real one.

with local() as bucket:
    as_path("gs://bucket/name").write_bytes(b"content")
    assert bucket.objects == {"name": b"content"}

https://cloud.google.com/storage/docs/json_api
"""

import base64
import contextlib
import hashlib
import importlib.util
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest


class _Failed(Exception):  # noqa: N818 - an answer
    """A status other than success."""


class Bucket:
    """One bucket and the server that holds it.

    Attributes:
      objects: name -> content, of what is there now.
      forbidden: a regular expression; requests `METHOD /path` that it matches are answered 403.
      requests: `METHOD /path`, of all that were answered.
      sent: bytes of content that were downloaded.
    """

    def __init__(self, name: str = "bucket"):
        self.name, self.forbidden, self.requests, self.sent = name, "", [], 0
        self.objects: dict[str, bytes] = {}
        self.facts: dict[str, dict[str, Any]] = {}  # generation, times
        self.uploads: dict[str, tuple[dict[str, str], bytearray]] = {}
        self.lock, self._generation = threading.RLock(), 1000
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # clients that are killed hang up
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Bucket":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self) -> dict[str, str]:
        """What leads the libraries here, without an account."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "GOOGLE_CLOUD_PROJECT": "test",
            "NO_GCE_CHECK": "true",
        }

    def put(self, name: str, content: bytes, match: str | None = None) -> dict[str, Any]:
        """Write an object, if its generation is `match`; 0: if there is none."""
        with self.lock:
            self.check(name, match)
            self._generation += 1
            now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + ".000Z"
            self.objects[name] = content
            self.facts[name] = {"generation": str(self._generation), "updated": now}
            return self.describe(name)

    def check(self, name: str, match: str | None, other: str | None = None) -> None:
        """Preconditions of a request."""
        generation = self.facts[name]["generation"] if name in self.objects else "0"
        if match is not None and match != generation:
            raise _Failed(412)
        if other is not None and other == generation:
            raise _Failed(304)

    def describe(self, name: str) -> dict[str, Any]:
        """The object resource."""
        content, facts = self.objects[name], self.facts[name]
        md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
        return {
            "kind": "storage#object", "name": name, "bucket": self.name, "md5Hash": md5,
            "size": str(len(content)), "timeCreated": facts["updated"], "metageneration": "1",
            "contentType": "application/octet-stream", "storageClass": "STANDARD", **facts,
        }  # fmt: skip

    def upload(self, folder: Path, prefix: str) -> None:
        """Put all files of a folder."""
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def copy(self, prefix: str, target: str) -> None:
        """Put all objects below a prefix below another one."""
        for name in [name for name in self.objects if name.startswith(f"{prefix}/")]:
            self.put(target + name.removeprefix(prefix), self.objects[name])

    def download(self, prefix: str, folder: Path) -> Path:
        """Write all objects below a prefix as files, as `gcloud storage cp -r` does."""
        for name, content in self.objects.items():
            if name.startswith(f"{prefix}/") and not name.endswith("/"):
                path = folder / name.removeprefix(f"{prefix}/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        return folder


def _list(bucket: Bucket, query: dict[str, str]) -> dict[str, Any]:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    start = max(query.get("startOffset", ""), query.get("pageToken", ""))
    most, end = int(query.get("maxResults", 1000)), query.get("endOffset", "")
    items, prefixes = [], []
    for name in sorted(bucket.objects):
        if not name.startswith(prefix) or name < start or (end and name >= end):
            continue
        below, slash, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
        if slash and prefixes[-1:] == [prefix + below + slash]:
            continue
        if len(items) + len(prefixes) == most:
            return {"items": items, "prefixes": prefixes, "nextPageToken": name}
        if slash:
            prefixes.append(prefix + below + slash)
        else:
            items.append(bucket.describe(name))
    return {"kind": "storage#objects", "items": items, "prefixes": prefixes}


def _multipart(body: bytes, kind: str) -> tuple[dict[str, Any], bytes]:
    """(metadata, content) of an upload in two parts."""
    boundary = re.search(r'boundary="?([^";]+)', kind)[1].encode()  # type: ignore[index]
    parts = re.split(rb"\r?\n?--" + re.escape(boundary) + rb"(?:--)?(?:\r?\n)?", body)
    head, content = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in parts[1:3])
    return json.loads(head), content


def _handler(bucket: Bucket) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # an answer in one piece, or each waits for an acknowledgement
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

        def _serve(self) -> None:
            url = urlsplit(self.path)
            self.query = dict(parse_qsl(url.query, keep_blank_values=True))
            body = self._body()
            line = f"{self.command} {unquote(url.path)}"
            bucket.requests.append(line)
            try:
                with bucket.lock:
                    if bucket.forbidden and re.search(bucket.forbidden, line):
                        raise _Failed(403)
                    self._answer(url.path, body)
            except _Failed as failed:
                status = failed.args[0]
                message = {"error": {"code": status, "message": f"{status}: {line}"}}
                self._send(b"" if status == 304 else json.dumps(message).encode(), status)

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _serve  # noqa: N815

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "") == "chunked":
                chunks = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    chunks.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(chunks)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _send(self, body: Any, status: int = 200, **headers: str) -> None:
            if not isinstance(body, bytes):
                body, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def _answer(self, path: str, body: bytes) -> None:
            found = re.fullmatch(
                r"/(upload/|download/|)storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", path
            )
            if not found or found[2] != bucket.name:
                raise _Failed(404)
            name = found[3] and unquote(found[3])
            if found[1] == "upload/":
                self._upload(body)
            elif not path.split(f"/b/{bucket.name}")[1]:
                facts = {"kind": "storage#bucket", "name": bucket.name, "id": bucket.name}
                self._send(facts | {"location": "US", "locationType": "multi-region"})
            elif name is None:
                self._send(_list(bucket, self.query))
            elif self.command == "POST":
                self._copy(found[3])
            else:
                if name not in bucket.objects:
                    raise _Failed(404)
                q = self.query
                bucket.check(name, q.get("ifGenerationMatch"), q.get("ifGenerationNotMatch"))
                if self.command == "DELETE":
                    del bucket.objects[name]
                    self._send(b"", 204)
                elif found[1] == "download/" or q.get("alt") == "media":
                    self._download(name)
                else:
                    self._send(bucket.describe(name))

        def _download(self, name: str) -> None:
            content, facts = bucket.objects[name], bucket.describe(name)
            headers = {"X-Goog-Generation": facts["generation"]}
            if self.query.get("generation", facts["generation"]) != facts["generation"]:
                raise _Failed(404)
            if not (found := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))):
                bucket.sent += len(content)
                self._send(content, **headers)
                return
            size = len(content)
            first = int(found[1]) if found[1] else max(0, size - int(found[2]))
            last = min(int(found[2]), size - 1) if found[1] and found[2] else size - 1
            if first >= size:
                raise _Failed(416)
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
            bucket.sent += last + 1 - first
            self._send(content[first : last + 1], 206, **headers)

        def _upload(self, body: bytes) -> None:
            q, kind = self.query, self.headers.get("Content-Type", "")
            match = q.get("ifGenerationMatch")
            if session := q.get("upload_id"):
                self._more(session, body)
            elif q["uploadType"] == "media":
                self._send(bucket.put(q["name"], body, match))
            elif q["uploadType"] == "multipart":
                facts, content = _multipart(body, kind)
                self._send(bucket.put(q.get("name", facts.get("name")), content, match))
            else:
                q.setdefault("name", json.loads(body or b"{}").get("name"))
                bucket.check(q["name"], match)
                session = f"s{len(bucket.uploads)}"
                bucket.uploads[session] = (q, bytearray())
                place = f"/upload/storage/v1/b/{bucket.name}/o?upload_id={session}"
                self._send(b"", Location=bucket.url + place)

        def _more(self, session: str, body: bytes) -> None:
            q, content = bucket.uploads[session]
            content += body
            if re.search(r"/\*$", self.headers.get("Content-Range", "")):
                self._send(b"", 308, Range=f"bytes=0-{len(content) - 1}")
            else:
                self._send(bucket.put(q["name"], bytes(content), q.get("ifGenerationMatch")))

        def _copy(self, rest: str) -> None:
            verbs = rf"/(?:rewriteTo/b/{bucket.name}|(moveTo))/o/"
            source, moves, target = re.split(verbs, rest)
            if unquote(source) not in bucket.objects:
                raise _Failed(404)
            made = bucket.put(unquote(target), bucket.objects[unquote(source)])
            if moves:
                del bucket.objects[unquote(source)]
                self._send(made)
            else:
                self._send({"done": True, "resource": made, "objectSize": made["size"]})

    return Handler


@contextlib.contextmanager
def local(name: str = "bucket") -> Iterator[Bucket]:
    """A bucket that the libraries of this process, and of those it starts, find at gs://NAME."""
    if not importlib.util.find_spec("gcsfs"):
        pytest.skip("the extra [gs] is not installed")
    from vadapter.io import buckets

    buckets._client.cache_clear()
    with Bucket(name) as bucket, pytest.MonkeyPatch.context() as patch:
        for key, value in bucket.environment().items():
            patch.setenv(key, value)
        yield bucket
    buckets._client.cache_clear()
