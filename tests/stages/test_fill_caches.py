"""`vadapter data cache`: what it writes is what training reads, however it was stopped."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from support import faults, runs

from vadapter.config import load, override
from vadapter.errors import PREEMPTED, ConfigError, UserError
from vadapter.recipe.schema import read, used_data
from vadapter.stages.fill_caches import write_caches
from vadapter.stages.run import Run

COMMAND = """
import sys
from support import faults
from vadapter.cli.main import main
from vadapter.data import features
features.SHARD_BYTES, features.ROUND = 1, 4  # six files for the 24 images
faults.install()
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The file of a recipe whose encoder another run has trained."""
    return runs.write_recipe(runs.prepare(tmp_path_factory.mktemp("cache")))


def start(recipe, *arguments, fault=""):
    env = {
        **os.environ,
        "PYTHONPATH": f"{runs.TESTS.parent}{os.pathsep}{runs.TESTS}",
        faults.VARIABLE: fault,
        "XLA_FLAGS": "",
    }
    command = [sys.executable, "-c", COMMAND, "data", "cache", recipe, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(list(map(str, command)), env=env, **pipes)


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*.array_record")}


@pytest.mark.slow
def test_a_killed_command_resumes_after_the_last_complete_file(recipe, tmp_path):
    out = tmp_path / "killed"
    have, kept = [], {}
    # Six files, a batch each; a batch is written once the next has begun.
    for name, code, batch in (("KILL", -signal.SIGKILL, 3), ("TERM", PREEMPTED, 2)):
        with start(recipe, f"--out={out}", fault=f"{name}:images:features:{batch}") as process:
            text = process.communicate()[0]
        assert process.returncode == code, text
        assert kept.items() <= shards(out).items()
        kept = shards(out)
        have.append(len(kept))
    assert "images, features: stopped by SIGTERM; run the same command again to resume" in text
    assert have == [2, 3]
    with start(recipe, f"--out={out}") as process:
        text = process.communicate()[0]
    assert process.returncode == 0, text
    (folder,) = out.iterdir()
    size = 12 * 2 * 16 * 32
    line = f"12 of 24 examples × 2 × 1 × 16 tokens × 16 bfloat16: {size:,} bytes"
    assert line in text
    assert "features: 12/12" in text
    assert f"images: {folder}\n  --config.data.images.cache=True --config.data.images" in text
    with start(recipe, f"--out={tmp_path / 'whole'}") as process:
        process.communicate()
    assert len(shards(out)) == 6
    assert shards(out) == shards(tmp_path / "whole")
    assert sorted(p.suffix for p in folder.iterdir()) == ["", *[".array_record"] * 6, ".json"]


@pytest.mark.slow
def test_kills_at_random_times_leave_nothing_but_complete_files(recipe, tmp_path):
    rng, killed, out = np.random.default_rng(0), 0, tmp_path / "out"
    began = time.monotonic()
    with start(recipe, f"--out={tmp_path / 'whole'}") as process:
        process.communicate()
    length, whole = time.monotonic() - began, shards(tmp_path / "whole")
    for _ in range(12):
        with start(recipe, f"--out={out}") as process:
            try:
                process.communicate(timeout=length * rng.uniform(0.4, 1.1))
            except subprocess.TimeoutExpired:
                process.kill()
        killed += process.returncode == -signal.SIGKILL
        assert shards(out).items() <= whole.items()
    assert killed
    with start(recipe, f"--out={out}") as process:
        process.communicate()
    assert shards(out) == whole


def test_training_reads_what_the_command_wrote(recipe, tmp_path, capsys):
    values = load(str(recipe))
    override(values, [f"data.images.cache_dir={tmp_path / 'shared'}"])
    ((name, config, made),) = write_caches(read(values), stored="int8")
    assert (name, config.cache_dtype, config.flip) == ("images", "int8", True)
    override(values, ["data.images.cache_dtype=int8", "chain=decoder"])
    assert "feature cache: 24 of 24 examples" in capsys.readouterr().out
    identities = []
    for workdir in ("a", "b"):  # two runs, one folder
        stage = Run(read(values), tmp_path / workdir).stage("decoder")
        frozen = stage.load_params()[1]
        items, _ = stage.stream("images", frozen)
        assert items.cache.folder == made.cache.folder
        np.testing.assert_array_equal(items[5].media.tokens, made[5].media.tokens)
        assert not (tmp_path / workdir / "features").exists()
        identities.append(stage.identity())
        override(values, [f"data.images.cache_dir={(tmp_path / 'shared').resolve()}/."])
    assert "features:" not in capsys.readouterr().out  # nothing is computed again
    assert identities[0] == identities[1]  # the folder is not part of the identity


def test_a_run_directory_gets_the_caches_of_its_stages(recipe, tmp_path):
    made = [m for _, _, m in write_caches(read(load(str(recipe))), workdir=tmp_path / "run")]
    assert [m.cache.folder.parent for m in made] == [tmp_path / "run" / "features"]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["features"]


def test_data_of_an_evaluation_that_no_stage_runs_by_itself_is_cached(recipe, tmp_path):
    values = load(str(recipe))
    values.chain, values.stages.decoder.evals = ("decoder",), ()
    assert "held" not in used_data(read(values), read(values).stages["decoder"])
    ((name, _, made),) = write_caches(read(values), ("held",), out=tmp_path)
    assert (name, len(made)) == ("held", 12)


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (("imegas",), (), "--data=imegas: unknown; did you mean 'images'"),
        ((), ("data.images.cache=false",), "no data set of the recipe has cache=True"),
        (("documents",), (), "data.documents: no stage of the recipe's chain uses it with a"),
        (("clips",), (), "data.clips: no stage of the recipe's chain uses it with a f"),
        ((), ("stages.decoder.start.encoder=vision",), "stage vision: pass --workdir=RUN"),
        ((), ("data.images.cache_dir=$NOWHERE_AT_ALL",), "NOWHERE_AT_ALL is not set"),
    ],
)
def test_uncacheable_data_is_an_error(recipe, tmp_path, names, changes, message):
    values = load(str(recipe))
    with values.unlocked():
        vision = {"kind": "vision", "steps": 1, "batch": 8, "data": {"images": 1.0}}
        values.stages.vision = {**vision, "optim": {"warmup": 0}}
        values.chain = ("vision", "decoder")
    override(values, changes)
    out = None if "cache_dir" in str(changes) else tmp_path
    with pytest.raises(UserError, match=message):
        list(write_caches(read(values), names, out=out))


def test_an_output_path_is_required(recipe):
    with pytest.raises(ConfigError, match=r"data\.images: no folder to write to; give --out"):
        list(write_caches(read(load(str(recipe)))))


def test_a_flipped_bit_in_a_shared_folder_stops_the_second_run(recipe, tmp_path):
    ((_, config, made),) = write_caches(read(load(str(recipe))), out=tmp_path)
    path = made.cache.path(0)
    data = bytearray(path.read_bytes())
    data[data.index(made.cache.key.encode())] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path}: truncated or corrupt"):
        list(write_caches(read(load(str(recipe))), out=tmp_path))
    path.unlink()
    ((_, again, _),) = write_caches(read(load(str(recipe))), out=tmp_path)
    assert dataclasses.asdict(again) == dataclasses.asdict(config)
    assert path.read_bytes() != bytes(data)
