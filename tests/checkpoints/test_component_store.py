import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from support.paths import ROOT

from vadapter.checkpoints.component_store import ComponentStore
from vadapter.checkpoints.digest import combined, tree_digests
from vadapter.errors import CheckpointError


def _params(seed=0):
    key = jax.random.key(seed)
    return {
        "block_0": {"kernel": jax.random.normal(key, (16, 4)), "bias": jnp.ones((4,))},
        "embed": jax.random.normal(key, (8, 4), jnp.bfloat16),
    }


def _abstract(params, n_devices=1):
    mesh = Mesh(np.array(jax.devices()[:n_devices]), ("data",))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, P("data") if x.ndim == 2 else P())
        ),
        params,
    )


def _tree(root):
    return {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


def test_a_stored_component_is_restored_on_any_mesh(tmp_path):
    store = ComponentStore(tmp_path / "components")
    digest = store.put("encoder", _params())
    assert digest == combined(tree_digests(_params()))
    assert store.path("encoder", digest).name == f"encoder-{digest[:12]}"
    for n in (1, 2, 8):
        target = _abstract(_params(), n)
        params = ComponentStore(tmp_path / "components").get("encoder", digest, target)
        assert tree_digests(params) == tree_digests(_params())
        assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(
            lambda x: x.sharding, target
        )


def test_a_component_without_parameters_is_stored_and_restored(tmp_path):
    store = ComponentStore(tmp_path / "components")
    digest = store.put("words", {})
    assert store.put("words", {}) == digest
    assert store.describe("words", digest) == {}
    assert store.get("words", digest, {}) == {}
    with pytest.raises(CheckpointError, match="does not fit"):
        store.get("words", digest, _abstract(_params()))


def test_storing_a_component_twice_writes_nothing(tmp_path):
    store = ComponentStore(tmp_path)
    digest = store.put("llm", _params())
    before = _tree(store.path("llm", digest))
    assert store.put("llm", _params()) == digest
    assert _tree(store.path("llm", digest)) == before
    other = store.put("llm", _params(1))
    assert other != digest
    assert len(list(tmp_path.glob("llm-*"))) == 2
    assert store.put("encoder", _params()) == digest  # its own directory, for its own name
    assert store.path("encoder", digest).is_dir()


def test_a_component_describes_itself_without_reading_arrays(tmp_path):
    store = ComponentStore(tmp_path)
    digest = store.put("llm", _params())
    shutil.rmtree(store.path("llm", digest) / "state")
    assert store.describe("llm", digest) == {
        "block_0.bias": ((4,), "float32"),
        "block_0.kernel": ((16, 4), "float32"),
        "embed": ((8, 4), "bfloat16"),
    }


def test_a_missing_component_or_another_shape_is_an_error_with_a_fix(tmp_path):
    store = ComponentStore(tmp_path)
    with pytest.raises(CheckpointError, match=r"llm-0{12} is missing: load the weights of llm"):
        store.get("llm", "0" * 64, _abstract(_params()))
    digest = store.put("llm", _params())
    target = _abstract(_params() | {"head": jnp.ones((4, 8))})
    with pytest.raises(CheckpointError, match=r"head +\| — +\| float32\[4, 8\]"):
        store.get("llm", digest, target)
    for name, wrong in (("../llm", digest), ("llm", "short"), ("llm", "../../../../etc")):
        with pytest.raises(ValueError, match="not a component"):
            store.path(name, wrong)


def test_no_corrupt_file_ever_gives_wrong_weights(tmp_path):
    whole = ComponentStore(tmp_path / "whole")
    digest = whole.put("llm", _params())
    path = whole.path("llm", digest)
    refused = []
    for i, name in enumerate(p.relative_to(path) for p in path.rglob("*") if p.is_file()):
        for harm in ("flip", "halve", "delete"):
            root = Path(shutil.copytree(path.parent, tmp_path / f"{i}{harm}"))
            file = root / path.name / name
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data[: len(data) // 2] if harm == "halve" else data)
            if harm == "delete":
                file.unlink()
            try:
                params = ComponentStore(root).get("llm", digest, _abstract(_params()))
            except CheckpointError as e:
                refused.append((str(name), f"Delete {root / path.name} and load" in str(e)))
            else:
                assert tree_digests(params) == tree_digests(_params())
    assert all(remedy for _, remedy in refused)
    names = [name for name, _ in refused]
    assert names.count("meta/metadata") == names.count("state/manifest.ocdbt") == 3
    assert any(name.startswith("state/d/") for name in names)


def test_other_content_under_the_right_name_is_refused(tmp_path):
    store = ComponentStore(tmp_path)
    digest, other = store.put("llm", _params()), store.put("llm", _params(1))
    path = store.path("llm", digest)
    shutil.rmtree(path / "state")
    shutil.copytree(store.path("llm", other) / "state", path / "state")
    with pytest.raises(CheckpointError, match=r"digest of 2 of 3 leaves differs, first block_0\.k"):
        store.get("llm", digest, _abstract(_params()))
    shutil.rmtree(path)
    shutil.copytree(store.path("llm", other), path)
    with pytest.raises(CheckpointError, match="does not match the digest in its name"):
        store.get("llm", digest, _abstract(_params()))
    with pytest.raises(CheckpointError, match="does not match the digest"):
        store.describe("llm", digest)


def test_an_incomplete_component_is_written_again(tmp_path):
    store = ComponentStore(tmp_path)
    digest = store.put("llm", _params())
    for part in ("meta", "state"):
        shutil.rmtree(store.path("llm", digest) / part)
        assert store.put("llm", _params()) == digest
        params = store.get("llm", digest, _abstract(_params()))
        assert tree_digests(params) == tree_digests(_params())


KILLED = """
import os, pathlib, signal, sys
import jax.numpy as jnp
import orbax.checkpoint as ocp
from vadapter.checkpoints.component_store import ComponentStore
finalize = ocp.CompositeCheckpointHandler.finalize
def killed(self, directory):
    finalize(self, directory)
    os.kill(os.getpid(), signal.SIGKILL)  # all is written, only the name is missing
ocp.CompositeCheckpointHandler.finalize = killed
ComponentStore(pathlib.Path(sys.argv[1])).put("llm", {"w": jnp.arange(6.0)})
"""


def test_a_killed_write_is_never_visible(tmp_path):
    root = ROOT
    env = {**os.environ, "PYTHONPATH": str(root), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=env, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    store, params = ComponentStore(tmp_path), {"w": jnp.arange(6.0)}
    digest = combined(tree_digests(params))
    assert not store.path("llm", digest).exists()
    assert len(list(tmp_path.glob("llm-*"))) == 1
    assert store.put("llm", params) == digest
    assert [p.name for p in tmp_path.glob("llm-*")] == [f"llm-{digest[:12]}"]


def test_a_store_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"could not store llm in .*/file/llm-"):
        ComponentStore(tmp_path / "file").put("llm", _params())
