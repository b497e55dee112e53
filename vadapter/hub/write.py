"""`vadapter export`: a trained stage as a folder to share, see `hub.record`."""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from vadapter import __version__
from vadapter.checkpoints.digest import combined, tree_digests
from vadapter.config import plain
from vadapter.console import listing, size
from vadapter.errors import CheckpointError, ConfigError
from vadapter.evaluate.describe import image_settings, require_images
from vadapter.hub import record
from vadapter.hub.model_card import model_card
from vadapter.hub.record import Exported, Frozen, frozen_file
from vadapter.io import storage
from vadapter.io.json_files import EXPORT_FORMAT, is_export, write_json
from vadapter.models.paths import flatten
from vadapter.models.registry import expand
from vadapter.stages.stage import Stage
from vadapter.weights.hf_checkpoint import locate
from vadapter.weights.hub import PACKAGED
from vadapter.weights.reference import PREFIX


def export(loaded: Stage, folder: Path) -> None:
    """Write a stage to a folder, atomically; the same checkpoint always gives the same bytes.

    The folder must not exist, or be an earlier export, which is replaced.

    Raises:
      ConfigError: a text-only stage, or a folder with anything other than an export.
      CheckpointError: public weights are not where the recipe says.
    """
    target = storage.local(folder, "folder").resolve()
    require_images(loaded)
    with replacing(target, _check_target) as part:
        _write(part, loaded, _record(loaded))


@contextlib.contextmanager
def replacing(target: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """Yield a new folder that replaces `target` at the end, unless an exception is raised.

    `check` raises if the target must not be replaced. A replacement that a kill has interrupted is
    undone first.
    """
    part, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("part", "old"))
    _undo_replacement(old, target)
    check(target)
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if target.exists():
            target.rename(old)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        _undo_replacement(old, target)
    shutil.rmtree(old, ignore_errors=True)


def _record(loaded: Stage) -> Exported:
    view, clip_frames = image_settings(loaded)
    model = loaded.adapter_model
    specs = {name: expand(name, loaded.recipe.components[name]) for name in model.names()}
    return Exported(
        format=EXPORT_FORMAT, version=record.VERSION, vadapter=__version__,
        stage=loaded.name, kind=loaded.config.kind, step=loaded.step,
        lm=model.lm, chain=model.chain, encoder=model.encoder, bidirectional=model.bidirectional,
        dtype=loaded.recipe.dtype,
        components={
            name: {key: plain(value) for key, value in sorted(spec.items()) if key != "weights"}
            for name, spec in specs.items()
        },
        trained={name: combined(tree_digests(loaded.params[name])) for name in loaded.trained},
        frozen={name: _frozen(loaded, name) for name in loaded.digests},
        view=view, clip_frames=clip_frames, prompts=record.PROMPTS,
        tokenizer=loaded.tokenizer.digest, exit_layer=loaded.config.exit_layer,
    )  # fmt: skip


def _frozen(loaded: Stage, name: str) -> Frozen:
    if not loaded.digests[name].startswith(PREFIX):
        return Frozen(combined(tree_digests(loaded.params[name])))
    spec = loaded.recipe.components[name]
    weights = spec["weights"]
    checkpoint = locate(weights, f"components.{name}.weights", spec.get("part", ""))
    return Frozen(loaded.digests[name], checkpoint.repo_id or weights, checkpoint.revision)


def _undo_replacement(old: Path, target: Path) -> None:
    """Restore the earlier export if a replacement stopped between its two renames."""
    if old.exists() and not target.exists():
        old.rename(target)


def _check_target(target: Path) -> None:
    """Raise ConfigError if anything other than an earlier export would be replaced."""
    if not (target.exists() or target.is_symlink()):
        return
    if not is_export(target):
        raise ConfigError(
            f"{target} exists and is not an export: choose a folder that does not exist yet"
        )
    try:
        names = set(record.files(record.read(target)))
    except CheckpointError:  # corrupt or newer: these files at least are part of any export
        names = {record.CONFIG, record.WEIGHTS, record.TOKENIZER, record.CARD}
    if others := sorted({path.name for path in target.iterdir()} - names):
        raise ConfigError(
            f"{target} has files that are not part of the export and would be lost "
            f"({listing(others, 4)}): move them, or choose another folder"
        )


def _write(folder: Path, loaded: Stage, exported: Exported) -> None:
    _save(folder / record.WEIGHTS, {name: loaded.params[name] for name in exported.trained})
    for name, part in exported.frozen.items():
        if not part.weights:
            _save(folder / frozen_file(name), {name: loaded.params[name]})
    loaded.tokenizer.save(folder / record.TOKENIZER)
    # As earlier versions read it, which do not know every key: images of an export are always
    # decoded exactly, and most adapters use all layers.
    values = plain(exported) | {"view": exported.view.fields}
    if not exported.exit_layer:
        del values["exit_layer"]
    write_json(folder / record.CONFIG, values)
    (folder / record.CARD).write_text(model_card(loaded, exported), encoding="utf-8")


def _save(path: Path, trees: Mapping[str, Any]) -> None:
    leaves = flatten(dict(trees))
    save_file({name: np.asarray(jax.device_get(x)) for name, x in leaves.items()}, path)


def report(folder: Path) -> str:
    """Return a summary of an export: its files, and the components it refers to."""
    exported, lines = record.read(folder), [str(folder)]
    for name in record.files(exported):
        lines.append(f"  {name:<32} {size((folder / name).stat().st_size):>10}")
    for name, part in exported.public().items():
        lines.append(f"  {name}: not included, public weights {part.location}")
        if not part.revision and not part.weights.startswith(PACKAGED):
            lines.append(
                "    a local folder; to make it available to others, export with its hub id:\n"
                f"    --config.components.{name}.weights=OWNER/NAME"
            )
    return "\n".join(lines)
