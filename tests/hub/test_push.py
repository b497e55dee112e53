"""README's "Share an adapter", run as it stands: exported, pushed, and used by its hub id.

A local HTTP server stands in for the hub and keeps what it is given.
"""

import base64
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
from support import guides
from support.hub_server import NEW, Hub
from support.paths import ROOT

from vadapter import VAdapter
from vadapter.cli import main
from vadapter.errors import CheckpointError
from vadapter.hub.record import files, read
from vadapter.stages.restore import open_run
from vadapter.weights.hub import upload

REPO = "owner/name"
# What follows README's lines in their process: the adapter by its hub id, at first downloaded.
AGAIN = """
import shutil
from huggingface_hub import constants
shutil.rmtree({target!r})
for constants.HF_HUB_OFFLINE in (False, True):
    model = VAdapter.from_pretrained("owner/name@main")
    print(model.caption("photo.jpg"), model.folder.name)
"""


class Giving(Hub):
    """The answers that an upload needs: it asks for no large files, so all come in the commit."""

    repos = (REPO,)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.command, self.path))
        if self.headers.get("Authorization") != "Bearer granted":
            return self.error(401, None, "Invalid username or password.")
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            return self.json({"url": f"{self.server.endpoint}/{REPO}", "id": REPO})
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
        url = f"{self.server.endpoint}/{REPO}/commit/{NEW}"
        return self.json({"commitUrl": url, "commitOid": NEW})


@pytest.fixture
def hub():
    """The server: `files` is what it has, `created` what its repository was made with."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Giving)
    server.asked, server.files, server.main, server.created = [], {}, NEW, None
    server.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def env(hub, tmp_path):
    """Of a process that knows no other hub."""
    mine = ("HF_", "HUGGING", "TRANSF")
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(mine) and "proxy" not in k.lower()
    }
    return {
        **kept, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "granted",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip


def blocks(language):
    """The code of README's section in a language."""
    return guides.blocks(guides.section("vadapter/hub/README.md", "Share an adapter"), language)


def python(code, env, cwd):
    return subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True, timeout=120
    )


def test_the_five_lines_of_the_readme_export_use_and_push(
    own, folder, hub, env, tmp_path, monkeypatch
):
    said = VAdapter(open_run(own)).caption(folder / "shapes" / "02.png")
    run = shutil.copytree(own, tmp_path / "runs" / "quickstart")
    shutil.copy(folder / "shapes" / "02.png", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    (command,), (code,) = blocks("bash"), blocks("python")
    assert main.main(command.split()[1:]) == 0
    shutil.rmtree(run)
    target = tmp_path / command.split()[-1]
    hub.files["frozen-pooler.safetensors"] = b"of an earlier push"
    expected = {name: (target / name).read_bytes() for name in files(read(target))}

    assert len(list(filter(None, code.splitlines()))) == 5
    done = python(code + AGAIN.format(target=str(target)), env, tmp_path)
    assert done.returncode == 0, done.stderr
    first, *_, online, offline = done.stdout.splitlines()
    assert first == said
    assert online == offline == f"{said} {NEW}"
    assert hub.files == expected
    assert (hub.created["name"], hub.created["organization"]) == ("name", "owner")
    asked = {"private": True, "visibility": "private"}  # before and since huggingface_hub 1
    assert asked.items() & hub.created.items()


def test_a_refused_push_says_what_to_do(exported, hub, env, tmp_path):
    code = "from pathlib import Path\nfrom vadapter.weights.hub import upload\n"
    code += f"upload(Path({str(exported)!r}), ['config.json'], '{REPO}')"
    done = python(code, env | {"HF_TOKEN": "expired"}, tmp_path)
    assert "CheckpointError" in done.stderr
    assert "could not be pushed to owner/name" in done.stderr
    assert "HF_TOKEN" in done.stderr.splitlines()[-1]
    assert not hub.files


def test_an_invalid_hub_id_or_a_missing_file_is_not_pushed(exported, tmp_path):
    with pytest.raises(CheckpointError, match="'name' is not a hub id"):
        upload(exported, ["config.json"], "name")
    with pytest.raises(CheckpointError, match=r"nothing\.json is missing"):
        upload(exported, ["nothing.json"], REPO)
