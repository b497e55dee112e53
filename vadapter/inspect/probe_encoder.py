"""`vadapter inspect RUN --probe`: what can be read of the tokens of frozen encoders, by fact.

Generated scenes are drawn once, encoded by each encoder once, and probed, see `token_probes`.

Legend: n scenes, F frames, N visual tokens a frame, D encoder width.
"""

import csv
import gc
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import vadapter
from vadapter.checkpoints.digest import combined, tree_digests
from vadapter.checkpoints.manager import steps
from vadapter.distributed import hosts
from vadapter.distributed.compile import jit
from vadapter.errors import CheckpointError, ConfigError
from vadapter.inspect import token_probes
from vadapter.inspect.attention import grid_of
from vadapter.inspect.probe import parse_numbers
from vadapter.inspect.scene_labels import HELD_OUT, TRAIN, Pixels, draw, open_scenes
from vadapter.inspect.token_probes import Found, Tokens
from vadapter.io import storage
from vadapter.metrics import bootstrap
from vadapter.report.table import with_interval
from vadapter.stages.restore import open_encoder
from vadapter.stages.stage import Stage

SCENES = 4000  # images that probes are trained on
_HELD_OUT, _CLIPS = 1 / 4, 1 / 2  # held-out scenes for each of training, clips for each image
_FRAMES = 64  # of a batch of the encoder
FACTS = ("color", "shape", "size", "place", "count", "motion")
PROBES = ("linear", "attention")
HEADER = ("encoder", "stage", "step", "fact", *(f"{x}, %" for p in PROBES for x in (p, "majority")))
COLUMNS = (
    "label", "run", "stage", "step", "digest", "probe", "fact", "accuracy", "low", "high",
    "majority", "items",
)  # fmt: skip

Facts = dict[str, Any]  # what becomes JSON
Drawn = dict[str, dict[tuple[str, str], Pixels]]  # of one kind at most: by medium and split


class Target(NamedTuple):
    """An encoder to probe: that of a stage of a run, at a step; None: the newest checkpoint."""

    label: str
    workdir: Path
    stage: str | None
    step: int | None


def find(folders: Sequence[Path], stage: str | None, which: str) -> list[Target]:
    """Return the encoders to probe.

    Args:
      folders: run directories.
      stage: of every run; None: the last that sees images.
      which: steps whose checkpoints are probed, `100,200`; `all`: those that exist; "": the newest.

    Raises:
      ConfigError: steps that are no numbers, or without a stage.
      CheckpointError: no checkpoint of the stage.
    """
    if which and stage is None:
        raise ConfigError(f"--steps={which}: say of which stage, for example --stage=vision")
    targets = []
    for folder in folders:
        label = storage.absolute(folder).name
        chosen: Sequence[int | None] = [None]
        if which == "all":
            directory = storage.as_path(folder) / str(stage) / "checkpoints"
            chosen = steps(directory)
            if not chosen:
                raise CheckpointError(f"no checkpoint in {directory}: train that stage first")
        elif which:
            chosen = parse_numbers("--steps", which)
        targets += [Target(label, folder, stage, step) for step in chosen]
    return targets


def probe(
    targets: Sequence[Target], scenes: int = SCENES, overrides: Sequence[str] = (),
    say: Callable[[str], Any] = lambda text: None,
) -> Facts:  # fmt: skip
    """Return what probes find in the tokens of encoders, by fact.

    Args:
      scenes: images to train on; see `_HELD_OUT` and `_CLIPS` for the others.
      overrides: see `read_run`.
      say: is called with a line before each encoder.

    Raises:
      UserError: a run cannot be read, or has no generated scenes.
    """
    if hosts.count() > 1:
        raise ConfigError("`vadapter inspect` runs on one host; it uses all devices of that host")
    drawn: Drawn = {}
    encoders = []
    for target in targets:
        start = time.monotonic()
        stage = open_encoder(target.workdir, target.stage, step=target.step, overrides=overrides)
        say(f"probing {target.label}: encoder of stage {stage.name}, step {stage.step}")
        encoders.append(_probe(target, stage, scenes, drawn))
        encoders[-1]["seconds"] = round(time.monotonic() - start, 1)
        del stage
        gc.collect()
    return {
        "format": "vadapter-probe",
        "version": 1,
        "vadapter": vadapter.__version__,
        "encoders": encoders,
    }


def _probe(target: Target, stage: Stage, scenes: int, drawn: Drawn) -> Facts:
    """Return the record of one encoder; `drawn` has the scenes of the one before it."""
    component = stage.config.encoder
    module: Any = stage.model.modules[component]
    if getattr(module.config, "tubelet", 0):  # reversed tokens are not those of a reversed clip
        raise ConfigError(
            f"components.{component}: it sees clips as a whole, and --probe reads tokens of frames"
        )
    name, source = open_scenes(stage)
    config = stage.recipe.data[name]
    params, view = stage.params[component], config.view(module.view)
    key = repr((source.size, source.seed, config.frames, view))
    if key not in drawn:
        drawn.clear()
        drawn[key] = {
            (media, split): draw(source, media, split, count, config, view)
            for media, split, count in _counts(scenes)
        }
    encode = _encoder(module, params)
    tokens = {of: Tokens(encode(x.frames), x.labels) for of, x in drawn[key].items()}
    probes = _read(tokens, grid_of(module))
    return {
        "label": target.label,
        "run": str(stage.workdir),
        "stage": stage.name,
        "step": stage.step,
        "encoder": component,
        "trained": component in stage.trained,
        "digest": stage.digests.get(component) or combined(tree_digests(params)),
        "tokens": list(tokens["image", TRAIN].tokens.shape[2:]),  # N, D
        "data": name,
        "scenes": {" ".join(of): len(x.frames) for of, x in drawn[key].items()},
        "probes": {probe: _record(found) for probe, found in probes.items()},
    }


def _counts(scenes: int) -> Iterator[tuple[str, str, int]]:
    """Yield medium, split and number of scenes."""
    for media, of_media in (("image", 1.0), ("clip", _CLIPS)):
        for split, of_split in ((TRAIN, 1.0), (HELD_OUT, _HELD_OUT)):
            yield media, split, max(1, round(scenes * of_media * of_split))


def _read(
    tokens: Mapping[tuple[str, str], Tokens], grid: tuple[int, ...]
) -> dict[str, dict[str, Found]]:
    """Return what each probe reads of tokens, which are scaled in place."""
    images, held_images, clips, held_clips = (
        tokens[media, split] for media in ("image", "clip") for split in (TRAIN, HELD_OUT)
    )
    scale = token_probes.scale_of(images.tokens)
    for each in tokens.values():
        token_probes.rescale(each.tokens, scale)
    linear = token_probes.linear_image(images, held_images, grid)
    attended, layer = token_probes.attention(images, held_images, grid)
    motion, _ = token_probes.attention(clips, held_clips, grid, layer)
    return {
        "linear": linear | token_probes.linear_clip(clips, held_clips),
        "attention": attended | motion,
    }


def _encoder(module: Any, params: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from frames u8[n,F,S,S,3] to tokens float16[n,F,N,D]."""
    program = jit(lambda params, frames: module.apply({"params": params}, frames))

    def encode(frames: np.ndarray) -> np.ndarray:
        size = max(1, _FRAMES // frames.shape[1])
        parts = []
        for start in range(0, len(frames), size):
            rows = token_probes.filled(frames[start : start + size], size)
            parts.append(jax.device_get(program(params, rows)).astype(np.float16))
        return np.concatenate(parts)[: len(frames)]

    return encode


def _record(found: Mapping[str, Found]) -> Facts:
    """Return accuracy, 95 % interval over scenes, that of the most frequent class, and items."""
    ends = bootstrap.intervals({fact: each.sample for fact, each in found.items()})
    return {
        fact: {
            "accuracy": found[fact].sample.value,
            "interval": ends.get(fact),
            "majority": found[fact].majority,
            "items": len(found[fact].sample.items),
        }
        for fact in FACTS
        if fact in found
    }


# -- files -----------------------------------------------------------------------------------------


def rows(record: Facts) -> list[tuple[str, ...]]:
    """Return a row per encoder and fact, in the columns of `HEADER`; — is not measured."""
    table = []
    for each in record["encoders"]:
        for fact in FACTS:
            cells = []
            for name in PROBES:
                found = each["probes"][name].get(fact)
                cells += ["—", "—"] if found is None else [
                    with_interval(found["accuracy"], found["interval"]),
                    f"{100 * found['majority']:.1f}",
                ]  # fmt: skip
            table.append((each["label"], each["stage"], str(each["step"]), fact, *cells))
    return table


def csv_text(record: Facts) -> str:
    """Return a row per encoder, probe and fact, in the columns of `COLUMNS`."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for each in record["encoders"]:
        for name in PROBES:
            for fact, found in each["probes"][name].items():
                low, high = found["interval"] or ("", "")
                own = [each[key] for key in ("label", "run", "stage", "step", "digest")]
                numbers = found["accuracy"], low, high, found["majority"], found["items"]
                writer.writerow([*own, name, fact, *numbers])
    return file.getvalue()


def write(out: Path, record: Facts) -> list[Path]:
    """Write the JSON file, and the CSV file beside it; return both."""
    table = out.with_suffix(".csv")
    storage.write_bytes(table, csv_text(record).encode())
    storage.write_bytes(out, f"{json.dumps(record)}\n".encode())
    return [out, table]
