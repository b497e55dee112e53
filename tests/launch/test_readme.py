"""The guide's lines for a TPU pod are complete: what they train is a recipe that goes together."""

import json
import re
import shlex
import subprocess

import pytest
from support import guides
from support.launchers import ROOT, put

from vadapter.cli.main import main


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What the lines print, with --dry-run and a `vadapter` that prints its arguments."""
    lines = guides.blocks(guides.section("launch/README.md", "Run on a TPU pod"), "bash")[0]
    lines = re.sub(r"launch/tpu_vm.sh +(\w+)", r"launch/tpu_vm.sh \1 --dry-run", lines)
    path = put(tmp_path_factory.mktemp("bin"), vadapter='printf "vadapter %s\\n" "${*@Q}"')
    return subprocess.run(
        ["bash", "-euc", lines], cwd=ROOT, env={"PATH": path}, capture_output=True, text=True,
        check=True,
    ).stdout.splitlines()  # fmt: skip


@pytest.fixture(scope="module")
def on_a_host(said):
    """The command that every host runs."""
    (line,) = (line for line in said if "vadapter.pid" in line and "supervise.sh" in line)
    (command,) = (w for w in shlex.split(line) if w.startswith("--command="))
    return command


def test_hosts_train_what_was_checked(said, on_a_host):
    (checked,) = (line for line in said if line.startswith("vadapter "))
    trains = shlex.split(re.search(r"-- vadapter train (.*?) >>", on_a_host)[1])
    assert shlex.split(checked)[1:] == ["check", *trains]


def test_the_installed_extras_can_read_buckets(said):
    (line,) = (line for line in said if "pip install" in line)
    assert "vadapter[tpu,gs] @ git+" in line


def test_the_check_reports_only_what_the_bucket_lacks(on_a_host, tmp_path, monkeypatch, capsys):
    # A folder stands in for the bucket.
    words = shlex.split(on_a_host.replace("gs://BUCKET", str(tmp_path)).replace(";", " "))
    (data,) = (word for word in words if word.startswith("VADAPTER_DATA="))
    monkeypatch.setenv(*data.split("="))
    arguments = [word for word in words if word.startswith(("--config", "--workdir"))]
    assert main(["check", "--json", *dict.fromkeys(arguments)]) == 78
    facts = json.loads(capsys.readouterr().out)
    (stage,) = facts["stages"]
    assert stage["kind"] == "adapter"
    places = {"VIT/STAGE", "LLM/STAGE", "ONE/decoder", "data/pairs", "data/clips"}
    found = [re.findall(rf"{tmp_path}/(\w+/\w+)", problem)[0] for problem in facts["problems"]]
    assert sorted(found) == sorted(places)
