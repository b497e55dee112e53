"""README's "Share an adapter", run as it stands: exported, pushed, and used by its hub id.

A local HTTP server stands in for the hub and keeps what it is given.
"""

import shutil
import subprocess
import sys

import pytest
from support import guides, hub_server
from support.hub_server import NEW

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


@pytest.fixture
def hub():
    """The server: `files` is what it has, `created` what its repository was made with."""
    with hub_server.serving({}, REPO) as hub:
        yield hub


@pytest.fixture
def env(hub, tmp_path):
    """Of a process that knows no other hub."""
    return hub_server.environment(tmp_path / "hf", HF_ENDPOINT=hub.endpoint, HF_TOKEN="granted")


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
    (command, _), (code,) = blocks("bash"), blocks("python")
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
