"""`vadapter export`: a trained stage as a folder to share, see `study.exported`."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from vadapter import __version__
from vadapter.checkpoints.digest import combined, tree_digests
from vadapter.config import plain
from vadapter.console import size
from vadapter.errors import CheckpointError, ConfigError
from vadapter.evaluate.describe import image_settings
from vadapter.hub.model_card import card
from vadapter.hub.record import (
    CARD,
    CONFIG,
    FORMAT,
    PROMPTS,
    TOKENIZER,
    VERSION,
    WEIGHTS,
    Exported,
    Frozen,
    files,
    frozen_file,
    is_export,
    read,
)
from vadapter.io import storage
from vadapter.models.registry import expand
from vadapter.recipe.schema import trained
from vadapter.stages.restore import Loaded, describing
from vadapter.weights.hf_checkpoint import locate
from vadapter.weights.reference import PREFIX


def export(loaded: Loaded, folder: Path) -> dict[str, int]:
    """Writes a stage to a folder that appears whole or not at all.

    The same checkpoint always gives the same bytes.

    Args:
      loaded: a stage that writes about images.
      folder: not there yet, or an earlier export, which is replaced.

    Returns:
      The files, each with its size in bytes.

    Raises:
      ConfigError: a stage without images, a folder that holds anything else.
      CheckpointError: public weights that are not where the recipe says.
    """
    target = storage.local(folder, "folder").resolve()
    if loaded.view is None:
        raise ConfigError(
            f"stage {loaded.stage} reads text alone; choose one that sees images: "
            f"{', '.join(describing(loaded.recipe))}"
        )
    part, old = (target.with_name(f".{target.name}.{word}") for word in ("part", "old"))
    _restore(old, target)  # of an export that was killed
    _check_target(target)
    exported = record(loaded)
    for rest in (part, old):
        shutil.rmtree(rest, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        _write(part, loaded, exported)
        if target.exists():
            target.rename(old)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        _restore(old, target)
    shutil.rmtree(old, ignore_errors=True)
    return {name: (target / name).stat().st_size for name in files(exported)}


def record(loaded: Loaded) -> Exported:
    """What is to be known of the stage, see `Exported`."""
    view, clip_frames = image_settings(loaded)
    config, model = loaded.config, loaded.model
    specs = {name: expand(name, loaded.recipe.components[name]) for name in model.names()}
    return Exported(
        format=FORMAT,
        version=VERSION,
        vadapter=__version__,
        stage=loaded.stage,
        kind=config.kind,
        step=loaded.step,
        lm=model.lm,
        chain=model.chain,
        encoder=model.encoder,
        bidirectional=model.bidirectional,
        dtype=loaded.recipe.dtype,
        components={
            name: {key: plain(value) for key, value in sorted(spec.items()) if key != "weights"}
            for name, spec in specs.items()
        },
        trained={name: combined(tree_digests(loaded.params[name])) for name in trained(config)},
        frozen={name: _frozen(loaded, name) for name in loaded.digests},
        view=view,
        clip_frames=clip_frames,
        prompts=PROMPTS,
        tokenizer=loaded.tokenizer.digest,
    )


def _frozen(loaded: Loaded, name: str) -> Frozen:
    if not loaded.digests[name].startswith(PREFIX):
        return Frozen(combined(tree_digests(loaded.params[name])))
    weights = loaded.recipe.components[name]["weights"]
    found = locate(weights, f"components.{name}.weights")
    return Frozen(loaded.digests[name], found.repo_id or weights, found.revision)


def _restore(old: Path, target: Path) -> None:
    """Undoes a replacement that stopped between its two renames."""
    if old.exists() and not target.exists():
        old.rename(target)


def _check_target(target: Path) -> None:
    """Nothing but an earlier export is ever replaced."""
    if not (target.exists() or target.is_symlink()):
        return
    if not is_export(target):
        raise ConfigError(
            f"{target} is there already and is no earlier export: name a folder that does not "
            "exist yet"
        )
    try:
        known = set(files(read(target)))
    except CheckpointError:  # damaged, or of a newer version: its card and weights at least
        known = {CONFIG, WEIGHTS, TOKENIZER, CARD}
    if others := sorted({path.name for path in target.iterdir()} - known):
        raise ConfigError(
            f"{target} holds more than an export ({', '.join(others[:4])}), which would be lost: "
            "move that away, or name another folder"
        )


def _write(folder: Path, loaded: Loaded, exported: Exported) -> None:
    trainable = {name: loaded.params[name] for name in exported.trained}
    own = [name for name, part in exported.frozen.items() if not part.weights]
    _save(folder / WEIGHTS, trainable)
    for name in own:
        _save(folder / frozen_file(name), {name: loaded.params[name]})
    loaded.tokenizer.save(folder / TOKENIZER)
    (folder / CONFIG).write_text(json.dumps(plain(exported), indent=1) + "\n", encoding="utf-8")
    (folder / CARD).write_text(card(loaded, exported), encoding="utf-8")


def _save(path: Path, trees: Mapping[str, Any]) -> None:
    leaves = traverse_util.flatten_dict(dict(trees), sep="/")
    save_file({name: np.asarray(jax.device_get(x)) for name, x in leaves.items()}, path)


def report(folder: Path, sizes: Mapping[str, int]) -> str:
    """An export's files with their sizes, and what is not among them."""
    lines = [str(folder), *(f"  {name:<32} {size(count):>10}" for name, count in sizes.items())]
    for name, part in read(folder).frozen.items():
        if part.weights:
            lines.append(f"  {name}: not enclosed, it is {part.place}")
        if part.weights and not part.revision:
            lines.append(
                "    a folder of this machine; for others to find it, export with its hub id,\n"
                f"    --config.components.{name}.weights=OWNER/NAME"
            )
    return "\n".join(lines)
