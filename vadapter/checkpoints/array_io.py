"""One directory on disk that holds a tree of arrays, and proves it when it is read.

Two Orbax items: `state`, the leaves under dotted paths, and `meta`, a JSON object that seals itself
with a sha256 and holds the digest of every leaf. What cannot be read back as it was written is
damaged (`DamagedError`); what is whole but was written for another configuration does not fit
(`CheckpointError` with a table of the differences). Nothing is ever cast, padded or truncated.
"""

import concurrent.futures
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from vadapter.checkpoints.digest import is_key, leaf_paths, tree_digests
from vadapter.console import difference_table
from vadapter.distributed import hosts
from vadapter.errors import CheckpointError
from vadapter.io import buckets, storage

PyTree = Any
T = TypeVar("T")
Upgrade = Callable[[dict[str, Any]], dict[str, Any]]

SCHEMA = 1  # raise it when the layout of `meta` changes
TMP = ".orbax-checkpoint-tmp"  # in the name of a directory that is still being written
_RESERVED = ("schema", "digests", "sha256")
_READERS = 16  # arrays read at the same time


class DamagedError(CheckpointError):
    """A checkpoint that cannot be read back as what was written."""


def handlers() -> dict[str, Any]:
    """The Orbax handlers of the two items, with the file format that `load` reads."""
    return {
        "state": ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False),
        "meta": ocp.JsonCheckpointHandler(filename="metadata"),
    }


def items(tree: PyTree, meta: Mapping[str, Any]) -> ocp.args.Composite:
    """What Orbax shall write: the leaves of `tree`, and `meta` with their digests, sealed.

    Raises:
      ValueError: `meta` uses a reserved key, or a leaf is empty, which Orbax cannot save.
    """
    if taken := [key for key in _RESERVED if key in meta]:
        raise ValueError(f"reserved keys in the meta of a checkpoint: {taken}")
    leaves = leaf_paths(tree)
    if empty := [name for name, x in leaves.items() if x.size == 0]:
        raise ValueError(f"leaves without elements cannot be saved: {empty[:5]}")
    record = _as_json({**meta, "schema": SCHEMA, "digests": tree_digests(leaves)})
    record["sha256"] = _seal(record)
    arrays = {name: jax.random.key_data(x) if is_key(x) else x for name, x in leaves.items()}
    return ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), meta=ocp.args.JsonSave(record))


def read_meta(path: Path) -> dict[str, Any]:
    """The JSON object saved beside the state in `path`, with `schema` and `digests`.

    Raises:
      DamagedError: missing or not as written.
      CheckpointError: written by a newer version of this program.
    """
    try:
        meta = json.loads((path / "meta" / "metadata").read_text())
        intact = meta.pop("sha256") == _seal(meta)
    except Exception as e:
        raise _unreadable(f"{path}: no readable meta", e) from e
    if not intact:
        raise DamagedError(f"{path}: meta was changed after it was written (sha256 differs)")
    if meta["schema"] > SCHEMA:
        raise CheckpointError(
            f"{path} has schema {meta['schema']}, but this version of vadapter reads only up to "
            f"{SCHEMA}: update it"
        )
    return meta


def load(
    path: Path,
    abstract: PyTree,
    *,
    expect: Mapping[str, Any] | None = None,
    upgrade: Upgrade = dict,
    subset: bool = False,
) -> tuple[PyTree, dict[str, Any]]:
    """Reads one directory into the shardings of `abstract` and verifies every leaf on the devices.

    Args:
      path: directory of one checkpoint.
      abstract: tree of `jax.ShapeDtypeStruct` with shardings, or of arrays to take them from.
      expect: values that `meta` must hold, compared key by key, nested dicts included.
      upgrade: turns the meta that an earlier version wrote into today's, before it is compared.
      subset: leaves of the checkpoint that `abstract` lacks are left on disk.

    Returns:
      A tree like `abstract`, and the meta.

    Raises:
      CheckpointError: another tree, shape, dtype or expected value; the table says which.
      DamagedError: unreadable, or a digest differs.
    """
    targets = leaf_paths(abstract)
    if homeless := [name for name, x in targets.items() if getattr(x, "sharding", None) is None]:
        raise ValueError(f"leaves without a sharding to restore into: {homeless[:5]}")
    meta = upgrade(on_all_hosts(lambda: read_meta(path)))
    _check_fit(path, meta, targets, expect or {}, subset)
    leaves = on_all_hosts(lambda: _read_leaves(path, targets))
    found = tree_digests(leaves)
    if wrong := [name for name in targets if found[name] != meta["digests"][name]]:
        raise DamagedError(
            f"{path}: the digest of {len(wrong)} of {len(targets)} leaves differs, first {wrong[0]}"
        )
    tree = jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in targets])
    return tree, meta


def _read_leaves(path: Path, targets: Mapping[str, Any]) -> dict[str, jax.Array]:
    # Read by TensorStore, not by Orbax, whose restore casts to the dtype it is asked for and, when
    # a read fails, leaves the others running in a closed event loop (hundreds of lines of noise).
    def read(name: str) -> jax.Array:
        try:
            return _read_leaf(path, name, targets[name])
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # not the fault of the files
        except Exception as e:
            raise _unreadable(f"{path}: cannot read {name}", e) from e

    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        return dict(zip(targets, pool.map(read, targets), strict=True))


def _unreadable(text: str, e: Exception) -> CheckpointError:
    """Damaged; or in a bucket out of reach, which says nothing about what is there."""
    kind = CheckpointError if buckets.out_of_reach(e) else DamagedError
    return kind(f"{text} ({reason(e)})")


def _read_leaf(path: Path, name: str, target: Any) -> jax.Array:
    """One array, of which each host reads the shards of its own devices, every shard once."""
    stored = jax.eval_shape(jax.random.key_data, target) if is_key(target) else target
    spec = {
        "driver": "zarr",
        "kvstore": {
            "driver": "ocdbt",
            "base": storage.kvstore(path / "state"),
            "path": f"{name}/",
        },
        "fill_missing_data_reads": False,  # a missing chunk is an error, not zeros
    }
    store = ts.open(spec, open=True, read=True).result()
    if store.shape != stored.shape or store.dtype.numpy_dtype != stored.dtype:
        raise ValueError(f"holds {store.dtype.name}{list(store.shape)}")
    parts: dict[str, Any] = {}

    def shard(index: Any) -> np.ndarray:
        key = str(index)
        if key not in parts:
            parts[key] = store[index].read().result()
        return parts[key]

    array = jax.make_array_from_callback(stored.shape, target.sharding, shard)
    if is_key(target):
        kind: list[Any] = []
        jax.eval_shape(lambda key: kind.append(jax.random.key_impl(key)), target)
        return jax.random.wrap_key_data(array, impl=kind[0])
    return array


def _check_fit(
    path: Path,
    meta: Mapping[str, Any],
    targets: Mapping[str, Any],
    expect: Mapping[str, Any],
    subset: bool,
) -> None:
    """Raises CheckpointError with a table of all differences between the checkpoint and the run."""
    expect = _as_json(dict(expect))
    theirs = _flat({key: meta[key] for key in expect if key in meta})
    ours = _flat(expect)
    for name, (shape, dtype, _) in meta["digests"].items():
        if name in targets or not subset:
            theirs[name] = f"{dtype}{shape}"
    for name, x in targets.items():
        ours[name] = f"{x.dtype}{list(x.shape)}"
    rows = [
        (name, theirs.get(name, "—"), ours.get(name, "—"))
        for name in {**ours, **theirs}
        if name not in ours or name not in theirs or theirs[name] != ours[name]
    ]
    if not rows:
        return
    raise CheckpointError(
        f"{path} does not fit this run, {len(rows)} differences:\n"
        + difference_table(rows, ("leaf or field", "checkpoint", "this run"))
        + "\nUse the configuration it was made with, or another run directory."
    )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or (prefix and not tree):
        return {prefix: tree}
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return out


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _seal(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def reason(e: BaseException) -> str:
    return f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"


def on_all_hosts(read: Callable[[], T]) -> T:
    """Runs `read` on every host; if it fails on one, it fails on all, so that none waits."""
    result, error = None, None
    try:
        result = read()
    except Exception as e:
        error = e
    told = hosts.exchange(error and reason(error), "reading", patience=hosts.WORK)
    for i, failure in enumerate(told):
        if error is None and failure is not None:
            error = DamagedError(f"unreadable on host {i}: {failure}")
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def hush_orbax() -> None:
    """Orbax logs hundreds of lines about errors that it also raises; the raised ones suffice.

    Where one array of a save fails, the others report to an event loop that is closed by then, or
    to nobody.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_worth_telling)
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook(sys.unraisablehook)


class _Hook:
    """What Python does with errors that nobody can catch, but for those of closed event loops."""

    def __init__(self, honest: Callable[[Any], Any]):
        self._honest = honest

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._honest(unraisable)


def _worth_telling(record: logging.LogRecord) -> bool:
    """Not what Orbax logs, nor what asyncio logs about a task of it whose error nobody fetched.

    Some of these do not name Orbax, but nobody else has such tasks.
    """
    if record.levelno >= logging.CRITICAL:
        return True
    if record.name == "asyncio":
        return "never retrieved" not in record.getMessage()
    return "orbax" not in record.pathname
