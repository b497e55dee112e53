"""The frozen parts of runs, stored once under the digest of their content.

A checkpoint of a run holds what trains; the frozen encoder and LLM are hundreds of times larger and
never change. They lie in `<root>/<name>-<digest>/`, and each checkpoint names them by digest.
"""

import contextlib
import re
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from vadapter.checkpoints import array_io
from vadapter.checkpoints.array_io import DamagedError
from vadapter.checkpoints.digest import combined, tree_digests
from vadapter.distributed import hosts
from vadapter.errors import CheckpointError
from vadapter.io import storage
from vadapter.io.lock import lock

PyTree = Any


class ComponentStore:
    """A directory of components, each complete or invisible, and verified whenever it is read.

    Several runs may share one store. On several hosts all make the same calls, with the root on a
    shared file system.

    Args:
      root: created at the first `put`.
    """

    def __init__(self, root: Path):
        self._root = storage.absolute(root)

    def path(self, name: str, digest: str) -> Path:
        """The directory of a component, which may not exist.

        Raises:
          ValueError: the name is not a plain file name, or the digest is not one of `put`.
        """
        if not re.fullmatch(r"\w[\w.-]*", name) or not re.fullmatch(r"[0-9a-f]{12,64}", digest):
            raise ValueError(f"not a component: name {name!r}, digest {digest!r}")
        return self._root / f"{name}-{digest[:12]}"

    def put(self, name: str, params: PyTree) -> str:
        """Stores `params` unless they are there already; what was interrupted is written again.

        Args:
          name: of the component, such as `encoder`.
          params: tree of `jax.Array`, all on the same devices.

        Returns:
          The digest of the content, sha256 in hex, which `get` takes.

        Raises:
          CheckpointError: the disk is full or cannot be written.
        """
        array_io.hush_orbax()
        digest = combined(tree_digests(params))
        path = self.path(name, digest)
        first = hosts.first()
        try:
            if first:
                self._root.mkdir(parents=True, exist_ok=True)
            with lock(self._root / ".put", wait=True) if first else contextlib.nullcontext():
                if self._must_write(path, digest):
                    self._write(path, params, {"component": name})
        except CheckpointError:
            raise
        except Exception as e:
            raise CheckpointError(f"could not store {name} in {path}: {array_io.reason(e)}") from e
        return digest

    def get(self, name: str, digest: str, abstract: PyTree, *, subset: bool = False) -> PyTree:
        """Reads a component into the shardings of `abstract` and verifies every leaf.

        Args:
          name: as in `put`.
          digest: as returned by `put`.
          abstract: tree of `jax.ShapeDtypeStruct` with shardings.
          subset: leaves that `abstract` lacks are left on disk.

        Raises:
          CheckpointError: not in the store, another tree, shape or dtype, or damaged; the message
            names the directory and the leaf.
        """
        path = self._existing(name, digest)
        try:
            params, meta = array_io.load(path, abstract, expect={"component": name}, subset=subset)
            _check_content(path, meta, digest)
        except DamagedError as e:
            raise CheckpointError(f"{e}. Delete {path} and load the weights again.") from e
        return params

    def describe(self, name: str, digest: str) -> dict[str, tuple[tuple[int, ...], str]]:
        """`{path: (shape, dtype)}` of a stored component, without reading its arrays.

        Raises:
          CheckpointError: not in the store, or damaged.
        """
        path = self._existing(name, digest)
        meta = array_io.read_meta(path)
        _check_content(path, meta, digest)
        return {leaf: (tuple(shape), dtype) for leaf, (shape, dtype, _) in meta["digests"].items()}

    def _existing(self, name: str, digest: str) -> Path:
        path = self.path(name, digest)
        if not storage.committed(path):
            raise CheckpointError(f"{path} is missing: load the weights of {name} again")
        return path

    def _must_write(self, path: Path, digest: str) -> bool:
        """True if the component is missing or broken; the first host looks, for all."""
        missing = True
        if hosts.first() and path.exists():
            try:
                _check_content(path, array_io.read_meta(path), digest)
                missing = not (storage.is_folder(path / "state") and storage.committed(path))
            except DamagedError:
                pass
            if missing:
                storage.remove_tree(path)
        return hosts.exchange(missing, f"storing {path.name}", patience=hosts.WORK)[0]

    def _write(self, path: Path, params: PyTree, meta: dict[str, Any]) -> None:
        if hosts.first():
            storage.remove_tree(path.with_name(path.name + array_io.TMP))  # of an interrupted put
        handler = ocp.CompositeCheckpointHandler(**array_io.handlers())
        with ocp.Checkpointer(handler) as writer:
            writer.save(path, args=array_io.items(params, meta))


def _check_content(path: Path, meta: dict[str, Any], digest: str) -> None:
    if not combined(meta["digests"]).startswith(digest):
        raise DamagedError(f"{path}: holds other content than its name says")
