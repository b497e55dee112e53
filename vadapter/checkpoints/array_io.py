"""A tree of arrays in a directory, verified leaf by leaf when it is read.

The directory holds two Orbax items: `state`, the leaves under dotted paths, and `meta`, a JSON
object with the digest of every leaf and its own SHA-256. Orbax writes to a temporary name and
renames it at the end, so that a directory is complete or absent.

Two errors are told apart. A directory is corrupt (`CorruptError`) if what is read differs from what
was written: another checkpoint may be tried. It does not fit (`CheckpointError`, with a table of
the differences) if it was written for another configuration: no other checkpoint would fit either.
Nothing is ever cast, padded or truncated.
"""

import concurrent.futures
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import tensorstore as ts

from vadapter.checkpoints.digest import is_key, leaf_paths, tree_digests
from vadapter.config import differences
from vadapter.console import difference_table
from vadapter.distributed import hosts
from vadapter.distributed.mesh import read_sharded
from vadapter.errors import CheckpointError, one_line
from vadapter.io import buckets, storage

PyTree = Any
T = TypeVar("T")
Upgrade = Callable[[dict[str, Any]], dict[str, Any]]

SCHEMA = 1  # raise it when the layout of `meta` changes
TMP = ".orbax-checkpoint-tmp"  # in the name of a directory that is still being written
_RESERVED = ("schema", "digests", "sha256")
_READERS = 16  # arrays read at the same time


class CorruptError(CheckpointError):
    """A checkpoint whose content differs from what was written."""


def sealed(meta: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON values with the digests of leaves and with their own SHA-256, for `read_meta`.

    ValueError if `meta` uses a reserved key.
    """
    if reserved := [key for key in _RESERVED if key in meta]:
        raise ValueError(f"reserved keys in the meta of a checkpoint: {reserved}")
    record = _as_json({**meta, "schema": SCHEMA, "digests": tree_digests(leaves)})
    return record | {"sha256": _sha256(record)}


def read_meta(path: Path) -> dict[str, Any]:
    """Return the JSON object saved with the state in `path`, with `schema` and `digests`.

    Raises:
      CorruptError: it is missing or was changed.
      CheckpointError: written by a newer version of this program.
    """
    try:
        meta = json.loads((path / "meta" / "metadata").read_text())
        intact = meta.pop("sha256") == _sha256(meta)
    except Exception as e:
        raise _unreadable(f"{path}: no readable meta", e) from e
    if not intact:
        raise CorruptError(f"{path}: meta was changed after it was written (sha256 differs)")
    if meta["schema"] > SCHEMA:
        raise CheckpointError(
            f"{path} has schema {meta['schema']}, but this version of vadapter reads only up to "
            f"{SCHEMA}: update it"
        )
    return meta


def load(
    path: Path, abstract: PyTree, *, expect: Mapping[str, Any] | None = None,
    upgrade: Upgrade = dict, subset: bool = False,
) -> tuple[PyTree, dict[str, Any]]:  # fmt: skip
    """Return the tree, in the shardings of `abstract`, and the meta; verify every leaf.

    Args:
      abstract: tree of `jax.ShapeDtypeStruct` with shardings, or of arrays to take them from.
      expect: values that `meta` must hold, compared key by key, nested dicts included.
      upgrade: converts meta that an earlier version wrote, before it is compared.
      subset: ignore leaves of the checkpoint that `abstract` lacks.

    Raises:
      CheckpointError: tree, shapes, dtypes or expected values differ; with a table.
      CorruptError: a file cannot be read, or a digest differs.
      ValueError: a leaf of `abstract` has no sharding.
    """
    targets = leaf_paths(abstract)
    if unsharded := [name for name, x in targets.items() if getattr(x, "sharding", None) is None]:
        raise ValueError(f"leaves without a sharding to restore into: {unsharded[:5]}")
    meta = upgrade(on_all_hosts(lambda: read_meta(path)))
    _check_fit(path, meta, targets, expect or {}, subset)
    leaves = on_all_hosts(lambda: _read_leaves(path, targets))
    digests = tree_digests(leaves)
    if wrong := [name for name in targets if digests[name] != meta["digests"][name]]:
        raise CorruptError(
            f"{path}: the digest of {len(wrong)} of {len(targets)} leaves differs, first {wrong[0]}"
        )
    tree = jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in targets])
    return tree, meta


def _read_leaves(path: Path, targets: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Read arrays in parallel, by TensorStore.

    Not by Orbax: its restore casts to the requested dtype and, when one read fails, leaves the
    others running in a closed event loop, which logs hundreds of lines.
    """

    def read(name: str) -> jax.Array:
        try:
            return _read_leaf(path, name, targets[name])
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # not the fault of the files: another checkpoint would fail as well
        except Exception as e:
            raise _unreadable(f"{path}: cannot read {name}", e) from e

    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        return dict(zip(targets, pool.map(read, targets), strict=True))


def _unreadable(text: str, e: Exception) -> CheckpointError:
    """Return a CorruptError; a CheckpointError if a bucket that cannot be reached is the reason."""
    kind = CheckpointError if buckets.out_of_reach(e) else CorruptError
    return kind(f"{text} ({one_line(e)})")


def _read_leaf(path: Path, name: str, target: Any) -> jax.Array:
    """Return one array, see `read_sharded`."""
    stored = jax.eval_shape(jax.random.key_data, target) if is_key(target) else target
    files = {"driver": "ocdbt", "base": storage.kvstore(path / "state"), "path": f"{name}/"}
    # Without filling, a missing chunk is an error, not zeros.
    spec = {"driver": "zarr", "kvstore": files, "fill_missing_data_reads": False}
    store = ts.open(spec, open=True, read=True).result()
    if store.shape != stored.shape or store.dtype.numpy_dtype != stored.dtype:
        raise ValueError(f"holds {store.dtype.name}{list(store.shape)}")
    read = lambda index: store[index].read().result()  # noqa: E731
    array = read_sharded(stored.shape, target.sharding, read)
    if is_key(target):
        impl: list[Any] = []
        jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), target)
        return jax.random.wrap_key_data(array, impl=impl[0])
    return array


def _check_fit(
    path: Path, meta: Mapping[str, Any], targets: Mapping[str, Any], expect: Mapping[str, Any],
    subset: bool,
) -> None:  # fmt: skip
    """Raise CheckpointError with a table of all differences between the checkpoint and the run."""
    needed = {name: f"{x.dtype}{list(x.shape)}" for name, x in targets.items()}
    stored = {
        name: f"{dtype}{shape}"
        for name, (shape, dtype, _) in meta["digests"].items()
        if name in targets or not subset
    }
    rows = differences({key: meta[key] for key in expect if key in meta}, _as_json(dict(expect)))
    if rows := rows + differences(stored, needed):
        raise CheckpointError(
            f"{path} does not fit this run, {len(rows)} differences:\n"
            + difference_table(rows, ("leaf or field", "checkpoint", "this run"))
            + "\nUse the configuration that it was written with, or another run directory."
        )


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _sha256(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def on_all_hosts(read: Callable[[], T]) -> T:
    """Run `read` on every host. If it fails on one, it fails on all, so that none waits forever."""
    result, error = None, None
    try:
        result = read()
    except Exception as e:
        error = e
    failures = hosts.exchange(error and one_line(error), "reading", patience=hosts.WORK)
    for host, failure in enumerate(failures):
        if error is None and failure is not None:
            error = CorruptError(f"unreadable on host {host}: {failure}")
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
