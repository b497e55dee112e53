"""Hosts that differ in anything that a later stage reads are refused before the first one trains.

Real processes on this machine. The recipe is `runs.small` with its files in $HERE, a folder of each
host's own, and with a public tiny LM, which the second stage is the first to read.
"""

import json
import shutil
import sys

import pytest
from support import hosts as drive
from support import runs
from support.public_models import write_model
from support.public_tokenizers import llama2

from vadapter.errors import USER_ERROR

pytestmark = pytest.mark.slow

RECIPE = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from support import runs

def get_config(arg):
    config = runs.small(Path({folder!r}))
    with config.unlocked():
        config.components.tlm = {{"weights": "$HERE/tlm"}}
        for name in ("images", "held"):
            config.data[name].source.table = "$HERE/shapes/images.jsonl"
            config.data[name].update(text_len=80, target_len=78)
    return config
"""
LM = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
      "num_attention_heads": 2, "max_position_embeddings": 512, "model_type": "llama"}  # fmt: skip
# `vadapter` of another version, if $VERSION says so.
VADAPTER = """
import os, sys, vadapter
vadapter.__version__ = os.environ.get("VERSION", vadapter.__version__)
from vadapter.cli import main
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the files of host 0 in a, and the same in b."""
    folder = runs.prepare(tmp_path_factory.mktemp("agreement"))
    shutil.copytree(folder / "shapes", folder / "a/shapes")
    config = json.loads((llama2(folder / "a/tlm") / "config.json").read_text())
    write_model(folder / "a/tlm", {**config, **LM})
    shutil.copytree(folder / "a", folder / "b")
    (folder / "recipe.py").write_text(RECIPE.format(tests=str(runs.TESTS), folder=str(folder)))
    return folder


def refused(folder, tmp_path, command=(), **of_second):
    """The logs of both hosts, which end before a stage begins."""
    job = drive.Job(tmp_path, folder / "recipe.py", "mesh.fsdp=2", "stages.llm.accumulate=1")
    here = {i: {"HERE": str(folder / name)} for i, name in enumerate("ab")}
    command = command and (*command, f"--config={job.recipe}", f"--workdir={job.workdir}")
    job.start(command=command, variables={0: here[0], 1: here[1] | of_second})
    assert job.wait() == [USER_ERROR] * 2, job.logs()
    assert "Traceback" not in job.logs()
    assert not (job.workdir / "llm").exists()
    assert not (job.workdir / "tokenizers").exists()
    return [job.log(host) for host in (0, 1)]


def test_data_of_later_stages_of_evaluations_and_tokenizers_are_compared(folder, tmp_path):
    table = folder / "b/shapes/images.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    rows[0]["captions"][0] += " !"  # of stage 2 and 3
    assert [row["split"] for row in (rows[0], rows[-1])] == ["train", "val"]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))  # one to evaluate less
    path = folder / "b/tlm/tokenizer.json"
    spec = json.loads(path.read_text())
    del spec["model"]["merges"][0]
    path.write_text(json.dumps(spec))
    for log in refused(folder, tmp_path):
        assert "vadapter: the hosts differ in data or tokenizers:\n" in log
        assert [line.split(" = ")[0] for line in log.splitlines() if " = " in line] == [
            "  host 1: fingerprints.held",
            "  host 1: fingerprints.images",
            "  host 1: tokenizers.decoder",
        ]


def test_versions_are_compared(folder, tmp_path):
    other = (sys.executable, "-c", VADAPTER, "train")
    for log in refused(folder, tmp_path, other, VERSION="9.9"):
        assert "vadapter: the hosts differ in recipe or versions:\n  host 1: vadapter = 9.9" in log
