"""A public checkpoint as a component: its spec from its own config.json, its tensors by name."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from vadapter.config import nearest, resolve
from vadapter.console import listing, truncate
from vadapter.errors import CheckpointError
from vadapter.weights import hub, llama2c, npz
from vadapter.weights.families import language, openclip, vision
from vadapter.weights.name_mapping import BLOCKS, Source, Table
from vadapter.weights.preprocessor import PREPROCESSORS, read_preprocess
from vadapter.weights.safetensors import TensorFiles

ENCODERS = vision.FAMILIES | openclip.FAMILIES
FAMILIES = language.FAMILIES | ENCODERS
# Of a model of several parts, the one that is of use here, and what it is.
PARTS = {
    "clip": ("vision_config", "clip_vision_model"),
    "siglip": ("vision_config", "siglip_vision_model"),
    "siglip2": ("vision_config", "siglip2_vision_model"),
    "gemma3": ("text_config", "gemma3_text"),
}
_MAX_CONFIG = 2**20  # bytes of a config.json
_SHOWN = 8  # names in a message
_ENDS = (("embedding", "weight"), ("head", "weight"), ("norm", "weight"), ("norm", "bias"))


@dataclasses.dataclass(frozen=True)
class Report:
    """What was made of a checkpoint.

    Attributes:
      tensors: how many of theirs became how many `leaves` of ours, with `parameters` in all.
      left_out: theirs that nobody needs, as the family's table allows.
    """

    tensors: int
    leaves: int
    parameters: int
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        text = f"{self.tensors} tensors, {self.parameters:,} parameters"
        return text + (f"; left out: {listing(self.left_out, _SHOWN)}" if self.left_out else "")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint folder, none of whose tensors is read yet.

    Attributes:
      path: the folder.
      model_type: as its config.json says.
      spec: of the component: `kind` and the fields of its configuration.
      tables: how the family may name its tensors.
      files: the tensors.
    """

    path: Path
    model_type: str
    spec: Mapping[str, Any]
    tables: tuple[Table, ...]
    files: TensorFiles

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Reads config.json and the headers of the weights.

        Raises:
          CheckpointError: no folder, another model than those known, a config.json that lacks a
            key, weights that are missing or damaged.
        """
        model_type, spec = describe(path)
        family = FAMILIES[model_type]
        return cls(path, model_type, spec, family.tables, family.files(path))

    def match(self, abstract: Any) -> Report:
        """Accounts forevery tensor of both sides, none of which is read.

        Args:
          abstract: tree of `jax.ShapeDtypeStruct` that the component needs.

        Raises:
          CheckpointError: tensors that are missing, left over, or of another shape.
        """
        return self._match(_flat(abstract))[0]

    def load(self, abstract: Any, dtype: Any = None) -> tuple[Any, Report]:
        """Reads the tensors straight into each device's shard.

        Args:
          abstract: tree of `jax.ShapeDtypeStruct`, with shardings where there is a mesh.
          dtype: of the result; None: as `abstract` says.

        Returns:
          The tree of `jax.Array`, and what was read.

        Raises:
          CheckpointError: as `match`.
        """
        out = dict(self.leaves(abstract, dtype))
        return traverse_util.unflatten_dict(out, sep="/"), self.match(abstract)

    def leaves(self, abstract: Any, dtype: Any = None) -> Iterator[tuple[str, jax.Array]]:
        """As `load`, (path, array) one after the other, paths joined by "/"."""
        wanted = _flat(abstract)
        _, prefix, sources = self._match(wanted)
        for path, leaf in wanted.items():
            yield path, _place(leaf, self._reader(sources[path], prefix, dtype or leaf.dtype))

    def stamps(self) -> Mapping[Path, tuple[int, int]]:
        """The files of the weights, each with its size and time of change in ns."""
        return self.files.files

    def digest(self) -> str:
        """The sha256, in hex, of the files' bytes, see `TensorFiles.digest`."""
        return self.files.digest()

    def _match(self, leaves: Mapping[str, Any]) -> tuple[Report, str, dict[str, Source]]:
        """The report; the prefix of their names; where each of our leaves comes from."""
        table, prefix, sources = self._names(leaves)
        faults, used = [], set()
        for path, source in sources.items():
            if source is None:
                faults.append(f"{path}: {self.model_type} has no such parameter")
                continue
            for name in (prefix + n for n in source.names):
                used.add(name)
                if name not in self.files.tensors:
                    faults.append(f"{name}: missing; {path} is made of it")
                elif not source.fits(shape := self.files.tensors[name].shape):
                    faults.append(f"{name}: {list(shape)}, but {path} needs {source.expected}")
        faults += [
            f"{name}: left over; nothing is made of it"
            for name in table.unneeded(sorted(self.files.tensors), used)
            if not self._expected_rest(name, table, prefix, leaves)
        ]
        if faults:
            raise CheckpointError(
                f"{self.path} does not fit {self.model_type}'s table, {len(faults)} faults:\n  "
                + "\n  ".join(truncate(faults, _SHOWN))
            )
        count = sum(int(np.prod(leaf.shape)) for leaf in leaves.values())
        left_out = tuple(sorted(self.files.tensors.keys() - used))
        found = {path: source for path, source in sources.items() if source is not None}
        return Report(len(used), len(leaves), count, left_out), prefix, found

    def _names(self, leaves: Mapping[str, Any]) -> tuple[Table, str, dict[str, Source | None]]:
        """The table and the prefix by which most tensors are found, and our leaves' sources."""
        best, chosen = -1, None
        for table in self.tables:
            sources = {k: table.source(k, v.shape) for k, v in leaves.items()}
            names = [source.names[0] for source in sources.values() if source is not None]
            for prefix in table.prefixes:
                if (found := sum(prefix + n in self.files.tensors for n in names)) > best:
                    best, chosen = found, (table, prefix, sources)
        assert chosen is not None
        return chosen

    def _expected_rest(
        self, name: str, table: Table, prefix: str, leaves: Mapping[str, Any]
    ) -> bool:
        """A head that is the embedding again, layers behind the one that is tapped with the norm
        behind all of them, the two ends of a language model that is used through its hidden states
        alone, and parts that are not in use."""
        for part, pattern in table.optional.items():
            if re.search(pattern, name) and not any(k.startswith(f"{part}/") for k in leaves):
                return True
        modules = {path.rpartition("/")[0] for path in leaves}
        ends = [(m, leaf) for m, leaf in _ENDS if m not in modules]
        unused = {f"{prefix}{table.modules.get(m)}.{leaf}": m for m, leaf in ends}
        if name in unused:
            tied = self.spec.get("tied") or "embedding" not in modules
            return bool(tied) or unused[name] == "norm"
        depth = next(leaf.shape[0] for path, leaf in leaves.items() if path.startswith(BLOCKS))
        behind = range(depth, self.spec["depth"])
        return any(name.startswith(prefix + table.layers.format(i)) for i in behind)

    def _reader(self, source: Source, prefix: str, dtype: Any) -> Callable[[Any], np.ndarray]:
        names = [prefix + name for name in source.names]
        head_dim = self.spec.get("head_dim") or self.spec["width"] // self.spec["heads"]
        return lambda index: source.read(self.files, names, index, head_dim, dtype)


def _flat(tree: Any) -> dict[str, Any]:
    return dict(traverse_util.flatten_dict(tree, sep="/"))


def _place(leaf: Any, read: Callable[[Any], np.ndarray]) -> jax.Array:
    """An array whose shards are read each for its own device, and replicas once."""
    if leaf.sharding is None:
        return jax.device_put(read(tuple(slice(0, n) for n in leaf.shape)))
    shards: dict[str, np.ndarray] = {}

    def shard(index: Any) -> np.ndarray:
        key = str(index)
        if key not in shards:
            shards[key] = read(index)
        return shards[key]

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, shard)


def locate(weights: str, where: str) -> hub.Snapshot:
    """The folder of a component's public weights.

    Args:
      weights: a folder, with `~` and `$VARIABLES`, or a hub id.
      where: its name in the recipe, for messages.

    Raises:
      CheckpointError: as `hub.resolve`.
    """
    try:
        return hub.resolve(resolve(weights, where))
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error


def complete(spec: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A component's spec with what its public checkpoint says, which the spec itself overrides.

    A spec that has a kind or a size, or no weights, is complete. A hub id is pinned to its commit.

    Args:
      spec: of the component, `{weights: FOLDER or hub id, …}`.
      where: name of `weights` in the recipe, for messages.

    Raises:
      CheckpointError: no such checkpoint, or a model that is not known.
    """
    if not spec.get("weights") or spec.get("kind") or spec.get("size"):
        return dict(spec)
    found = locate(spec["weights"], where)
    pinned = f"{found.repo_id}@{found.revision}" if found.repo_id else spec["weights"]
    try:
        return {**describe(found.path)[1], **spec, "weights": pinned}
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error


def describe(path: Path) -> tuple[str, dict[str, Any]]:
    """(model_type, spec of the component) of a checkpoint folder, from what describes it alone.

    Raises:
      CheckpointError: another model than those known, a config.json that lacks a key.
    """
    config = read_config(path)
    model_type = config.get("model_type", "")
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"{path / 'config.json'}: model_type {model_type!r}: unknown"
            f"{nearest(str(model_type), FAMILIES)}"
        )
    try:
        spec = FAMILIES[model_type].spec(config)
    except KeyError as e:
        raise CheckpointError(f"{path / 'config.json'} has no {e.args[0]!r}") from None
    if model_type in ENCODERS and any((path / name).is_file() for name in PREPROCESSORS):
        spec |= read_preprocess(path).fields()
    return model_type, spec


def read_config(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, with its `model_type`; of several parts, the one in use.

    Raises:
      CheckpointError: nothing there that says it, damaged, or absurdly large.
    """
    path = Path(path)
    config: dict[str, Any] = {}
    for name in (name for name in CONFIGS if (path / name).is_file()):
        if (config := _read_json(path / name, CONFIGS[name])).get("model_type"):
            return config
    if file := llama2c.find(path):
        return llama2c.read_config(file)
    npz.require_file(path / "config.json")
    return config


def _read_json(file: Path, read: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    try:
        if file.stat().st_size > _MAX_CONFIG:
            raise ValueError(f"it has more than {_MAX_CONFIG} bytes")
        return read(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise CheckpointError(f"{file} cannot be read ({e}); fetch it again") from e


def _transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    if (kind := config.get("model_type")) in PARTS:
        key, model_type = PARTS[kind]
        return {**config[key], "model_type": model_type}
    return dict(config)


# The file that describes a checkpoint, the first that names a model_type -> what it says. One of
# llama2.c describes itself.
CONFIGS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "config.json": _transformers,
    openclip.CONFIG: openclip.read_config,
}
