"""Strict numerics for every test, eight fake devices, the order of the files, and shared runs."""

import contextlib
import gc
import importlib.util
import io
import os
import signal
from pathlib import Path

from support.xla_flags import xla_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", xla_flags(devices=8))

# Each fake device waits in a thread for the others, once for every collective that may run now:
# with no more threads than devices, those that wait for different ones wait forever.
os.environ.setdefault("PJRT_NPROC", "32")

# A shell starts background jobs with Ctrl-C ignored, and whatever they start ignores it too: bash
# cannot even trap a signal that was ignored when it started.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from support import paths

# Programs are compiled once, whichever test or process needs them first. JAX reads the last two
# when it is imported; the command line reads the first.
os.environ["VADAPTER_COMPILE_CACHE"] = str(paths.cache_dir())
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(paths.cache_dir())
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest
from absl import flags
from support.order import LONG_FILES
from support.recipes import draw
from support.shared import make_once

from vadapter.io import results

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

if not flags.FLAGS.is_parsed():  # grain reads absl flags
    flags.FLAGS.mark_as_parsed()

# Tracing makes millions of objects that live as long as the program: with the default thresholds
# the collector walks over them again and again.
gc.freeze()
gc.set_threshold(200_000, 20, 50)


@pytest.fixture(scope="module", autouse=True)
def heap_of_earlier_files() -> None:
    """Leave what earlier files made out of collections.

    Commands that run several models call `gc.collect()` before each: a second where other tests
    have traced and compiled.
    """
    gc.collect(1)
    gc.freeze()


def pytest_report_header() -> list[str]:
    """Say why tests are left out."""
    root = paths.data_root()
    return [
        f"real data: {root}"
        if root.is_dir()
        else f"real data: none at {root} (VADAPTER_DATA), tests marked `data` are deselected"
    ]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put long files first; leave out what needs real data or the TPU's compiler, if absent."""
    order = {paths.TESTS / name: i for i, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path, len(order)))
    if not paths.data_root().is_dir():
        without = [item for item in items if item.get_closest_marker("data")]
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if not item.get_closest_marker("data")]
    if importlib.util.find_spec("libtpu") is None:
        skip = pytest.mark.skip(reason="libtpu is not installed (extra tpu)")
        for item in items:
            if item.get_closest_marker("libtpu"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    """Undo `results.keep_in` of commands that earlier tests and fixtures ran in this process."""
    results.keep_in(None)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The real data folder; tests that need it are marked `data` and deselected without it."""
    root = paths.data_root()
    assert root.is_dir(), "mark the test with pytest.mark.data"
    return root


@pytest.fixture(scope="session")
def chain(tmp_path_factory) -> Path:
    """The chain of `recipes.get_config`, trained once by `vadapter quickstart` on one device.

    It holds shapes/ (the data), run/ (the run directory) and log.txt, what the command printed.
    """
    return make_once(tmp_path_factory, "chain", _quickstart)


def _quickstart(folder: Path) -> None:
    from support.patches import use_devices

    from vadapter.cli.main import main

    recipe = f"{paths.RECIPES}:{draw(folder / 'shapes')}"
    words = ["quickstart", f"--config={recipe}", f"--workdir={folder / 'run'}"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as log:
        use_devices(patch, 1)
        assert main(words) == 0, log.getvalue()
    (folder / "log.txt").write_text(log.getvalue())
