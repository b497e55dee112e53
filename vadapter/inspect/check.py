"""What a recipe would train, and all that would stop it, from shapes and headers alone.

Legend: as in `train.preflight`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from vadapter.data.example import Source
from vadapter.data.open import make_source, require_texts
from vadapter.data.tokenizers import Tokenizer
from vadapter.data.tokenizers.bpe import BPETokenizer
from vadapter.data.tokenizers.files import read_spec
from vadapter.data.tokenizers.pretrained import PretrainedTokenizer
from vadapter.distributed import memory
from vadapter.distributed.mesh import MeshConfig, make_mesh
from vadapter.errors import Problems, UserError
from vadapter.models.registry import expand
from vadapter.recipe.schema import DTYPES, Recipe, StageConfig, components, trained
from vadapter.stages import initialization
from vadapter.stages.preflight import Coming, Preflight
from vadapter.stages.run import read_tokenizer
from vadapter.weights.hf_checkpoint import locate

NOWHERE = Path("RUN")  # where no run directory is given: nothing is finished there
Facts = dict[str, Any]


def check(load: Callable[[], Recipe], workdir: Path | None = None) -> tuple[Facts, Problems]:
    """Looks at the stages of a recipe's chain; reads no tensor and writes nothing.

    Args:
      load: reads the recipe.
      workdir: the run directory, which need not exist.

    Returns:
      The facts, made of what JSON has: `recipe`, `dtype`, `mesh`, `stages` (a list) and `problems`
      (a list of texts); and the same problems as errors.
    """
    problems, facts = Problems(), {"stages": []}
    with problems.gather():
        facts |= _stages(load(), workdir or NOWHERE, problems)
    return {**facts, "problems": problems.lines()}, problems


def _stages(recipe: Recipe, workdir: Path, problems: Problems) -> Facts:
    mesh, shape = make_mesh(MeshConfig(), jax.devices()[:1]), None
    with problems.gather("mesh"):
        mesh = make_mesh(recipe.mesh)
        shape = dict(mesh.shape)
    source, stages, coming = _Sources(recipe), [], {}
    limit = None if shape is None else memory.limit(mesh)
    for name in recipe.chain:
        done = (workdir / name / initialization.DONE).is_file()
        # What is finished is not run again: what it was made of may be gone.
        mine = Problems() if done else problems
        stage = _stage(recipe, name, workdir, mesh, source, coming, mine, limit)
        stages.append(stage | {"done": done})
        if done:
            coming.pop(name, None)
    for stage in stages if shape is None else ():
        stage["memory"].pop("per_device", None)
    return {"recipe": recipe.name, "dtype": recipe.dtype, "mesh": shape, "stages": stages}


class _Sources:
    """Opens each data set once; one that does not open fails in the same way every time."""

    def __init__(self, recipe: Recipe):
        self._recipe, self._made = recipe, {}

    def __call__(self, name: str) -> Any:
        if name not in self._made:
            try:
                self._made[name] = make_source(name, self._recipe.data[name])
            except UserError as error:
                self._made[name] = error
        if isinstance(self._made[name], UserError):
            raise self._made[name]
        return self._made[name]


def _stage(
    recipe: Recipe,
    name: str,
    workdir: Path,
    mesh: jax.sharding.Mesh,
    source: Callable[[str], Source],
    coming: Coming,
    problems: Problems,
    limit: int | None,
) -> Facts:
    config = recipe.stages[name]
    tokenizer = None
    with problems.gather(name):
        tokenizer = read_tokenizer(recipe, config, workdir)
        if tokenizer is None:
            require_texts(recipe.tokenizer)
            BPETokenizer.train(["a"], recipe.tokenizer.vocab_size)  # that it is large enough
    own = recipe.components.get(config.lm, {}).get("weights", "")
    if tokenizer is None and not own:
        for data in dict.fromkeys(recipe.tokenizer.data):
            with problems.gather(name):
                source(data)
    at_most = 1 if own else recipe.tokenizer.vocab_size
    stage = Preflight(
        recipe, name, workdir, tokenizer or _bytes(), mesh,
        exact=tokenizer is not None, vocab_size=0 if tokenizer else at_most,
    )  # fmt: skip
    stage.check(source, coming, problems, limit)
    return {
        "name": name,
        "kind": config.kind,
        "steps": config.steps,
        "batch": config.batch,
        "components": [_component(stage, part) for part in components(config)],
        "parameters": _parameters(stage),
        "memory": _memory(stage),
        "tokenizer": _tokenizer(stage, own),
        "data": [_data(stage, data) for data in stage.data()],
    }


def _bytes() -> Tokenizer:
    """A tokenizer for which every text is as long as it can be: in bytes."""
    return BPETokenizer.train(["a"], 259)


def _component(stage: Preflight, name: str) -> Facts:
    spec, recipe = stage.recipe.components[name], stage.recipe
    enters, leaves = stage.flow.get(name, (None, None))
    return {
        "name": name,
        "kind": expand(name, spec)["kind"],
        "size": spec.get("size", ""),
        "enters": jax.tree.map(_shape, enters),
        "leaves": jax.tree.map(_shape, leaves),
        "vocab_size": getattr(_config(stage, name), "vocab_size", None),
        "parameters": _count(stage.abstract[name]) if stage.abstract else None,
        "trained": name in trained(stage.config),
        "int8": bool(spec.get("int8")),
        "start": _start(recipe, stage, name),
    }


def _config(stage: Preflight, name: str) -> Any:
    module: Any = stage.model.modules.get(name) if stage.model else None
    return module.config if module is not None else None


def _start(recipe: Recipe, stage: Preflight, name: str) -> Facts:
    """Where it starts; without `tensors` where that does not fit or is not there."""
    start = stage.starts.get(name)
    if start is None:
        default = "weights" if recipe.components[name].get("weights") else "nowhere"
        wanted = stage.config.start.get(name, default)
        return {"from": wanted, "found": False}
    out: Facts = {"from": start.source, "found": True, "tensors": len(start.loaded)}
    out |= {"left_out": list(start.dropped), "fresh": list(start.fresh)}
    if start.weights is None or start.report is None:
        return out
    files = start.weights.open().stamps()
    return out | {
        "weights": start.weights.weights,
        "path": str(start.weights.path),
        "files": len(files),
        "bytes": sum(size for size, _ in files.values()),
        "tensors": start.report.tensors,
    }


def _parameters(stage: Preflight) -> Facts:
    counts = {name: _count(tree) for name, tree in stage.abstract.items()}
    trainable = sum(counts[name] for name in trained(stage.config) if name in counts)
    whole = sum(counts.values())
    return {"total": whole, "trained": trainable, "frozen": whole - trainable}


def _memory(stage: Preflight) -> Facts:
    """Bytes of what stays on the devices, in all and on one: no activations, no gradients."""
    learns, dtype = trained(stage.config), DTYPES[stage.recipe.dtype]
    kept = [
        x for n, tree in stage.abstract.items() if n not in learns for x in jax.tree.leaves(tree)
    ]
    trainable = [
        x for n in learns if n in stage.abstract for x in jax.tree.leaves(stage.abstract[n])
    ]
    width = lambda x: jnp.dtype(x.dtype if x.dtype == jnp.int8 else dtype).itemsize  # noqa: E731

    def bytes_of(size: Callable[[Any], int]) -> Facts:
        return {
            "frozen": sum(size(x) * width(x) for x in kept),
            "trained": 4 * sum(map(size, trainable)),
            "moments": 8 * sum(map(size, trainable)),
        }

    on_one = lambda x: math.prod(x.sharding.shard_shape(x.shape))  # noqa: E731
    return bytes_of(lambda x: x.size) | {"per_device": bytes_of(on_one)}


def _tokenizer(stage: Preflight, own: str) -> Facts:
    tokenizer = stage.tokenizer
    name = stage.config.lm or ("text" if stage.config.kind == "vision" else "")
    rows = getattr(_config(stage, name), "vocab_size", None)
    ids = {"bos": [tokenizer.bos_id], "eos": [tokenizer.eos_id], "stop": [*tokenizer.stop_ids]}
    named: dict[int, str] = {}
    if isinstance(tokenizer, PretrainedTokenizer):
        folder = locate(own, f"components.{name}.weights").path
        named = _names(folder, {i for group in ids.values() for i in group})
    return {
        "of": name if own else "run",
        "vocab_size": stage.vocab_size,
        "exact": stage.exact,
        "embedding": name,
        "rows": rows,
        "padding_rows": None if rows is None else rows - stage.vocab_size,
    } | ({} if own and not stage.exact else {k: _named(v, named) for k, v in ids.items()})


def _named(ids: Iterable[int], names: Mapping[int, str]) -> list[Facts]:
    return [{"id": i, "token": names.get(i, "")} for i in ids]


def _names(folder: Path, ids: set[int]) -> dict[int, str]:
    """What the specials of a model's folder read as."""
    spec = read_spec(folder)
    vocab = spec["model"]["vocab"]
    pairs = vocab.items() if isinstance(vocab, dict) else ((p, i) for i, (p, _) in enumerate(vocab))
    names = {i: piece for piece, i in pairs if i in ids}
    return names | {t["id"]: t["content"] for t in spec["added_tokens"] if t["id"] in ids}


def _data(stage: Preflight, name: str) -> Facts:
    data, source, row = stage.recipe.data[name], stage.sources.get(name), stage.rows.get(name, {})
    sizes = {key: list(leaf.shape[1:]) for key, leaf in row.items()}
    return {
        "name": name,
        "task": data.task,
        "use": _uses(stage.recipe, stage.config, name),
        "examples": None if source is None else len(source),
        "frames": sizes.get("frames"),
        "prompt": sizes["prompt"][0] if row else None,
        "text": data.text_len,
        "targets": data.target_len or data.text_len,
    }


def _uses(recipe: Recipe, config: StageConfig, name: str) -> list[str]:
    train = [f"train {config.data[name]:g}"] if name in config.data else []
    loss = ["loss"] if name in config.loss else []
    return train + loss + [f"eval {e}" for e in config.evals if recipe.evals[e].data == name]


def _shape(leaf: Any) -> Facts:
    return {"dtype": jnp.dtype(leaf.dtype).name, "shape": ["B", *leaf.shape[1:]]}


def _count(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))
