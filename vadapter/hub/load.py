"""An exported stage, opened again as if from its run: every part found and known by its digest."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util

from vadapter.checkpoints.digest import combined, leaf_paths, tree_digests
from vadapter.config import nearest
from vadapter.console import truncate
from vadapter.data.tokenizers import Tokenizer
from vadapter.data.tokenizers.pretrained import load_tokenizer
from vadapter.distributed.mesh import MeshConfig, make_mesh
from vadapter.errors import CheckpointError, ConfigError
from vadapter.evaluate.describe import image_settings
from vadapter.hub import record as form
from vadapter.hub.record import Exported
from vadapter.io import storage
from vadapter.models.coca import CoCa
from vadapter.recipe.schema import DTYPES, make_model
from vadapter.stages import initialization
from vadapter.stages.abstract_state import abstract_params, view_of
from vadapter.stages.restore import Loaded, open_run
from vadapter.weights.reference import PREFIX, Reference
from vadapter.weights.safetensors import TensorFiles

_SHOWN = 8  # tensors in a message


def open_either(folder: Path, stage: str | None, overrides: Sequence[str]) -> Loaded:
    """A stage of a run, see `open_run`, or the one of an export.

    Raises:
      ConfigError: of an export, another stage than its own, or overrides but places of weights.
    """
    if not form.is_export(folder):
        return open_run(folder, stage, overrides=overrides)
    own = form.read(folder).stage
    if stage not in (None, own):
        raise ConfigError(f"--stage={stage}: {folder} is an export of stage {own} alone")
    weights = {}
    for item in overrides:
        found = re.fullmatch(r"components\.(\w[\w-]*)\.weights=(.+)", item)
        if not found:
            raise ConfigError(f"--config.{item}: of an export only components.NAME.weights")
        weights[found[1]] = found[2]
    return open_export(folder, weights)


def open_export(
    folder: Path, weights: Mapping[str, str] | None = None, mesh: MeshConfig | None = None
) -> Loaded:
    """A stage from its export, as `open_run` gives it from its run; `workdir` is the folder.

    Args:
      folder: what `export` wrote.
      weights: where public frozen parts lie, if not where the record says.
      mesh: by default all devices along `data`.

    Raises:
      CheckpointError, ConfigError: as `VAdapter.from_pretrained`.
    """
    folder = storage.local(folder, "folder").absolute()
    exported = form.read(folder)
    exported = _moved(exported, weights or {})
    tokenizer = _tokenizer(folder, exported)
    try:
        recipe = exported.recipe()
        config = recipe.stages[exported.stage]
        model = make_model(recipe, config, tokenizer.vocab_size)
    except ConfigError as error:
        raise CheckpointError(f"{folder / form.CONFIG} cannot be used: {error}") from None
    assert not isinstance(model, CoCa)
    if exported.trained.keys() | exported.frozen.keys() != set(model.names()):
        raise CheckpointError(
            f"{folder / form.CONFIG} is damaged: trained and frozen are not {model.names()}; fetch "
            "it again"
        )
    devices = make_mesh(mesh or MeshConfig())
    abstract = abstract_params(model, devices)
    params = _stored(folder / form.WEIGHTS, abstract, exported.trained)
    for name, part in exported.frozen.items():
        if not part.weights:
            path = folder / form.frozen_file(name)
            params |= _stored(path, abstract, {name: part.digest})
    for name, part in exported.frozen.items():
        if part.weights:
            start = _public(name, recipe.components[name], part.digest, abstract[name])
            params[name] = initialization.load(start, abstract[name], None, DTYPES[recipe.dtype])
    digests = {name: part.digest for name, part in exported.frozen.items()}
    loaded = Loaded(
        folder, exported.stage, exported.step, recipe, model, params, tokenizer, devices,
        view_of(model), digests,
    )  # fmt: skip
    if image_settings(loaded) != (exported.view, exported.clip_frames):
        raise CheckpointError(
            f"{folder / form.CONFIG}: its view is not that of its encoder; fetch it again, or "
            f"install vadapter {exported.vadapter}, which wrote it"
        )
    return loaded


def _moved(exported: Exported, weights: Mapping[str, str]) -> Exported:
    """The record with other places of public weights."""
    public = {name for name, part in exported.frozen.items() if part.weights}
    for name in weights:
        if name not in public:
            raise ConfigError(
                f"weights={{{name!r}: …}}: no public frozen part"
                + (nearest(name, public) if public else "; this export has none")
            )
    moved = {
        name: dataclasses.replace(exported.frozen[name], weights=os.fspath(place), revision="")
        for name, place in weights.items()
    }
    return dataclasses.replace(exported, frozen=exported.frozen | moved)


def _tokenizer(folder: Path, exported: Exported) -> Tokenizer:
    path = folder / form.TOKENIZER
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the export is not complete; fetch it again")
    tokenizer = load_tokenizer(path)
    if tokenizer.digest != exported.tokenizer:
        raise CheckpointError(f"{path} is not the tokenizer of this export; fetch it again")
    return tokenizer


def _stored(path: Path, abstract: Mapping[str, Any], digests: Mapping[str, str]) -> dict[str, Any]:
    """Components from a file that holds them and nothing else, each verified by its digest."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the export is not complete; fetch it again")
    found = TensorFiles.open(path)
    flat = traverse_util.flatten_dict({name: dict(abstract[name]) for name in digests}, sep="/")
    wanted: dict[str, Any] = {str(name): leaf for name, leaf in flat.items()}
    faults = [f"{name}: missing" for name in wanted.keys() - found.tensors.keys()]
    faults += [f"{name}: left over" for name in found.tensors.keys() - wanted.keys()]
    faults += [
        f"{name}: {list(found.tensors[name].shape)} there, {list(leaf.shape)} needed"
        for name, leaf in wanted.items()
        if name in found.tensors and found.tensors[name].shape != leaf.shape
    ]
    if faults:
        raise CheckpointError(
            f"{path} does not fit {form.CONFIG} beside it; fetch both again:\n  "
            + "\n  ".join(truncate(sorted(faults), _SHOWN))
        )
    leaves = {
        name: jax.device_put(found.read(name), leaf.sharding) for name, leaf in wanted.items()
    }
    params = traverse_util.unflatten_dict(leaves, sep="/")
    for name, digest in digests.items():
        if combined(tree_digests(params[name])) != digest:
            raise CheckpointError(
                f"{path} is damaged: {name} is not what was exported; fetch it again"
            )
    return params


def _public(name: str, spec: Mapping[str, Any], digest: str, abstract: Any) -> initialization.Start:
    """A frozen part's public weights, found and known to be those of the export."""
    place = spec["weights"]
    try:
        reference = Reference.of(name, spec)
        now = PREFIX + reference.open().digest()
    except CheckpointError as error:
        raise CheckpointError(f"{error}\n{_remedy(name)}") from error
    if now != digest:
        raise CheckpointError(
            f"{name}: {place} is not what this adapter was trained with ({now[:19]}…, then "
            f"{digest[:19]}…).\n{_remedy(name)}"
        )
    leaves = tuple(leaf_paths(abstract))
    return initialization.Start(name, f"weights {place}", digest, reference, loaded=leaves)


def _remedy(name: str) -> str:
    return (
        f"Say where the weights of {name} lie: from_pretrained(…, weights={{{name!r}: FOLDER}}), "
        f"or --config.components.{name}.weights=FOLDER on the command line."
    )
