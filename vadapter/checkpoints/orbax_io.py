"""Saving with Orbax, whose import costs more than reading a checkpoint, which does without it."""

import functools
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as ocm

from vadapter.checkpoints.array_io import PyTree, sealed
from vadapter.checkpoints.digest import is_key, leaf_paths


def handlers() -> dict[str, Any]:
    """Return the Orbax handlers of the two items, with the file format that `array_io` reads."""
    return {
        "state": ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False),
        "meta": ocp.JsonCheckpointHandler(filename="metadata"),
    }


def items(tree: PyTree, meta: Mapping[str, Any]) -> ocp.args.Composite:
    """Return what Orbax saves: a tree of arrays, and JSON values with digests and their SHA-256.

    Raises:
      ValueError: `meta` uses a reserved key, or a leaf has no elements, which Orbax cannot save.
    """
    leaves = leaf_paths(tree)
    if empty := [name for name, x in leaves.items() if x.size == 0]:
        raise ValueError(f"leaves without elements cannot be saved: {empty[:5]}")
    record = sealed(meta, leaves)
    arrays = {name: jax.random.key_data(x) if is_key(x) else x for name, x in leaves.items()}
    arrays = arrays or {"none": np.zeros(1)}  # a component without parameters; Orbax needs an array
    return ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), meta=ocp.args.JsonSave(record))


def make_manager(directory: Path, keep: int) -> ocp.CheckpointManager:
    """Return the manager of a directory of checkpoints, of which the newest `keep` are kept."""
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocm.LatestN(keep),
        lightweight_initialize=True,  # do not read what may be corrupt
        # Otherwise a directory that cannot be created is a wait of 300 s instead of an error.
        async_options=ocp.AsyncOptions(timeout_secs=600, create_directories_asynchronously=False),
    )
    return ocp.CheckpointManager(directory, options=options, item_handlers=handlers())


def write(path: Path, tree: PyTree, meta: Mapping[str, Any]) -> None:
    """Write a tree to a directory, see `items`."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers())) as writer:
        writer.save(path, args=items(tree, meta))


@functools.cache
def quiet_orbax() -> None:
    """Drop what Orbax logs about errors that it also raises, hundreds of lines for one failed save.

    Where one array fails, the others report to an event loop that is closed by then, or to nobody.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_worth_logging)
    hook = sys.unraisablehook

    def without_closed_loops(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = without_closed_loops


def _worth_logging(record: logging.LogRecord) -> bool:
    """Return False for records of Orbax, and of asyncio about errors that no task awaits.

    The latter do not always name Orbax, but nothing else here has such tasks.
    """
    if record.name == "asyncio":
        noise = "never retrieved" in record.getMessage()
    else:
        noise = "orbax" in record.pathname
    return record.levelno >= logging.CRITICAL or not noise
