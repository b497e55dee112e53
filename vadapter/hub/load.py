"""Loading of an exported stage: every file and public checkpoint is verified by its digest."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from vadapter.checkpoints.digest import combined, tree_digests
from vadapter.config import differences, nearest
from vadapter.console import difference_table
from vadapter.data.tokenizers import Tokenizer
from vadapter.data.tokenizers.pretrained import load_tokenizer
from vadapter.distributed.mesh import MeshConfig, make_mesh
from vadapter.errors import CheckpointError, ConfigError
from vadapter.evaluate.describe import image_settings
from vadapter.hub import record
from vadapter.hub.record import Exported, Frozen
from vadapter.io import storage
from vadapter.io.json_files import is_export
from vadapter.models.paths import flatten, nest
from vadapter.recipe.schema import DTYPES
from vadapter.stages import initialization
from vadapter.stages.restore import open_run
from vadapter.stages.stage import Stage
from vadapter.weights.reference import PREFIX, Reference
from vadapter.weights.safetensors import TensorFiles


def open_either(folder: Path, stage: str | None, overrides: Sequence[str]) -> Stage:
    """Load a stage of a run, see `open_run`, or the stage of an export.

    Raises:
      ConfigError: for an export, a stage other than its own, or an override of anything but the
        location of weights.
    """
    if not is_export(folder):
        return open_run(folder, stage, overrides=overrides)
    exported_stage = record.read(folder).stage
    if stage not in (None, exported_stage):
        raise ConfigError(f"--stage={stage}: the export {folder} has only stage {exported_stage}")
    weights = {}
    for item in overrides:
        match = re.fullmatch(r"components\.(\w[\w-]*)\.weights=(.+)", item)
        if not match:
            raise ConfigError(
                f"--config.{item}: only components.NAME.weights can be changed in an export"
            )
        weights[match[1]] = match[2]
    return open_export(folder, weights)


def open_export(
    folder: Path, weights: Mapping[str, str] | None = None, mesh: MeshConfig | None = None
) -> Stage:
    """Load the stage of an export, equal to what `open_run` returns for its run.

    See `VAdapter.from_pretrained`; the folder becomes the stage's `workdir`.
    """
    folder = storage.local(folder, "folder").absolute()
    exported = _relocate(record.read(folder), weights or {})
    tokenizer = _load_tokenizer(folder, exported)
    try:
        recipe = exported.recipe()
        devices = make_mesh(mesh or MeshConfig())
        loaded = Stage(recipe, exported.stage, devices, workdir=folder, tokenizer=tokenizer)
        abstract = loaded.abstract
    except ConfigError as error:
        raise CheckpointError(f"{folder / record.CONFIG} cannot be used: {error}") from None
    if exported.trained.keys() | exported.frozen.keys() != abstract.keys():
        raise CheckpointError(
            f"{folder / record.CONFIG} is corrupt: its trained and frozen components are not "
            f"{', '.join(abstract)}; download it again"
        )
    params = _load_file(folder / record.WEIGHTS, abstract, exported.trained)
    for name, part in exported.frozen.items():
        if part.weights:
            start = _public_weights(name, recipe.components[name], part.digest)
            params[name] = initialization.load(start, abstract[name], None, DTYPES[recipe.dtype])
        else:
            params |= _load_file(folder / record.frozen_file(name), abstract, {name: part.digest})
    loaded.params, loaded.step = params, exported.step
    loaded.digests = {name: part.digest for name, part in exported.frozen.items()}
    if image_settings(loaded) != (exported.view, exported.clip_frames):
        raise CheckpointError(
            f"{folder / record.CONFIG}: the recorded image transform does not match the encoder; "
            f"download it again, or install vadapter {exported.vadapter}, which wrote it"
        )
    return loaded


def _relocate(exported: Exported, weights: Mapping[str, str]) -> Exported:
    """Return the record with other locations of public weights."""
    public, frozen = exported.public(), dict(exported.frozen)
    for name, location in weights.items():
        if name not in public:
            raise ConfigError(
                f"weights={{{name!r}: …}}: not a frozen component with public weights"
                + (nearest(name, public) if public else "; this export has none")
            )
        frozen[name] = Frozen(public[name].digest, os.fspath(location))
    return dataclasses.replace(exported, frozen=frozen)


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the export is incomplete; download it again")


def _load_tokenizer(folder: Path, exported: Exported) -> Tokenizer:
    path = folder / record.TOKENIZER
    _require_file(path)
    tokenizer = load_tokenizer(path)
    if tokenizer.digest != exported.tokenizer:
        raise CheckpointError(f"{path} is not the tokenizer of this export; download it again")
    return tokenizer


def _load_file(
    path: Path, abstract: Mapping[str, Any], digests: Mapping[str, str]
) -> dict[str, Any]:
    """Return the components of a file that must contain exactly these, verified by digest."""
    _require_file(path)
    file = TensorFiles.open(path)
    expected: Any = flatten({n: dict(abstract[n]) for n in digests})
    shapes = {name: list(leaf.shape) for name, leaf in expected.items()}
    stored = {name: list(tensor.shape) for name, tensor in file.tensors.items()}
    if differing := differences(shapes, stored):
        raise CheckpointError(
            f"{path} does not match {record.CONFIG} in the same folder; download both again:\n"
            + difference_table(differing, ("tensor", "expected", "in the file"))
        )
    leaves = {name: jax.device_put(file.read(name), x.sharding) for name, x in expected.items()}
    # A component without parameters is not in the file.
    params = {name: {} for name in digests} | nest(leaves)
    for name, digest in digests.items():
        if combined(tree_digests(params[name])) != digest:
            raise CheckpointError(
                f"{path} is corrupt: {name} does not match its digest; download it again"
            )
    return params


def _public_weights(name: str, spec: Mapping[str, Any], digest: str) -> initialization.Start:
    """Return a frozen component's public weights, verified to be those of the export."""
    location = spec["weights"]
    hint = (
        f"To use a copy of the weights of {name}, pass from_pretrained(…, weights={{{name!r}: "
        f"FOLDER}}), or --config.components.{name}.weights=FOLDER on the command line."
    )
    try:
        reference = Reference.of(name, spec)
        actual = PREFIX + reference.open().digest()
    except CheckpointError as error:
        raise CheckpointError(f"{error}\n{hint}") from error
    if actual != digest:
        raise CheckpointError(
            f"{name}: {location} has changed since this adapter was trained ({actual[:19]}…, "
            f"expected {digest[:19]}…).\n{hint}"
        )
    return initialization.Start(name, f"weights {location}", digest, reference)
