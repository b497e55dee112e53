"""Components that finished stages trained, stored once under the digest of their content.

A checkpoint holds what a stage trains. Its frozen encoder and LLM are hundreds of times larger and
never change: they are stored in `<root>/<name>-<digest>/`, and checkpoints refer to them by digest.
"""

import contextlib
import re
from pathlib import Path
from typing import Any

from vadapter.checkpoints import array_io
from vadapter.checkpoints.array_io import CorruptError
from vadapter.checkpoints.digest import combined, tree_digests
from vadapter.distributed import hosts
from vadapter.errors import CheckpointError, one_line
from vadapter.io import storage
from vadapter.io.lock import lock

PyTree = Any


class ComponentStore:
    """A directory of components, each complete or absent, and verified leaf by leaf when read.

    Several runs may share one store. On several hosts all make the same calls, with the root on a
    shared file system.
    """

    def __init__(self, root: Path):
        self._root = storage.absolute(root)

    def path(self, name: str, digest: str) -> Path:
        """Return the directory of a component, which need not exist."""
        if not re.fullmatch(r"\w[\w.-]*", name) or not re.fullmatch(r"[0-9a-f]{12,64}", digest):
            raise ValueError(f"not a component: name {name!r}, digest {digest!r}")
        return self._root / f"{name}-{digest[:12]}"

    def put(self, name: str, params: PyTree) -> str:
        """Store a component, unless it is stored already; an interrupted `put` is repeated.

        The parameters are a tree of `jax.Array`, all on the same devices. Returns the SHA-256 of
        the content, in hex, for `get`.

        Raises:
          CheckpointError: the disk is full or cannot be written.
        """
        from vadapter.checkpoints import orbax_io

        orbax_io.quiet_orbax()
        digest = combined(tree_digests(params))
        path = self.path(name, digest)
        try:
            first = hosts.first()
            with lock(self._root / ".put", wait=True) if first else contextlib.nullcontext():
                if self._must_write(path, digest):
                    if first:  # remove what an interrupted `put` left
                        storage.remove_tree(path.with_name(path.name + array_io.TMP))
                    orbax_io.write(path, params, {"component": name})
        except CheckpointError:
            raise
        except Exception as e:
            raise CheckpointError(f"could not store {name} in {path}: {one_line(e)}") from e
        return digest

    def get(self, name: str, digest: str, abstract: PyTree, *, subset: bool = False) -> PyTree:
        """Read a component into the shardings of `abstract` and verify every leaf.

        With `subset`, stored leaves that `abstract` lacks are ignored.

        Raises:
          CheckpointError: the component is missing or corrupt, or its tree, shapes or dtypes
            differ; the message names the directory and the leaf.
        """
        path = self._existing(name, digest)
        try:
            params, meta = array_io.load(path, abstract, expect={"component": name}, subset=subset)
            _check_content(path, meta, digest)
        except CorruptError as e:
            raise CheckpointError(
                f"{e}. Delete {path} and load the weights again, or restore it from a backup."
            ) from e
        return params

    def describe(self, name: str, digest: str) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return `{leaf path: (shape, dtype)}` of a component without reading its arrays.

        CheckpointError if the component is missing or its record is corrupt.
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
        """Return whether a component is missing or corrupt, as seen by the first host."""
        missing = True
        if hosts.first() and path.exists():
            with contextlib.suppress(CorruptError):
                _check_content(path, array_io.read_meta(path), digest)
                missing = not (storage.is_folder(path / "state") and storage.committed(path))
            if missing:
                storage.remove_tree(path)
        return hosts.exchange(missing, f"storing {path.name}", patience=hosts.WORK)[0]


def _check_content(path: Path, meta: dict[str, Any], digest: str) -> None:
    if not combined(meta["digests"]).startswith(digest):
        raise CorruptError(f"{path}: its content does not match the digest in its name")
