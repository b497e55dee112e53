"""The images of launch/Dockerfile, as far as that goes without building them."""

import os
import re
import subprocess
import tomllib

import pytest
from support.launchers import LAUNCH, ROOT, put

# Lines that end in a backslash go on.
LINES = re.sub(r"\\\n", "", (LAUNCH / "Dockerfile").read_text()).splitlines()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
OTHERS = ["gs", "int8", "parquet", "tfds"]
# Notes what it is asked to install.
PIP = 'echo "$*" >asked'
PYTHON = 'mkdir -p venv/bin; cp "$(dirname "$0")/pip" venv/bin'


def instructions(name):
    return [line.split(None, 1)[1] for line in LINES if line.startswith(f"{name} ")]


ARGS = dict(line.split("=") for line in instructions("ARG"))


def install(folder, **args):
    """The step that installs, with these build arguments; what it asks pip for, or says."""
    path = put(folder / "bin", pip=PIP, python=PYTHON)
    done = subprocess.run(
        ["sh", "-c", instructions("RUN")[-1]], cwd=folder, capture_output=True, text=True,
        env={**os.environ, **ARGS, **args, "PATH": path},
    )  # fmt: skip
    return (folder / "asked").read_text().split() if done.returncode == 0 else done.stderr


def test_the_base_image_is_pinned():
    assert instructions("FROM") == ["python:${PYTHON}-slim-bookworm"]
    assert re.fullmatch(r"3\.\d+\.\d+", ARGS["PYTHON"])
    minor = f"Programming Language :: Python :: {ARGS['PYTHON'].rpartition('.')[0]}"
    assert minor in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]


@pytest.mark.parametrize(("extra", "extras"), [("tpu", ["tpu"]), ("cuda", ["cuda"]), ("cpu", [])])
def test_an_image_has_its_extras_with_buckets_and_a_pinned_jax(tmp_path, extra, extras):
    asked = install(tmp_path, EXTRA=extra)
    *_, project, jax = asked
    assert asked[0] == "install"
    found = re.fullmatch(r"\.\[(.*)\]", project)[1].split(",")
    assert found == extras + OTHERS
    assert set(found) <= set(EXTRAS)
    assert re.fullmatch(r"jax==\d+\.\d+\.\d+", jax)
    assert install(tmp_path, EXTRA=extra, JAX="0.9.1")[-1] == "jax==0.9.1"


def test_another_kind_of_image_is_refused(tmp_path):
    assert install(tmp_path, EXTRA="gpu") == "EXTRA=gpu: tpu, cuda or cpu\n"


def test_copied_files_exist_and_are_not_ignored():
    kept = re.findall(r"^!(.*)", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    for line in instructions("COPY"):
        *sources, _ = (word for word in line.split() if not word.startswith("--"))
        assert all((ROOT / source).exists() for source in sources)
        assert set(sources) <= set(kept)
