"""The documentation site builds without a warning, and the notebook runs from top to bottom."""

import os
import shutil
import subprocess
import sys

import jupytext
import nbformat
from support.paths import RECIPES, ROOT

# Kernels warn about things of their own, which are errors in the tests' process.
EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[1])
"""


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "docs", "."]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    pages = {page.relative_to(tmp_path).as_posix() for page in tmp_path.rglob("*.html")}
    assert {"docs/index.html", "README.html", "launch/README.html", "docs/api/method.html"} <= pages
    assert "train_step" in (tmp_path / "docs/api/method.html").read_text(encoding="utf-8")


def test_the_notebook_runs_from_installation_to_captions(chain, tmp_path):
    notebook = jupytext.read(ROOT / "docs" / "notebooks" / "own_images.py")
    nbformat.write(notebook, tmp_path / "own_images.ipynb")
    run = shutil.copytree(chain / "run", tmp_path / "run")
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "NOTEBOOK_RUN": str(run),
        "NOTEBOOK_OPTIONS": f"--config={RECIPES}:{chain / 'shapes'}",
        "MPLBACKEND": "agg",
    }
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, "own_images.ipynb"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    executed = nbformat.read(tmp_path / "own_images.ipynb", as_version=4)
    printed = "".join(
        output.get("text", "") for cell in executed.cells for output in cell.get("outputs", [])
    )
    assert "blue-square.png: " in printed
    assert "red-circle.png: " in printed
    assert (tmp_path / "my-adapter" / "model.safetensors").is_file()
