"""Public checkpoints as components: the spec from their config.json, the parameters by name."""

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vadapter.config import resolve
from vadapter.console import listing, quantity, truncate
from vadapter.distributed.mesh import read_sharded
from vadapter.errors import CheckpointError
from vadapter.models.paths import flatten
from vadapter.weights import foreign, hub, llama2c, other_models, parts
from vadapter.weights.families import (
    aimv2,
    clip,
    dinov2,
    dinov3,
    exported,
    gemma,
    gemma4,
    gpt2,
    granite,
    idefics3,
    internvit,
    llama,
    ministral,
    neox,
    olmo,
    openclip,
    phi,
    qformer,
    qwen35,
    qwen_vl,
    smollm3,
    stablelm,
    timm,
    video,
)
from vadapter.weights.families.family import Config
from vadapter.weights.files import Stamp
from vadapter.weights.name_mapping import Source, Table
from vadapter.weights.preprocessor import PREPROCESSORS, read_preprocess
from vadapter.weights.safetensors import TensorFiles

LANGUAGE_MODELS = (
    llama.FAMILIES | gemma.FAMILIES | gpt2.FAMILIES | neox.FAMILIES | granite.FAMILIES
    | ministral.FAMILIES | olmo.FAMILIES | phi.FAMILIES | smollm3.FAMILIES | stablelm.FAMILIES
    | qwen_vl.TEXT | qwen35.FAMILIES | gemma4.FAMILIES
)  # fmt: skip
ENCODERS = (
    clip.FAMILIES | dinov2.FAMILIES | dinov3.FAMILIES | aimv2.FAMILIES | internvit.FAMILIES
    | openclip.FAMILIES | timm.FAMILIES | video.FAMILIES | idefics3.FAMILIES | qwen_vl.VISION
)  # fmt: skip
FAMILIES = LANGUAGE_MODELS | ENCODERS | qformer.FAMILIES | exported.FAMILIES
_MAX_CONFIG = 2**20  # bytes of a config.json
FLOATS = ("float16", "bfloat16", "float32", "float64")  # dtypes of parameters
_SHOWN = 8  # names in a message
# The two ends of a model, which it does without if it is used through its hidden states alone.
_ENDS = (("embedding", "weight"), ("head", "weight"), ("norm", "weight"), ("norm", "bias"))


class MismatchError(CheckpointError):
    """Tensors of a checkpoint do not match the parameters of a component."""

    def __init__(self, message: str, paths: tuple[str, ...]) -> None:
        super().__init__(message)
        self.paths = paths  # of the parameters that no tensor fits


@dataclasses.dataclass(frozen=True)
class Report:
    """How the tensors of a checkpoint match the parameters of a component."""

    tensors: int  # number of those that are used
    parameters: int  # number in them
    unused: tuple[str, ...]  # tensors that the component does not need

    def __str__(self) -> str:
        text = f"{self.tensors} tensors, {self.parameters:,} parameters"
        return text + (f"; unused: {listing(self.unused, _SHOWN)}" if self.unused else "")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, none of whose tensors is read yet."""

    path: Path
    model_type: str
    spec: Mapping[str, Any]  # of the component: `kind` and the fields of its configuration
    tables: tuple[Table, ...]  # the names that the family may give its tensors
    files: TensorFiles
    fresh: frozenset[str] = frozenset()  # paths of parameters that are not read from it

    @classmethod
    def open(cls, path: Path, part: str = "") -> "Checkpoint":
        """Read config.json and the headers of the weights; raise CheckpointError if one is bad.

        `part` names one of a checkpoint that has several, see `parts`.
        """
        config = read_config(path)
        model_type, spec = _describe(path, config, part)
        family, rename = FAMILIES[model_type], parts.renamed(config, part)
        files = TensorFiles.open(path, rename) if part else family.files(path, config)
        if rename and not part:  # of a model whose text has always been read without naming it
            files = files.renamed(rename)
        return cls(path, model_type, spec, family.names(spec), files)

    def match(self, abstract: Any) -> Report:
        """Match the tensors to the parameters, by their names and shapes alone.

        Raises:
          MismatchError: tensors are missing or unexpected, or their shapes do not match.
        """
        return self._match(flatten(abstract))[0]

    def leaves(self, abstract: Any, dtype: Any = None) -> Iterator[tuple[str, jax.Array]]:
        """Read the tensors straight into each device's shard, one leaf after the other.

        `abstract` is a tree of `jax.ShapeDtypeStruct`, with shardings where there is a mesh, and
        with the dtypes of the result unless `dtype` is given. Yields (path, array) of all that is
        not fresh, the parts of a path joined by "/"; raises as `match`, and as `TensorFiles.digest`
        where the checkpoint says what its digest is. Raises CheckpointError for a number that is
        not finite, and for a head beside the embedding that is to be its copy and is not.
        """
        if self.files.expected:
            self.digest()
        leaves = flatten(abstract)
        sources = self._match(leaves)[1]
        self._check_tied(leaves)
        head_dim = self.spec.get("head_dim") or self.spec["width"] // self.spec["heads"]
        for path, source in sources.items():
            leaf = leaves[path]
            read = functools.partial(
                source.read, self.files, head_dim=head_dim, dtype=dtype or leaf.dtype
            )
            yield path, _place(leaf, read)

    def stamps(self) -> Mapping[Path, Stamp]:
        """Return the files of the weights with their stamps."""
        return self.files.files

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the files, see `TensorFiles.digest`."""
        return self.files.digest()

    def _match(self, leaves: Mapping[str, Any]) -> tuple[Report, dict[str, Source]]:
        """Return the report, and the source of each of our leaves that is not fresh."""
        table, prefix, sources = self._names(leaves)
        named = {name for source in sources.values() if source for name in source.names}
        needed = {path: source for path, source in sources.items() if path not in self.fresh}
        misfits = {path: found for path, s in needed.items() if (found := self._faults(path, s))}
        matched = {path: s for path, s in needed.items() if s is not None and path not in misfits}
        used = {name for source in matched.values() for name in source.names}
        unused = sorted(self.files.tensors.keys() - used)
        wanted = [name for source in needed.values() if source for name in source.names]
        if wanted and not any(name in self.files.tensors for name in wanted):
            first = min(self.files.tensors, default="none")
            raise MismatchError(
                f"{self.path} has no tensor of {self.model_type}: its names are like {first!r}, "
                f"those of {self.model_type} like {wanted[0]!r}",
                tuple(misfits),
            )
        faults = [fault for found in misfits.values() for fault in found]
        faults += [
            f"unexpected: {name}"
            for name in unused
            if name not in named and not self._may_ignore(name, table, prefix, leaves)
        ]
        head = sources.get("head/kernel")
        if head and len(faults) == 1 and faults[0].startswith(f"missing: {head.names[0]}"):
            raise MismatchError(
                f"{self.path} has no {head.names[0]}: it is a base or embedding model, saved "
                "without the head over words; give the checkpoint that has it, as one whose "
                "architectures in config.json are …ForCausalLM",
                tuple(misfits),
            )
        if faults:
            raise MismatchError(
                f"{self.path} does not match the parameters of {self.model_type} "
                f"({quantity(len(faults), 'tensor')}):\n  " + "\n  ".join(truncate(faults, _SHOWN)),
                tuple(misfits),
            )
        count = sum(int(np.prod(leaves[path].shape)) for path in matched)
        return Report(len(used), count, tuple(unused)), matched

    def _check_tied(self, leaves: Mapping[str, Any]) -> None:
        """Raise CheckpointError if a stored head differs from the embedding that takes its place.

        The original loads such a head as it is, whatever its config.json says.
        """
        if "embedding/embedding" not in leaves or "head/kernel" in leaves:
            return
        table, prefix, sources = self._names(leaves)
        head, source = f"{prefix}{table.modules.get('head')}.weight", sources["embedding/embedding"]
        if source is None or head not in self.files.tensors:
            return
        if not self.files.equal(head, source.names[0]):
            raise CheckpointError(
                f"{self.path}: {head} is stored and is not {source.names[0]}, although config.json "
                "ties the head to the embedding. Set tied=False beside weights to use the head "
                "that is stored, as transformers does"
            )

    def _faults(self, path: str, source: Source | None) -> list[str]:
        """Return what is wrong with the tensors of a leaf."""
        if source is None:
            return [f"unknown parameter: {path} (no tensor of {self.model_type})"]
        faults = []
        for name in source.names:
            if name not in self.files.tensors:
                faults.append(f"missing: {name} (for {path})")
            elif self.files.tensors[name].dtype.name not in FLOATS:
                faults.append(
                    f"quantized: {name} is {self.files.tensors[name].dtype.name}, and its scales "
                    "are not read; give the checkpoint in float32, float16 or bfloat16"
                )
            elif not source.fits(shape := self.files.tensors[name].shape):
                faults.append(
                    f"shape mismatch: {name} is {list(shape)}, but {path} needs "
                    f"{list(source.expected)}"
                )
        return faults

    def _names(self, leaves: Mapping[str, Any]) -> tuple[Table, str, dict[str, Source | None]]:
        """Return the table and prefix that match most tensors, and the sources of our leaves."""
        best, chosen = -1, None
        for table in self.tables:
            for prefix in table.prefixes:
                sources = {k: table.source(k, v.shape, prefix) for k, v in leaves.items()}
                count = sum(s.names[0] in self.files.tensors for s in sources.values() if s)
                if count > best:
                    best, chosen = count, (table, prefix, sources)
        assert chosen is not None
        return chosen

    def _may_ignore(self, name: str, table: Table, prefix: str, leaves: Mapping[str, Any]) -> bool:
        """Return whether the component does without a tensor of the checkpoint.

        That is: what the family ignores; a copy of the embedding as head; layers after the one that
        is tapped, and the norm after them; embedding and head of a language model that is used
        through its hidden states; optional modules that are not used.
        """
        parts = {path.partition("/")[0] for path in leaves}
        optional = (pattern for part, pattern in table.optional.items() if part not in parts)
        if any(re.search(pattern, name) for pattern in (*table.ignored, *optional)):
            return True
        modules = {path.rpartition("/")[0] for path in leaves}
        ends = [(m, leaf) for m, leaf in _ENDS if m not in modules]
        unused = {f"{prefix}{table.modules.get(m)}.{leaf}": m for m, leaf in ends}
        if name in unused:
            tied = self.spec.get("tied") or "embedding" not in modules
            return bool(tied) or unused[name] == "norm"
        depth = table.depth({path: leaf.shape for path, leaf in leaves.items()})
        later = range(depth, self.spec["depth"])
        return any(name.startswith(prefix + table.layers.format(i)) for i in later)


def _place(leaf: Any, read: Callable[[Any], np.ndarray]) -> jax.Array:
    """Return an array of which each device's shard is read alone."""
    if leaf.sharding is None:
        return jax.device_put(read(tuple(slice(0, n) for n in leaf.shape)))
    return read_sharded(leaf.shape, leaf.sharding, read)


def locate(weights: str, key: str, part: str = "") -> hub.Snapshot:
    """Return `hub.resolve` of public weights, with errors that name `key` of the recipe.

    Of the repository of a `part`, weights files without it are not downloaded.
    """
    shards = functools.partial(parts.shards, name=part) if part else None
    try:
        snapshot = hub.resolve(resolve(weights, key), shards=shards)
        if snapshot.repo_id and not any(snapshot.path.glob(hub.WEIGHTS)):
            foreign.refuse_repository(snapshot.repo_id, hub.files(snapshot))
        return snapshot
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from error


def complete(spec: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a component's spec completed from its public checkpoint; its own fields override.

    A spec with a kind or a size, or without weights, is complete. A hub id is pinned to its commit.
    `key` is that of `weights` in the recipe, for messages.

    Raises:
      CheckpointError: there is no such checkpoint, or its model is not supported.
    """
    if not spec.get("weights") or spec.get("kind") or spec.get("size"):
        return dict(spec)
    part = spec.get("part", "")
    snapshot = locate(spec["weights"], key, part)
    pinned = f"{snapshot.repo_id}@{snapshot.revision}" if snapshot.repo_id else spec["weights"]
    try:
        return {**describe(snapshot.path, part)[1], **spec, "weights": pinned}
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from error


def describe(path: Path, part: str = "") -> tuple[str, dict[str, Any]]:
    """Return (model_type, spec of the component) of a checkpoint folder, without its weights.

    Raises:
      CheckpointError: an unsupported model or part, or a config.json that lacks a key.
    """
    return _describe(path, read_config(path), part)


def _describe(path: Path, whole: Config, part: str) -> tuple[str, dict[str, Any]]:
    """Return what `describe` does, from the config of all parts."""
    file = path / "config.json"
    with _reading(file):
        chosen = parts.find(whole, part)
        config = chosen.config(whole) if chosen else whole
    model_type = config.get("model_type", "")
    if model_type not in FAMILIES:
        raise CheckpointError(f"{file}: {_unknown(model_type)}")
    if model_type in LANGUAGE_MODELS:
        other_models.require_words(file, config)
    with _reading(file):
        if variant := FAMILIES[model_type].variant:
            model_type = variant(config)
        spec = FAMILIES[model_type].spec(config)
    if model_type in ENCODERS and any((path / name).is_file() for name in PREPROCESSORS):
        spec |= read_preprocess(path).fields()
    if chosen:
        spec |= chosen.spec(whole)
    return model_type, spec


def _unknown(model_type: Any) -> str:
    """Return what a file says that no family is for, and what files of the families say.

    No name is guessed: programs write this key, and names that are near are other models.
    """
    said = f"model_type {model_type!r} is not supported" if model_type else "it has no model_type"
    if (kind := other_models.kind_of(model_type)) is not None:
        said = f"model_type {model_type!r} is {kind.what}: {kind.instead}"
    kinds = {"language models": LANGUAGE_MODELS, "encoders": ENCODERS,
             "models of several parts": parts.MODELS, "Q-Formers": qformer.FAMILIES}  # fmt: skip
    lists = (f"{kind}: {', '.join(sorted(_written(names)))}" for kind, names in kinds.items())
    return f"{said}. Supported are {'; '.join(lists)}"


def _written(names: Iterable[str]) -> set[str]:
    """Return those of the families that are a model_type of files of transformers."""
    own = ("llama2c", "open_clip", "timm")
    return {name for name in names if not name.startswith(own)}


def read_config(path: Path) -> dict[str, Any]:
    """Return the config of a checkpoint, of all its parts, with its `model_type`.

    Raises:
      CheckpointError: a folder of a kind that is not read, or no config.json, or a corrupt one.
    """
    written = {name: _load(path / name) for name in CONFIGS if (path / name).is_file()}
    own = written.get("config.json")
    foreign.refuse(path, own if isinstance(own, Mapping) else {})
    config: dict[str, Any] = {}
    for name, value in written.items():
        with _reading(path / name):
            if isinstance(value, Exception):
                raise value
            if (config := CONFIGS[name](value)).get("model_type"):
                return config
    if file := llama2c.find(path):
        return llama2c.read_config(file)
    if "config.json" not in written:
        foreign.refuse_without_config(path)
    return config


def _load(file: Path) -> Any:
    """Return the content of a JSON file, or what is wrong with it as a ValueError."""
    try:
        if file.stat().st_size > _MAX_CONFIG:
            raise ValueError(f"it has more than {_MAX_CONFIG} bytes")
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        return ValueError(f"{e}; download it again")


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn what a value of another type raises into a CheckpointError that names the file."""
    try:
        yield
    except KeyError as e:
        raise CheckpointError(f"{file} has no {e.args[0]!r}") from None
    except (ValueError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{file} cannot be read ({e})") from e


def _transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(kind := config.get("model_type") or "", str):
        raise ValueError(f"its model_type is {kind!r}")
    if config.get("model_type") == "blip-2":
        return qformer.read_config(config)
    if config.get("model_type") is None and "architecture" in config:
        return timm.read_config(config)
    return dict(config)


# Files that describe a checkpoint, in the order of preference -> their reader. One of llama2.c has
# none: its header describes it.
CONFIGS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "config.json": _transformers,
    openclip.CONFIG: openclip.read_config,
}
