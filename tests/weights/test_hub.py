"""Hub ids become pinned folders; whatever is in the way is said with its remedy.

A local HTTP server stands in for the hub. Each case runs in a process of its own, because
`huggingface_hub` reads its environment when it is imported.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.hub_server import NEW, OLD, WANTED

from vadapter.errors import CheckpointError
from vadapter.weights.hub import Snapshot, download_command, resolve

SCRIPT = """
import json, sys
from vadapter.errors import CheckpointError
from vadapter.weights.hub import resolve
try:
    found = resolve(sys.argv[1], **json.loads(sys.argv[2]))
    print(json.dumps([str(found.path), found.repo_id, found.revision]))
except CheckpointError as error:
    print(json.dumps(str(error)))
"""


def ask(env, spec: str, **kwargs) -> Snapshot | str:
    """What `resolve` gives, or the message of its CheckpointError."""
    command = [sys.executable, "-c", SCRIPT, spec, json.dumps(kwargs)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return found if isinstance(found, str) else Snapshot(Path(found[0]), *found[1:])


def at(env, server, **more) -> dict[str, str]:
    return {**env, "HF_ENDPOINT": server.endpoint, **more}


def contents(folder: Path) -> set[str]:
    files = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return {str(p) for p in files if p.parts[0] != ".cache"}


def test_a_branch_is_pinned_to_its_commit_and_no_pickle_is_fetched(hub, env):
    found = ask(at(env, hub), "owner/model")
    assert (found.repo_id, found.revision) == ("owner/model", NEW)
    assert contents(found.path) == WANTED
    assert (found.path / "model.safetensors").read_bytes() == b"weights"
    assert not [path for _, path in hub.asked if re.search(r"\.(bin|pth)$|onnx", path)]


@pytest.mark.parametrize(
    ("spec", "revision"),
    [("owner/model@release-1", None), ("owner/model", "release-1"), (f"owner/model@{OLD}", OLD)],
)
def test_a_revision_is_taken_from_the_id_or_from_the_argument(hub, env, spec, revision):
    assert ask(at(env, hub), spec, revision=revision).revision == OLD


def test_patterns_narrow_the_download_and_never_admit_pickles(hub, env):
    assert contents(ask(at(env, hub), "owner/model", allow=["config*"]).path) == {"config.json"}
    everything = contents(ask(at(env, hub), "owner/model", allow=["*"]).path)
    assert everything == {*WANTED, "README.md"}


def test_offline_the_cache_is_enough_and_keeps_the_commit(hub, env):
    online = ask(at(env, hub), "owner/model")
    hub.asked.clear()
    offline = ask(at(env, hub, HF_HUB_OFFLINE="1"), "owner/model")
    assert offline == online
    assert offline.revision == NEW
    assert ask(at(env, hub, HF_HUB_OFFLINE="1"), f"owner/model@{NEW}") == online
    assert not hub.asked


def run_the_command_in(message: str, env, folder: Path) -> set[str]:
    """Run the download command of a message and return what it fetched."""
    command = shlex.split(next(line for line in message.splitlines() if "hf download" in line))
    hf = shutil.which("hf", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hf is None:
        pytest.skip("the command `hf` of huggingface_hub is not installed")
    folder.mkdir()
    done = subprocess.run(
        [hf, *command[1:]], env=env, cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return contents(folder / "model")


def test_offline_without_a_cache_gives_a_command_that_fetches_the_files(hub, env, tmp_path):
    message = ask(at(env, hub, HF_HUB_OFFLINE="1"), "owner/model@release-1")
    assert "'release-1' is not in the cache" in message
    assert "HF_HUB_OFFLINE forbids downloading it" in message
    assert download_command("owner/model", "release-1") in message
    assert not hub.asked
    assert run_the_command_in(message, at(env, hub), tmp_path / "elsewhere") == WANTED


def test_an_incomplete_cache_is_not_used(hub, env):
    ask(at(env, hub), "owner/model", allow=["config.json"])
    message = ask(at(env, hub, HF_HUB_OFFLINE="1"), "owner/model")
    assert "only partly in the cache" in message
    assert "hf download owner/model" in message


def test_a_refused_connection_gives_the_command_and_the_reason(env):
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        message = ask({**env, "HF_ENDPOINT": endpoint}, "owner/model")
    assert f"cannot be downloaded from {endpoint} (ConnectError: " in message
    assert "hf download owner/model --revision main" in message
    assert message.rstrip().endswith("use its path instead of the hub id.")


@pytest.mark.parametrize("repo", ["owner/gated-info", "owner/gated-files"])
@pytest.mark.parametrize("token", [None, "stranger"])
def test_a_gated_repository_names_its_license_page_and_the_variable(hub, env, repo, token):
    env = at(env, hub, **({"HF_TOKEN": token} if token else {}))
    message = ask(env, repo)
    assert f"{repo} is gated" in message
    assert f"{env['HF_ENDPOINT']}/{repo}, then set the environment variable HF_TOKEN" in message
    assert ("no token is in use" in message) == (token is None)
    assert ask({**env, "HF_TOKEN": "granted"}, repo).revision == NEW


def test_a_token_that_has_expired_is_said_to_be_refused(hub, env):
    message = ask(at(env, hub, HF_TOKEN="expired"), "owner/model")
    assert "refuses owner/model (HTTP 401)" in message
    assert "HF_TOKEN to a valid token" in message


@pytest.mark.parametrize("token", [None, "someone"])
def test_an_unknown_repository_gives_the_nearest_one(hub, env, token):
    message = ask(at(env, hub, **({"HF_TOKEN": token} if token else {})), "owner/modl")
    assert "no such repository" in message
    assert "did you mean 'owner/model'?" in message
    assert "HF_TOKEN" in message
    assert "did you mean" not in ask(at(env, hub), "nobody/zzz")


def test_an_unknown_revision_gives_the_nearest_one(hub, env):
    message = ask(at(env, hub), "owner/model@release-2")
    assert "no revision 'release-2'; did you mean 'release-1'?" in message


def test_a_local_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert resolve(str(tmp_path)) == Snapshot(tmp_path, "", "")
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/model") == Snapshot(Path("owner/model"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/owner").path == tmp_path / "owner"
    with pytest.raises(CheckpointError, match="a local folder, which has no revision 'main'"):
        resolve(str(tmp_path), revision="main")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "neither an existing folder nor a hub id (owner/name or owner/name@revision"),
        ("llma", "such as 'openai-community/gpt2'); did you mean 'llama'?"),
        ("./llma", "no folder './llma'; did you mean 'llama'?"),
        ("deep/er/model", "no folder 'deep/er/model'; 'deep/er' does not exist either"),
        ("llama/model.safetensors", "is a file: give the folder that holds it, 'llama'"),
        ("owner/model@", "neither an existing folder nor a hub id"),
        ("owner/mo del", "neither an existing folder nor a hub id"),
        ("https://huggingface.co/owner/model", "no folder 'https://huggingface.co/owner/model'"),
        ("owner/model@a", "contradict: give one of them"),
    ],
)
def test_a_source_that_is_neither_folder_nor_hub_id_is_explained(
    spec, message, tmp_path, monkeypatch
):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        resolve(spec, revision="b" if spec.endswith("@a") else None)
    assert message in str(caught.value)
