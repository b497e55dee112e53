"""Validation of a recipe from shapes and headers alone: what it trains and what would stop it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.dtypes import itemsize_bits
from jax.sharding import Mesh

from vadapter.data.open import require_texts
from vadapter.data.tokenizers.bpe import BPETokenizer
from vadapter.data.tokenizers.files import read_spec
from vadapter.data.tokenizers.pretrained import PretrainedTokenizer
from vadapter.distributed import memory
from vadapter.distributed.mesh import MeshConfig, make_mesh
from vadapter.errors import Problems
from vadapter.models.quantize import quantized
from vadapter.models.registry import expand
from vadapter.recipe.schema import Recipe, StageConfig, components, trained
from vadapter.stages import initialization
from vadapter.stages.abstract_state import bytes_per_device
from vadapter.stages.run import read_tokenizer
from vadapter.stages.stage import NO_RUN, Findings, Sources, Stage
from vadapter.weights.hf_checkpoint import locate

Facts = dict[str, Any]


def check(load: Callable[[], Recipe], workdir: Path | None = None) -> tuple[Facts, Problems]:
    """Validate the stages of a recipe's chain; reads no tensors and writes nothing.

    The run directory need not exist. Returns the facts as JSON values, `recipe`, `dtype`, `mesh`,
    `stages` (a list) and `problems` (a list of messages), and the same problems as errors.
    """
    problems, facts = Problems(), {"stages": []}
    with problems.gather():
        facts |= _facts(load(), workdir or NO_RUN, problems)
    return {**facts, "problems": problems.lines()}, problems


def _facts(recipe: Recipe, workdir: Path, problems: Problems) -> Facts:
    mesh, shape, limit = make_mesh(MeshConfig(), jax.devices()[:1]), None, None
    with problems.gather("mesh"):
        mesh = make_mesh(recipe.mesh)
        shape, limit = dict(mesh.shape), memory.limit(mesh)
    source, stages, earlier = Sources(recipe), [], {}
    for name in recipe.chain:
        done = (workdir / name / initialization.DONE).is_file()
        # A finished stage is not run again, so its data and weights may be gone.
        reported = Problems() if done else problems
        stage = _stage(recipe, name, workdir, mesh, source, reported)
        stages.append(_stage_facts(stage, stage.check(earlier, reported, limit)) | {"done": done})
        if done:
            earlier.pop(name, None)
        if shape is None:
            stages[-1]["memory"].pop("per_device")
    return {"recipe": recipe.name, "dtype": recipe.dtype, "mesh": shape, "stages": stages}


def _stage(
    recipe: Recipe, name: str, workdir: Path, mesh: Mesh, source: Sources, problems: Problems
) -> Stage:
    """Return a stage with its tokenizer, or with an upper bound of the vocabulary's size."""
    config, tokenizer = recipe.stages[name], None
    with problems.gather(name):
        tokenizer = read_tokenizer(recipe, config, workdir)
        if tokenizer is None:
            require_texts(recipe.tokenizer)
            BPETokenizer.train(["a"], recipe.tokenizer.vocab_size)  # raises if it is too small
    own = _weights(recipe, config)  # public weights come with their own tokenizer
    if tokenizer is None and not own:
        for data in dict.fromkeys(recipe.tokenizer.data):
            with problems.gather(name):
                source(data)
    at_most = 1 if own else recipe.tokenizer.vocab_size
    size = 0 if tokenizer else at_most
    return Stage(
        recipe, name, mesh, workdir=workdir, source=source, tokenizer=tokenizer, vocab_size=size
    )


def _weights(recipe: Recipe, config: StageConfig) -> str:
    """Return the public weights of the stage's language model; "": none."""
    return recipe.components.get(config.lm, {}).get("weights", "")


def _stage_facts(stage: Stage, findings: Findings) -> Facts:
    config = stage.config
    params = stage.abstract_params() if findings.built else ({}, {})
    trainable, frozen = map(_count, params)
    return {
        "name": stage.name, "kind": config.kind, "steps": config.steps, "batch": config.batch,
        "components": [_component(stage, findings, part) for part in components(config)],
        "parameters": {"total": trainable + frozen, "trained": trainable, "frozen": frozen},
        "memory": _memory(*params),
        "tokenizer": _tokenizer(stage, findings),
        "data": [_data(stage, findings, data) for data in stage.data()],
    }  # fmt: skip


def _component(stage: Stage, findings: Findings, name: str) -> Facts:
    spec = stage.recipe.components[name]
    enters, leaves = findings.flow.get(name, (None, None))
    return {
        "name": name, "kind": expand(name, spec)["kind"], "size": spec.get("size", ""),
        "enters": jax.tree.map(_shape, enters), "leaves": jax.tree.map(_shape, leaves),
        "vocab_size": _vocab_size(stage, findings, name),
        "parameters": _count(stage.abstract[name]) if findings.built else None,
        "trained": name in trained(stage.config), "integers": quantized(spec),
        "lr_mult": stage.config.optim.lr_mults.get(name, 1.0),
        "start": _start(stage, findings, name),
    }  # fmt: skip


def _vocab_size(stage: Stage, findings: Findings, name: str) -> int | None:
    module = stage.model.modules.get(name) if findings.built else None
    return getattr(getattr(module, "config", None), "vocab_size", None)


def _start(stage: Stage, findings: Findings, name: str) -> Facts:
    """Return where a component starts; without `tensors` if that is missing or does not fit."""
    start = findings.starts.get(name)
    if start is None:
        default = "weights" if stage.recipe.components[name].get("weights") else "nowhere"
        return {"from": stage.config.start.get(name, default), "found": False}
    out: Facts = {"from": start.source, "found": True, "tensors": len(start.loaded)}
    out |= {"left_out": list(start.dropped), "fresh": list(start.fresh)}
    if start.weights is None or start.report is None:
        return out
    files = start.weights.open().stamps()
    return out | {
        "weights": start.weights.weights, "path": str(start.weights.path), "files": len(files),
        "bytes": sum(size for size, _ in files.values()), "tensors": start.report.tensors,
    }  # fmt: skip


def _memory(trainable: Any, frozen: Any) -> Facts:
    """Return the bytes of parameters and moments in total and per device, but not activations."""

    def bytes_of(size: Callable[[Any], int]) -> Facts:
        trained = size(trainable)
        return {"frozen": size(frozen), "trained": trained, "moments": 2 * trained}

    return bytes_of(_bytes) | {"per_device": bytes_of(bytes_per_device)}


def _tokenizer(stage: Stage, findings: Findings) -> Facts:
    tokenizer, own = stage.tokenizer, _weights(stage.recipe, stage.config)
    name = stage.config.lm or ("text" if stage.config.kind == "vision" else "")
    rows = _vocab_size(stage, findings, name)
    ids = {"bos": [tokenizer.bos_id], "eos": [tokenizer.eos_id], "stop": [*tokenizer.stop_ids]}
    names: dict[int, str] = {}
    if isinstance(tokenizer, PretrainedTokenizer):
        part = stage.recipe.components[name].get("part", "")
        folder = locate(own, f"components.{name}.weights", part).path
        names = _names(folder, {i for group in ids.values() for i in group})
    facts: Facts = {
        "of": name if own else "run", "vocab_size": stage.vocab_size, "exact": stage.exact,
        "embedding": name, "rows": rows,
        "padding_rows": None if rows is None else rows - stage.vocab_size,
    }  # fmt: skip
    if own and not stage.exact:
        return facts
    return facts | {
        kind: [{"id": i, "token": names.get(i, "")} for i in group] for kind, group in ids.items()
    }


def _names(folder: Path, ids: set[int]) -> dict[int, str]:
    """Return what special tokens are called in the tokenizer of a model's folder."""
    spec = read_spec(folder)
    vocab = spec["model"]["vocab"]
    pairs = vocab.items() if isinstance(vocab, dict) else ((p, i) for i, (p, _) in enumerate(vocab))
    names = {i: piece for piece, i in pairs if i in ids}
    return names | {t["id"]: t["content"] for t in spec["added_tokens"] if t["id"] in ids}


def _data(stage: Stage, findings: Findings, name: str) -> Facts:
    data, source = stage.recipe.data[name], findings.sources.get(name)
    row = findings.rows.get(name, {})
    sizes = {key: list(leaf.shape[1:]) for key, leaf in row.items()}
    return {
        "name": name, "task": data.task, "use": _uses(stage.recipe, stage.config, name),
        "examples": None if source is None else len(source), "frames": sizes.get("frames"),
        "decode": data.decode,
        "prompt": sizes["prompt"][0] if row else None, "text": data.text_len,
        "targets": data.target_len or data.text_len,
    }  # fmt: skip


def _uses(recipe: Recipe, config: StageConfig, name: str) -> list[str]:
    train = [f"train {config.data[name]:g}"] if name in config.data else []
    loss = ["loss"] if name in config.loss else []
    return train + loss + [f"eval {e}" for e in config.evals if recipe.evals[e].data == name]


def _shape(leaf: Any) -> Facts:
    return {"dtype": jnp.dtype(leaf.dtype).name, "shape": ["B", *leaf.shape[1:]]}


def _count(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def _bytes(tree: Any) -> int:
    return sum(x.size * itemsize_bits(x.dtype) for x in jax.tree.leaves(tree)) // 8
