import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from support.paths import ROOT

from vadapter.checkpoints.array_io import CorruptError, load, read_meta
from vadapter.checkpoints.digest import tree_digests
from vadapter.checkpoints.manager import Checkpointer, steps
from vadapter.errors import CheckpointError, ConfigError

META = {"stage": "vision", "config": {"model": {"depth": 2, "width": 16}}}


def _shard(tree, n_devices):
    """Rows over the devices where they divide, the rest replicated."""
    mesh = Mesh(np.array(jax.devices()[:n_devices]), ("data",))

    def place(x):
        rows = x.ndim == 2 and x.shape[0] % n_devices == 0
        return jax.device_put(x, NamedSharding(mesh, P("data") if rows else P()))

    return jax.tree.map(place, tree)


def _state(seed=0, n_devices=1):
    key = jax.random.key(seed)
    params = {
        "adapter": {"kernel": jax.random.normal(key, (16, 4)), "bias": jnp.full((3,), seed)},
        "table": jax.random.normal(key, (8, 4), jnp.bfloat16),
    }
    state = {
        "params": params,
        "opt": optax.adam(1e-3).init(params),
        "rng": key,
        "step": jnp.int32(seed),
        "seen": jnp.array([True, False]),
        "bytes": jnp.arange(5, dtype=jnp.uint8),
    }
    return _shard(state, n_devices)


def _abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with steps 5 and 10, its state of step s being `_state(s)`; work on a copy."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpointer = Checkpointer(directory, keep=2)
    for step in (5, 10):
        assert checkpointer.save(step, _state(step), META)
    checkpointer.close()
    return directory


@pytest.fixture
def run(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def _restored_step(directory):
    """The step a resume ends up at, after checking that its state is exactly what was saved."""
    restored = Checkpointer(directory, keep=2).restore(_abstract(_state()), expect=META)
    assert restored is not None
    state, meta = restored
    assert tree_digests(state) == tree_digests(_state(meta["step"]))
    return meta["step"]


def _flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


# --- Round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n_from", [1, 8])
@pytest.mark.parametrize("n_to", [1, 2, 8])
def test_a_state_restores_bit_for_bit_onto_any_number_of_devices(tmp_path, n_from, n_to):
    state, target = _state(3, n_from), _abstract(_state(0, n_to))
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(3, state, META)
    restored, meta = checkpointer.restore(target, expect=META)
    checkpointer.close()
    assert tree_digests(restored) == tree_digests(state) == meta["digests"]
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
        lambda x: x.sharding, target
    )
    draw, again = (jax.device_get(jax.random.normal(x["rng"])) for x in (state, restored))
    assert draw == again
    assert {key: meta[key] for key in META} == META
    assert meta["step"] == 3


@pytest.mark.parametrize("n_devices", [1, 8])
def test_the_state_may_be_donated_while_it_is_being_written(tmp_path, n_devices):
    update = jax.jit(lambda state: {"w": state["w"] + 1}, donate_argnums=0)
    state = _shard({"w": jnp.zeros((64, 4096))}, n_devices)
    target = _abstract(state)
    checkpointer = Checkpointer(tmp_path, keep=9)
    for step in range(3):
        checkpointer.save(step, state, {})
        state = update(update(state))
    checkpointer.close()
    for step in range(3):
        restored, _ = load(tmp_path / str(step), target)
        assert float(restored["w"].min()) == float(restored["w"].max()) == 2 * step


def test_the_newest_few_steps_are_kept(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=2)
    for step in range(1, 8):
        checkpointer.save(step, {"w": jnp.ones(2)}, {})
    assert checkpointer.wait() == 7
    assert checkpointer.committed() == [6, 7]
    checkpointer.close()


def test_a_step_is_saved_once_and_never_after_a_later_one(run):
    checkpointer = Checkpointer(run, keep=5)
    with pytest.raises(CheckpointError, match=r"already has step 10, so step 7 cannot be saved"):
        checkpointer.save(7, _state(7), META)
    with pytest.raises(CheckpointError, match="resume that run, or choose another"):
        checkpointer.save(10, _state(7), META)
    checkpointer.restore(_abstract(_state()))
    assert not checkpointer.save(10, _state(10), META)  # it is there, and it is ours
    assert checkpointer.save(11, _state(11), META)
    assert not checkpointer.save(11, _state(11), META)
    checkpointer.close()
    assert steps(run) == [5, 10, 11]


def test_no_checkpoint_at_all_is_none(tmp_path):
    assert Checkpointer(tmp_path / "new", keep=1).restore(_abstract(_state())) is None


def test_one_part_of_one_step_restores_for_evaluation_and_nothing_changes(run):
    leftover = run / "15.orbax-checkpoint-tmp"
    leftover.mkdir()  # of a run that is still saving
    wanted = {"params": _abstract(_state())["params"]}
    for step in (5, 10):
        part, meta = load(run / str(step), wanted, expect={"stage": "vision"}, subset=True)
        assert meta["step"] == step
        assert tree_digests(part) == tree_digests({"params": _state(step)["params"]})
    with pytest.raises(CheckpointError, match="does not fit this run"):
        load(run / "5", wanted)  # a subset is accepted only on request
    with pytest.raises(CorruptError, match="no readable meta"):
        load(run / "7", wanted, subset=True)
    assert leftover.is_dir()
    Checkpointer(run, keep=1)
    assert not leftover.exists()


def test_misuse_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot keep 0 checkpoints"):
        Checkpointer(tmp_path, keep=0)
    checkpointer = Checkpointer(tmp_path, keep=1)
    with pytest.raises(ValueError, match="reserved keys"):
        checkpointer.save(1, {"w": jnp.ones(2)}, {"digests": 1})
    with pytest.raises(ValueError, match=r"without elements cannot be saved: \['w'\]"):
        checkpointer.save(1, {"w": jnp.ones((0, 2))}, {})
    with pytest.raises(ValueError, match=r"without a sharding.*\['w'\]"):
        load(tmp_path, {"w": jax.ShapeDtypeStruct((2,), jnp.float32)})


# --- Checkpoints that do not fit -----------------------------------------------------------------


def test_another_tree_shape_dtype_or_config_is_a_table_and_not_an_older_step(run):
    target = _abstract(_state())
    kernel = target["params"]["adapter"].pop("kernel")
    target["params"]["adapter"]["weight"] = kernel
    place = target["step"].sharding
    target["bytes"] = jax.ShapeDtypeStruct((7,), jnp.uint8, sharding=place)
    target["params"]["table"] = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=place)
    expect = {"stage": "adapter", "config": {"model": {"depth": 4, "width": 16}}, "new": (1, 2)}
    with pytest.raises(CheckpointError) as error:
        Checkpointer(run, keep=2).restore(target, expect=expect)
    assert not isinstance(error.value, CorruptError)
    lines = str(error.value).splitlines()
    rows = {tuple(cell.strip() for cell in line.split("|")) for line in lines if "|" in line}
    assert rows == {
        ("leaf or field", "checkpoint", "this run"),
        ("stage", "vision", "adapter"),
        ("config.model.depth", "2", "4"),
        ("new", "—", "[1, 2]"),
        ("bytes", "uint8[5]", "uint8[7]"),
        ("params.adapter.kernel", "float32[16, 4]", "—"),
        ("params.adapter.weight", "—", "float32[16, 4]"),
        ("params.table", "bfloat16[8, 4]", "float32[8, 4]"),
    }
    assert f"{run / '10'} does not fit this run, 7 differences" in lines[0]
    assert "Use the configuration that it was written with" in lines[-1]
    assert steps(run) == [5, 10]


def test_a_long_table_is_truncated(run):
    expect = {f"field_{i}": i for i in range(40)}
    with pytest.raises(CheckpointError, match=r"40 differences(.|\n)*… 28 more"):
        Checkpointer(run, keep=2).restore(_abstract(_state()), expect=expect)


def test_a_checkpoint_of_a_newer_version_is_refused_and_not_skipped(run, monkeypatch):
    monkeypatch.setattr("vadapter.checkpoints.array_io.SCHEMA", 0)
    with pytest.raises(CheckpointError, match="reads only up to 0: update it"):
        Checkpointer(run, keep=2).restore(_abstract(_state()))


# --- Corruption --------------------------------------------------------------------------------


def _files(saved):
    return sorted(
        str(p.relative_to(saved / "10")) for p in (saved / "10").rglob("*") if p.is_file()
    )


def test_a_flipped_bit_is_found_wherever_it_is(saved, tmp_path, caplog):
    digest_found_it = 0
    for i, name in enumerate(_files(saved)):
        run = Path(shutil.copytree(saved, tmp_path / str(i)))
        _flip_a_bit(run / "10" / name)
        caplog.clear()
        step = _restored_step(run)
        assert step == 5 or not name.startswith(("meta/metadata", "state/manifest")), name
        if step == 5:
            reasons = [r for r in caplog.messages if "skipped a corrupt checkpoint" in r]
            assert len(reasons) == 1
            assert len(reasons[0].splitlines()) == 1
            digest_found_it += "the digest of" in reasons[0]
            assert (run / "quarantine" / "10").is_dir()


@pytest.mark.parametrize("harm", ["delete", "empty", "halve"])
def test_missing_and_truncated_files_never_restore_wrong_values(saved, tmp_path, harm):
    fell_back = set()
    for i, name in enumerate(_files(saved)):
        run = Path(shutil.copytree(saved, tmp_path / str(i)))
        path = run / "10" / name
        if harm == "delete":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 * (harm == "halve")])
        if _restored_step(run) == 5:
            fell_back.add(name)
    assert {"meta/metadata", "state/manifest.ocdbt"} <= fell_back


def test_wrong_values_in_a_valid_file_are_detected_by_their_digest(run, caplog):
    """Orbax and TensorStore restore such a file without complaint."""
    other = run.parent / "other"
    checkpointer = Checkpointer(other, keep=1)
    state = _state(10)
    state["params"]["adapter"]["kernel"] = state["params"]["adapter"]["kernel"].at[3, 2].add(1e-6)
    checkpointer.save(10, state, META)
    checkpointer.close()
    shutil.rmtree(run / "10" / "state")
    shutil.copytree(other / "10" / "state", run / "10" / "state")
    assert _restored_step(run) == 5
    assert "the digest of 1 of 14 leaves differs, first params.adapter.kernel" in caplog.text


def test_meta_that_changed_on_disk_is_corrupt_and_not_another_configuration(run, caplog):
    path = run / "10" / "meta" / "metadata"
    path.write_text(path.read_text().replace("vision", "visiom"))
    assert _restored_step(run) == 5
    assert "meta was changed after it was written" in caplog.text


def test_interrupted_copies_and_renamed_steps_are_skipped_with_a_reason(run, caplog):
    (run / "35").mkdir()
    shutil.copytree(run / "10", run / "30")
    shutil.copytree(run / "10", run / "25", ignore=shutil.ignore_patterns("d", "manifest*"))
    assert Checkpointer(run, keep=9).committed() == [5, 10, 25, 30]
    assert _restored_step(run) == 10
    reasons = [r.split(": ", 1)[1] for r in caplog.messages if "skipped" in r]
    assert len(reasons) == 3
    assert reasons[0].startswith(f"{run / '35'}: no readable meta")
    assert reasons[1] == f"{run / '30'}: contains step 10"
    assert reasons[2].startswith(f"{run / '25'}: cannot read ")
    assert steps(run) == [5, 10]
    assert steps(run / "quarantine") == [25, 30, 35]


def test_if_all_are_corrupt_the_run_stops_and_nothing_is_moved(run):
    for step in (5, 10):
        (run / str(step) / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .* can be used") as error:
        Checkpointer(run, keep=2).restore(_abstract(_state()))
    assert len(str(error.value).splitlines()) <= 5
    assert steps(run) == [5, 10]
    with pytest.raises(CorruptError, match="cannot read"):
        load(run / "10", _abstract(_state()))


def test_corruption_is_reported_without_the_noise_of_libraries(run, capfd):
    (run / "10" / "state" / "manifest.ocdbt").write_bytes(b"not a manifest")
    assert _restored_step(run) == 5
    printed = capfd.readouterr()
    assert len((printed.out + printed.err).splitlines()) <= 5


# --- Saves that fail -----------------------------------------------------------------------------


def _python(script, directory):
    root = ROOT
    env = {**os.environ, "PYTHONPATH": str(root), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", script, str(directory)],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


KILLED = """
import os, pathlib, signal, sys
import numpy as np, jax
from vadapter.checkpoints.manager import Checkpointer
noise = np.random.default_rng(0).standard_normal(3_000_000).astype("float32")
state = {"w": jax.numpy.asarray(noise)}
checkpointer = Checkpointer(pathlib.Path(sys.argv[1]), keep=3)
checkpointer.save(1, state, {})
print("committed", checkpointer.wait(), flush=True)
checkpointer.save(2, state, {})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_save_killed_midway_leaves_the_one_before_it(tmp_path):
    killed = _python(KILLED, tmp_path)
    assert killed.returncode == -signal.SIGKILL
    assert "committed 1" in killed.stdout
    assert list(tmp_path.glob("2.orbax-checkpoint-tmp*"))  # it was midway
    assert steps(tmp_path) == [1]
    checkpointer = Checkpointer(tmp_path, keep=3)
    assert not list(tmp_path.glob("*tmp*"))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {"w": jax.ShapeDtypeStruct((3_000_000,), jnp.float32, sharding=place)}
    state, meta = checkpointer.restore(target)
    assert meta["step"] == 1
    assert checkpointer.save(2, state, {})
    assert checkpointer.wait() == 2
    checkpointer.close()


FULL = """
import pathlib, resource, sys
import numpy as np, jax
from vadapter.errors import CheckpointError
from vadapter.checkpoints.manager import Checkpointer
directory = pathlib.Path(sys.argv[1])
noise = np.random.default_rng(0).standard_normal(100_000).astype("float32")
state = {"w": jax.numpy.asarray(noise)}
checkpointer = Checkpointer(directory, keep=3)
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
def tidy():
    assert not list(directory.glob("*tmp*")), list(directory.iterdir())
checkpointer.save(1, state, {})
assert checkpointer.wait() == 1
limit(50_000)
for step in (2, 3):
    checkpointer.save(step, state, {})
    assert checkpointer.wait() == 1
    tidy()
limit(resource.RLIM_INFINITY)
checkpointer.save(4, state, {})
assert checkpointer.wait() == 4  # there is space again: the count starts again
limit(50_000)
for step in (5, 6):
    checkpointer.save(step, state, {})
    checkpointer.wait()
try:
    checkpointer.close()
except CheckpointError as e:
    print("CLOSE", e)
checkpointer.save(7, state, {})
try:
    checkpointer.wait()
except CheckpointError as e:
    print("STOP", e)
tidy()
print("COMMITTED", checkpointer.committed())
"""


def test_a_full_disk_is_survived_twice_in_a_row_and_the_third_time_stops(tmp_path):
    done = _python(FULL, tmp_path)
    assert done.returncode == 0, done.stderr
    out = done.stdout.splitlines()
    assert out[0].startswith("CLOSE the last save failed; the newest checkpoint in ")
    assert "STOP could not save step 7 in" in out[1]
    assert "3 saves in a row failed, the newest checkpoint is that of step 4" in out[1]
    assert out[2] == "COMMITTED [1, 4]"
    warnings = [
        line for line in done.stderr.splitlines() if "training continues without it" in line
    ]
    assert [line.split(" in ")[0].split(":")[-1] for line in warnings] == [
        f"could not save step {step}" for step in (2, 3, 5, 6)
    ]
    assert len(done.stderr.splitlines()) <= 8, done.stderr  # no tracebacks of background threads


def test_a_deleted_directory_is_a_failed_save_and_not_a_crash(tmp_path, caplog):
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep=2)
    (tmp_path / "checkpoints").write_text("a file where the directory should be")
    with caplog.at_level(logging.WARNING):
        assert not checkpointer.save(1, {"w": jnp.ones(2)}, {})
    assert "could not save step 1" in caplog.text
    (tmp_path / "checkpoints").unlink()
    assert checkpointer.save(2, {"w": jnp.ones(2)}, {})
    assert checkpointer.wait() == 2
    checkpointer.close()
    assert read_meta(tmp_path / "checkpoints" / "2")["step"] == 2


# --- Several hosts -------------------------------------------------------------------------------

HOSTS = """
import pathlib, sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
directory, port, host = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(
    f"127.0.0.1:{port}", 2, host, initialization_timeout=60, shutdown_timeout_seconds=10,
    coordinator_bind_address=f"127.0.0.1:{port}" if host == 0 else None,
)
from vadapter.checkpoints.manager import Checkpointer, steps
from vadapter.checkpoints.digest import tree_digests
from vadapter.checkpoints.component_store import ComponentStore
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
shardings = {"w": NamedSharding(mesh, P("data")), "step": NamedSharding(mesh, P())}
make = lambda step: {"w": jnp.arange(64.0).reshape(16, 4) + step, "step": jnp.int32(step)}
state = lambda step: jax.jit(make, static_argnums=0, out_shardings=shardings)(step)
abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0)
)
checkpointer = Checkpointer(directory, keep=3)
for step in (5, 10):
    checkpointer.save(step, state(step), {})
checkpointer.close()
if host == 0:
    largest = max((directory / "10").rglob("d/*"), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-9])
    (directory / "20").mkdir()
jax.experimental.multihost_utils.sync_global_devices("corrupt")
checkpointer = Checkpointer(directory, keep=3)
restored, meta = checkpointer.restore(abstract)
assert tree_digests(restored) == tree_digests(state(5)) == meta["digests"]
assert checkpointer.save(10, state(10), {})
assert checkpointer.wait() == 10
checkpointer.close()
store = ComponentStore(directory / "components")
digest = store.put("llm", state(1))
assert store.put("llm", state(1)) == digest
assert tree_digests(store.get("llm", digest, abstract)) == tree_digests(state(1))
print("DONE", steps(directory), steps(directory / "quarantine"), digest, flush=True)
"""


@pytest.mark.slow
def test_two_hosts_fall_back_to_the_same_checkpoint_and_continue(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOSTS, str(tmp_path / "run"), port, str(host)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in (0, 1)
    ]
    try:
        printed = [host.communicate(timeout=120) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], printed
    done = {line for out, _ in printed for line in out.splitlines() if line.startswith("DONE")}
    assert len(done) == 1, printed
    assert done.pop().startswith("DONE [5, 10] [10, 20] ")
