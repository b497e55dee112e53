"""The second caption of a machine: what it loads, and that several first ones do not meet."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from support.paths import ROOT

# Loaded by training, by other media or by nothing that a caption of an image needs.
NOT_LOADED = {
    "flax", "optax", "orbax", "grain", "av", "pyarrow", "matplotlib", "clu", "array_record",
    "tensorflow", "tensorflow_datasets", "torch", "transformers", "huggingface_hub",
}  # fmt: skip
OWN_NOT_LOADED = (
    "vadapter.models.lm", "vadapter.models.generate", "vadapter.stages.steps", "vadapter.train",
    "vadapter.plan", "vadapter.inspect", "vadapter.compare",
)  # fmt: skip


def start(run, shapes, cache, *options):
    """Start `vadapter caption` of an image in a process with one device."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMP", "JAX_PERS"))}
    env |= {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, "VADAPTER_COMPILE_CACHE": str(cache)}
    command = [sys.executable, *options, "-m", "vadapter", "caption", str(run)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, str(shapes / "02.png")], env=env, **pipes)


def finish(process):
    """Return what it printed to each stream."""
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out, errors


def test_the_second_caption_loads_neither_models_nor_what_trains_them(chain, tmp_path):
    before = set((chain / "run").rglob("*"))
    first, _ = finish(start(chain / "run", chain / "shapes", tmp_path / "cache"))
    again, errors = finish(
        start(chain / "run", chain / "shapes", tmp_path / "cache", "-X", "importtime")
    )
    assert again == first
    assert first.strip()
    loaded = set(re.findall(r"^import time: .*\| +([\w.]+)$", errors, re.MULTILINE))
    assert "jax" in loaded
    assert not {name.partition(".")[0] for name in loaded} & NOT_LOADED
    assert not [name for name in loaded if name.startswith(OWN_NOT_LOADED)]
    assert set((chain / "run").rglob("*")) == before  # nothing is written there


@pytest.mark.slow
def test_first_captions_at_the_same_time_agree_and_keep_whole_results(chain, tmp_path):
    running = [start(chain / "run", chain / "shapes", tmp_path / "cache") for _ in range(4)]
    said = {finish(process)[0] for process in running}
    assert len(said) == 1
    kept = sorted(path.name for path in (tmp_path / "cache" / "results").iterdir())
    assert [name.partition("-")[0] for name in kept] == ["keys", "outline", "program"]
    assert {finish(start(chain / "run", chain / "shapes", tmp_path / "cache"))[0]} == said


@pytest.mark.slow
def test_a_cache_that_was_corrupted_between_two_captions_changes_nothing(chain, tmp_path):
    first, _ = finish(start(chain / "run", chain / "shapes", tmp_path / "cache"))
    for change in (lambda data: data[:-1], lambda data: b"", lambda data: b"x" + data):
        for path in (tmp_path / "cache" / "results").iterdir():
            path.write_bytes(change(path.read_bytes()))
        assert finish(start(chain / "run", chain / "shapes", tmp_path / "cache"))[0] == first
    shutil.rmtree(tmp_path / "cache" / "results")
    assert finish(start(chain / "run", chain / "shapes", tmp_path / "cache"))[0] == first
