"""What imports what: rooms in one direction, no circles, and a training loop that loads little."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

PACKAGE = ROOT / "vadapter"
# Low to high: a module imports from its own room and from earlier ones, never from later ones,
# not even within a function.
ROOMS = (
    "errors", "config", "console", "html_page", "io", "distributed", "data", "models", "metrics",
    "weights", "recipe", "checkpoints", "stages", "report", "evaluate", "train", "plan", "inspect",
    "compare", "hub", "cli",
)  # fmt: skip
PRODUCTS = {"plan", "inspect", "compare", "hub"}  # none imports another
FACADE = {"vadapter", "vadapter.__main__"}

# `import vadapter.train.loop` loaded 111 modules with 18,587 lines before registries were lazy.
MAX_MODULES = 36  # packages included
MAX_LINES = 5100
NOT_LOADED = (
    "vadapter.metrics", "vadapter.data.benchmarks", "vadapter.data.scenes", "vadapter.data.sources",
    "vadapter.data.shards", "vadapter.data.features", "vadapter.data.media",
    "vadapter.data.tokenizers", "vadapter.stages.stage", "vadapter.models", "vadapter.weights",
    "vadapter.evaluate",
    "vadapter.io.gcs_lock", "vadapter.report", "vadapter.plan", "vadapter.inspect", "vadapter.hub",
    "vadapter.cli", "matplotlib", "huggingface_hub", "tensorflow", "tensorflow_datasets", "torch",
    "transformers", "pyarrow", "gcsfs", "tensorboard",
)  # fmt: skip


def modules() -> dict[str, Path]:
    """Return every module of the package: {dotted name: file}."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: dict[str, Path], *, lazy: bool) -> set[str]:
    """Return the modules of the package that a file imports.

    Args:
      path: of the file.
      known: see `modules`.
      lazy: also imports within functions and for type checkers.
    """
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if lazy else iter(at_import(tree.body))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in known else node.module for name in full}
    return names & set(known)


def at_import(body: list[ast.stmt]) -> list[ast.stmt]:
    """Return the statements that run when a module is imported."""
    statements = []
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        statements.append(node)
        if isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            statements += at_import(node.body)
    return statements


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_module_is_in_a_room():
    rooms = {room(name) for name in modules() if name not in FACADE}
    assert rooms == set(ROOMS)


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_only_from_earlier_rooms(name):
    known = modules()
    earlier = set(ROOMS[: ROOMS.index(name) + 1]) - (
        PRODUCTS - {name} if name in PRODUCTS else set()
    )
    for module, path in known.items():
        if module in FACADE or room(module) != name:
            continue
        upward = {m for m in imports(path, known, lazy=True) - FACADE if room(m) not in earlier}
        assert not upward, f"{module} imports {upward}"


def test_no_module_imports_itself_through_others():
    known = modules()
    graph = {name: imports(path, known, lazy=False) - {name} for name, path in known.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path, module))
        if module in done:
            return
        for other in graph[module]:
            visit(other, (*path, module))
        done.add(module)

    for module in graph:
        visit(module, ())


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    """The modules that are in memory after `import vadapter.train.loop`."""
    code = "import json, sys, vadapter.train.loop; print(json.dumps(list(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_loop_loads_no_scorers_scenes_benchmarks_or_readers_it_may_not_need(loaded):
    unneeded = [name for name in loaded if name.startswith(tuple(f"{n}." for n in NOT_LOADED))]
    assert sorted(unneeded + [name for name in NOT_LOADED if name in loaded]) == []


def test_the_loop_loads_little_of_the_package(loaded):
    known = modules()
    ours = sorted(name for name in loaded if name.startswith("vadapter"))
    lines = {name: len(known[name].read_text().splitlines()) for name in ours}
    assert len(ours) <= MAX_MODULES, ours
    assert sum(lines.values()) <= MAX_LINES, lines
