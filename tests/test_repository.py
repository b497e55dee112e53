"""The files around the package: continuous integration, pre-commit, packaging, import order."""

import ast
import os
import re
import subprocess
import tomllib
from pathlib import Path

import yaml
from support.order import LONG_FILES
from support.paths import README, ROOT, TESTS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CI = ROOT / ".ci" / "run"


def load_yaml(name: str) -> dict:
    """Return a YAML file of the repository; `on:` is the key True there."""
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def jobs() -> dict:
    return load_yaml(".github/workflows/ci.yml")["jobs"]


def minor(version: str) -> tuple[int, int]:
    """Return (0, 12) of "0.12.1" or "0.12.*"."""
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


def jax_requirements() -> list[str]:
    """Return what the package and its extras require of jax, without the name."""
    extras = PROJECT["optional-dependencies"]
    every = [*PROJECT["dependencies"], *extras["tpu"], *extras["cuda"]]
    return [m[1] for line in every if (m := re.fullmatch(r"jax(?:\[\w+\])?([<>=].*)", line))]


# -- continuous integration ------------------------------------------------------------------------


def test_the_workflow_runs_the_oldest_and_the_newest_python():
    ends = [row["python"] for row in jobs()["test"]["strategy"]["matrix"]["include"]]
    supported = [
        line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)
    ]
    assert ends == [supported[0], supported[-1]]
    assert PROJECT["requires-python"] == f">={supported[0]}"


def test_the_workflow_runs_the_oldest_and_the_newest_jax():
    oldest, newest = (row["jax"] for row in jobs()["test"]["strategy"]["matrix"]["include"])
    (requirement,) = set(jax_requirements())
    least, below = re.fullmatch(r">=([\d.]+),<([\d.]+)", requirement).groups()
    assert oldest == f"{least}.0"
    major, after = minor(below)
    assert minor(newest) == (major, after - 1)


def test_every_command_of_the_workflow_is_an_executable_file_of_the_repository():
    commands = [step["run"] for job in jobs().values() for step in job["steps"] if "run" in step]
    assert commands == [".ci/run"]
    assert all(os.access(ROOT / command.split()[0], os.X_OK) for command in commands)


def test_every_version_of_the_matrix_is_used():
    (job,) = jobs().values()
    used = set(re.findall(r"\$\{\{ matrix\.(\w+) \}\}", str(job["steps"])))
    assert used == {key for row in job["strategy"]["matrix"]["include"] for key in row}
    variables = set(re.findall(r"\$\{([A-Z_]+)\b", CI.read_text(encoding="utf-8")))
    assert {key for step in job["steps"] for key in step.get("env", {})} - variables == {
        "PIP_EXTRA_INDEX_URL"  # pip's own
    }


def test_ci_runs_the_test_command_of_the_readme():
    text = CI.read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", CI]).returncode == 0
    command = 'pytest -n 2 -m "not slow"'
    assert command in README.read_text(encoding="utf-8")
    assert command in text.replace("pytest -q", "pytest")
    assert 'pip" install' in text  # a clean environment


# -- pre-commit ------------------------------------------------------------------------------------


def test_pre_commit_runs_the_linter_the_formatter_and_the_type_checker():
    hooks = [
        hook for repo in load_yaml(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]
    ]
    assert [hook["id"] for hook in hooks] == ["ruff-check", "ruff-format", "pyright"]
    dev = [re.match(r"[\w-]+", line)[0] for line in PROJECT["optional-dependencies"]["dev"]]
    assert "pre-commit" in dev
    for hook in hooks:
        assert {"id", "name", "entry", "language"} <= set(hook)
        assert hook["entry"].split()[0] in dev
        assert hook["entry"].split()[0] in CI.read_text(encoding="utf-8")


# -- tests -----------------------------------------------------------------------------------------


def test_the_long_files_of_the_test_order_exist():
    assert [name for name in LONG_FILES if not (TESTS / name).is_file()] == []
    assert len(set(LONG_FILES)) == len(LONG_FILES)


# -- imports ---------------------------------------------------------------------------------------


def room_order() -> dict[str, int]:
    """Return room -> its place in the list of CONTRIBUTING; `plan`, `inspect`, `hub` share one."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = text.split("imports point", 1)[1].split(":\n\n", 1)[1].split("\n\n", 1)[0]
    steps = [re.findall(r"`([^`]+)`", step) for step in listed.split("→")]
    # Names within one pair of backquotes are a sequence; several pairs in a step are equals.
    places = [[name] for step in steps if len(step) == 1 for name in step[0].split(", ")]
    (products,) = (step for step in steps if len(step) > 1)
    places.insert(-1, products)
    return {name: place for place, names in enumerate(places) for name in names}


def imports(path: Path) -> set[str]:
    """Return the rooms of the package that a file imports, lazily or not."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "vadapter":
            names |= {f"vadapter.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.split(".")[1] for name in names if name.startswith("vadapter.")}


def test_imports_point_from_later_rooms_to_earlier_ones():
    order, package = room_order(), ROOT / "vadapter"
    wrong = []
    for path in sorted(package.rglob("*.py")):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        if own.startswith("__"):  # the facade
            continue
        assert own in order, f"{own} is missing in the list of CONTRIBUTING"
        others = imports(path) & set(order) - {own}
        wrong += [(str(path), room) for room in others if order[room] >= order[own]]
    assert wrong == []
