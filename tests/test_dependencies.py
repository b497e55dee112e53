"""Dependencies: the core ones are declared, and no other framework is installed or imported."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.official_files import MAKERS
from support.paths import ROOT

FRAMEWORKS = ("tensorflow", "torch", "transformers")
# The packages that the data formats and the model code are built on.
CORE = {
    "jax", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "ml_collections", "clu",
    "einops", "pyarrow",
}  # fmt: skip

# Imports every module, prints the help of every command, then prepares a benchmark and reads it,
# where an import of a framework fails and is recorded.
PROGRAM = f"""
import contextlib, importlib, importlib.machinery, io, pkgutil, sys

FRAMEWORKS = {FRAMEWORKS}
attempts = set()

def record(event, arguments):
    if event == "import" and arguments[0].split(".")[0] in FRAMEWORKS:
        attempts.add(arguments[0])

class Finder(importlib.machinery.PathFinder):  # the frameworks are as if not installed
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.split(".")[0] in FRAMEWORKS
        return None if hidden else super().find_spec(name, path, target)

sys.addaudithook(record)
sys.meta_path = [
    Finder if each is importlib.machinery.PathFinder else each for each in sys.meta_path
]

import vadapter

for module in pkgutil.walk_packages(vadapter.__path__, "vadapter."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)

from vadapter.cli.main import main

def help_of(*verb):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([*verb, "--help"])
    return out.getvalue()

def verbs(text):
    lines = (line.split() for line in text.splitlines() if line[:4] == "    " and line[4:5].strip())
    return [words[0] for words in lines if words[0].isalpha()]

commands = [(verb,) for verb in verbs(help_of())]
commands += [("data", verb) for verb in verbs(help_of("data"))]
for command in commands:
    assert "usage: vadapter " + " ".join(command) in help_of(*command), command
print(*(" ".join(command) for command in commands), sep=",")

official, out = sys.argv[1:]
assert main(["data", "prepare", "textvqa", f"--dir={{official}}", f"--out={{out}}"]) == 0

from vadapter.data.benchmarks.builders import COLUMNS
from vadapter.data.sources.tfds import TfdsSource

source = TfdsSource("vadapter_textvqa", "val", data_dir=out, columns=COLUMNS)
assert [len(source[i].qa) for i in range(len(source))], "no rows"
print(len(source), sorted(attempts))
"""


def declared() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_core_packages_are_dependencies_and_the_former_extras_are_accepted():
    project = declared()
    names = {item.split(">")[0].split("=")[0].strip() for item in project["dependencies"]}
    assert names >= CORE
    assert not names & {"tensorflow", "torch", "transformers"}
    extras = project["optional-dependencies"]
    assert extras["tfds"] == extras["parquet"] == []


def test_no_command_imports_another_framework(tmp_path):
    MAKERS["textvqa"](tmp_path / "official")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "official"), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    commands, *_, result = done.stdout.splitlines()
    assert {"train", "eval", "plan", "check", "export", "data prepare"} <= set(commands.split(","))
    assert result == "2 []"


@pytest.mark.slow
def test_a_fresh_installation_has_no_tensorflow_and_imports(tmp_path):
    python = tmp_path / "venv" / "bin" / "python"

    def run(*command: str, cwd: Path = tmp_path) -> str:
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "venv", str(tmp_path / "venv"))
    run(str(python), "-m", "pip", "install", "--quiet", f"{ROOT}[tfds,parquet]")
    installed = {
        line.split("==")[0].lower().replace("_", "-")
        for line in run(str(python), "-m", "pip", "list", "--format=freeze").splitlines()
    }
    assert {name.replace("_", "-") for name in CORE} <= installed
    assert not installed & {"tensorflow", "tensorflow-cpu", "tf-nightly", "torch", "transformers"}
    program = "import vadapter, vadapter.train.loop, tensorflow_datasets, pyarrow.parquet"
    run(str(python), "-c", program)
    assert "usage: vadapter" in run(str(tmp_path / "venv" / "bin" / "vadapter"), "--help")
