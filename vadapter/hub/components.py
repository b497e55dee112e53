"""`vadapter export --components`: finished components as weights for other recipes.

    recipe.json             what trained them: `vadapter train --config=recipe.json --workdir=RUN`
    NAME/config.json        `component`, the spec; `sha256`, of the weights; how it was trained
    NAME/model.safetensors  the parameters under the paths of their leaves
    NAME/tokenizer.json     of a language model

A recipe reads NAME as `components.NAME.weights`, see `weights.families.exported`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from vadapter import __version__
from vadapter.checkpoints.component_store import ComponentStore
from vadapter.config import plain, require_one_of
from vadapter.console import listing, size
from vadapter.data.tokenizers import Tokenizer
from vadapter.data.tokenizers.pretrained import load_tokenizer
from vadapter.errors import ConfigError
from vadapter.hub.write import replacing
from vadapter.io import storage
from vadapter.io.json_files import COMPONENT_FORMAT, history, write_json
from vadapter.models.registry import expand
from vadapter.recipe.arms import only
from vadapter.recipe.schema import DTYPES, Recipe, trained
from vadapter.stages import initialization
from vadapter.stages.restore import read_run
from vadapter.stages.run import tokenizer_path
from vadapter.weights.reference import FORMATS

RECIPE, CONFIG, WEIGHTS, TOKENIZER = (
    "recipe.json", "config.json", "model.safetensors", "tokenizer.json",
)  # fmt: skip


def export(run: Path, names: Sequence[str], folder: Path, dtype: str = "float32") -> None:
    """Write components, each named STAGE/NAME, of a run's finished stages to a folder, atomically.

    The folder must not exist, or be an earlier one of components, which is replaced.

    Raises:
      ConfigError: a name is not STAGE/NAME, a stage does not train the component, weights of its
        kind are not read; or a folder with anything else.
      CheckpointError: there is no run, a stage is not finished, or its component is corrupt.
    """
    run, target = storage.absolute(run), storage.local(folder, "folder").resolve()
    recipe = read_run(run)
    chosen = [_parse(recipe, name) for name in names]
    if repeated := [
        name for i, (_, name) in enumerate(chosen) if name in dict(chosen[:i]).values()
    ]:
        raise ConfigError(f"--components: {listing(repeated, 4)} twice")
    commands = [
        f"vadapter train --config={RECIPE} --workdir=RUN",
        f"vadapter export RUN DIR --components={','.join(names)} --dtype={dtype}",
    ]
    with replacing(target, _check_target) as part:
        for stage, name in chosen:
            record = _write(part / name, recipe, run, stage, name, dtype)
            write_json(part / name / CONFIG, {**record, "commands": commands})
        write_json(part / RECIPE, plain(_with_starts(recipe, [stage for stage, _ in chosen])))


def report(folder: Path) -> str:
    """Return the files of a folder of components with their sizes."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    names = [f"  {path.relative_to(folder)}" for path in files]
    width = max(map(len, names))
    sizes = [size(path.stat().st_size) for path in files]
    rows = (f"{name:<{width}} {text:>10}" for name, text in zip(names, sizes, strict=True))
    return "\n".join([str(folder), *rows])


def _parse(recipe: Recipe, text: str) -> tuple[str, str]:
    """Return stage and component of STAGE/NAME."""
    stage, _, name = text.partition("/")
    key = f"--components={text}"
    if not name:
        raise ConfigError(f"{key}: expected STAGE/NAME, such as vision/encoder")
    require_one_of(f"{key}: stage {stage!r}", stage, recipe.stages)
    require_one_of(f"{key}: {name!r} of {stage}", name, trained(recipe.stages[stage]))
    if (kind := expand(name, recipe.components[name])["kind"]) not in FORMATS:
        raise ConfigError(f"{key}: weights are read for {', '.join(FORMATS)}, not for kind {kind}")
    return stage, name


def _check_target(target: Path) -> None:
    """Raise ConfigError if anything other than earlier components would be replaced."""
    if not (target.exists() or target.is_symlink()):
        return
    known = {RECIPE, *(path.parent.name for path in target.glob(f"*/{WEIGHTS}"))}
    others = sorted({path.name for path in target.iterdir()} - known) if target.is_dir() else []
    if others or not (target / RECIPE).is_file():
        raise ConfigError(
            f"{target} exists and is not a folder of components"
            + (f" alone ({listing(others, 4)})" if others else "")
            + ": choose a folder that does not exist yet"
        )


def _write(
    folder: Path, recipe: Recipe, run: Path, stage: str, name: str, dtype: str
) -> dict[str, Any]:
    """Write weights and tokenizer of one component; return its record."""
    config, directory = recipe.stages[stage], run / stage
    done = initialization.finished(directory)
    digest = done["components"][name]
    leaves = _read(ComponentStore(run / initialization.STORE), name, digest)
    folder.mkdir(parents=True)
    save_file({path: _cast(x, dtype) for path, x in leaves.items()}, folder / WEIGHTS)
    tokenizer = None
    if name == config.lm:
        tokenizer = load_tokenizer(tokenizer_path(recipe, config, run))
        tokenizer.save(folder / TOKENIZER)
    losses = [row["loss"] for row in history(directory / "metrics.jsonl") if "loss" in row]
    return {
        "model_type": COMPONENT_FORMAT,
        "component": _spec(done["identity"]["components"][name], tokenizer),
        "sha256": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
        "tokenizer": tokenizer and tokenizer.digest,
        "dtype": dtype,
        "vadapter": __version__,
        "stage": stage,
        "steps": done["steps"],
        "seconds": done["seconds"],
        "training_loss": losses[-1] if losses else None,
        "held_out": done["scores"],
        "digest_in_run": digest,
    }


def _read(store: ComponentStore, name: str, digest: str) -> dict[str, np.ndarray]:
    """Return the leaves of a stored component by path, verified."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = {
        path: jax.ShapeDtypeStruct(shape, dtype, sharding=here)
        for path, (shape, dtype) in store.describe(name, digest).items()
    }
    read = store.get(name, digest, abstract)
    return {path.replace(".", "/"): np.asarray(x) for path, x in read.items()}


def _cast(x: np.ndarray, dtype: str) -> np.ndarray:
    return x.astype(DTYPES[dtype]) if np.issubdtype(x.dtype, np.floating) else x


def _spec(spec: Mapping[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the spec of a component as other recipes need it: with the size of its vocabulary."""
    filled = expand("", spec)
    filled.pop("part", None)  # which it was of the checkpoint that it started from
    if tokenizer is not None and not filled.get("vocab_size"):
        filled["vocab_size"] = tokenizer.vocab_size
    return filled


def _with_starts(recipe: Recipe, stages: Sequence[str]) -> Recipe:
    """Return the recipe of some stages and of those that they start from."""
    needed = set(stages)
    for name in reversed(recipe.chain):
        if name in needed:
            needed |= set(recipe.stages[name].start.values()) & set(recipe.chain)
    return only(recipe, tuple(name for name in recipe.chain if name in needed))
