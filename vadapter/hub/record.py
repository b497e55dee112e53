"""An exported stage: its files, and the record that says how they fit together.

    config.json                     the record, `Exported`
    model.safetensors               what trained, float32, as `component/path/of/leaf`
    frozen-COMPONENT.safetensors    a frozen part that only the run has, as the stage uses it
    tokenizer.json                  of the stage's language model
    README.md                       the model card

Frozen parts with public weights are not among the files: the record names them and their digest.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vadapter.config import build
from vadapter.data.config import DataConfig
from vadapter.data.media.images import ImageTransform
from vadapter.data.prompts import CAPTION, QUESTION
from vadapter.errors import CheckpointError, ConfigError
from vadapter.io import buckets, storage
from vadapter.recipe.optim import OptimConfig
from vadapter.recipe.schema import Recipe, StageConfig, TokenizerConfig
from vadapter.recipe.schema import read as read_recipe
from vadapter.stages.restore import describing

CONFIG, WEIGHTS, TOKENIZER, CARD = "config.json", "model.safetensors", "tokenizer.json", "README.md"
FORMAT, VERSION = "vadapter-export", 1
PROMPTS = {"caption": dataclasses.asdict(CAPTION), "question": dataclasses.asdict(QUESTION)}

_IMAGES = "images"  # the one data set of a stage that is only used


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A frozen part.

    Attributes:
      digest: of its public files, `sha256:…`, or of its arrays.
      weights: hub id, or folder, of its public weights; "": it lies in a file of the export.
      revision: commit of the hub id.
    """

    digest: str
    weights: str = ""
    revision: str = ""

    @property
    def place(self) -> str:
        """Hub id with its commit, or folder."""
        return f"{self.weights}@{self.revision}" if self.revision else self.weights


@dataclasses.dataclass(frozen=True)
class Exported:
    """A stage as others need it to use it.

    Attributes:
      format, version: of the export; vadapter: what wrote it.
      stage, kind, step: the stage's name, its row of `STAGES`, and how far it was trained.
      lm, chain, encoder, bidirectional: how the components are joined, see `StageConfig`.
      dtype: of the computation and of frozen parameters.
      components: name -> kind and fields, without weights.
      trained: name -> digest of what `model.safetensors` holds of it; frozen: the others.
      view: what becomes of an image on the host; clip_frames: of a clip.
      prompts: the words around the image; tokenizer: its digest.
    """

    format: str
    version: int
    vadapter: str
    stage: str
    kind: str
    step: int
    lm: str
    chain: tuple[str, ...]
    encoder: str
    bidirectional: bool
    dtype: str
    components: dict[str, dict[str, Any]]
    trained: dict[str, str]
    frozen: dict[str, Frozen]
    view: ImageTransform
    clip_frames: int
    prompts: dict[str, dict[str, str]]
    tokenizer: str

    def recipe(self) -> Recipe:
        """A recipe of this stage alone, with places for its public weights and none for data.

        Raises:
          ConfigError: parts that do not fit together, or a stage that does not describe images.
        """
        data = DataConfig(
            source={}, task="caption", text_len=1, size=self.view.size, fit=self.view.fit,
            frames=self.clip_frames,
        )  # fmt: skip
        stage = StageConfig(
            kind=self.kind, steps=max(self.step, 1), batch=1, data={_IMAGES: 1.0}, lm=self.lm,
            chain=self.chain, encoder=self.encoder, bidirectional=self.bidirectional,
            optim=OptimConfig(warmup=0),
        )  # fmt: skip
        places = {n: {"weights": part.place} for n, part in self.frozen.items() if part.weights}
        recipe = read_recipe(
            {
                "name": self.stage,
                "components": {n: spec | places.get(n, {}) for n, spec in self.components.items()},
                "data": {_IMAGES: data},
                "stages": {self.stage: stage},
                "chain": (self.stage,),
                "tokenizer": TokenizerConfig(),
                "dtype": self.dtype,
            }
        )
        if not describing(recipe):
            raise ConfigError(f"kind {self.kind!r} does not write about images")
        return recipe


def frozen_file(component: str) -> str:
    """The name of the file with a frozen part that has no public weights."""
    return f"frozen-{component}.safetensors"


def files(exported: Exported) -> tuple[str, ...]:
    """The names of all files of an export."""
    own = (frozen_file(name) for name, part in exported.frozen.items() if not part.weights)
    return (CONFIG, WEIGHTS, *own, TOKENIZER, CARD)


def is_export(folder: Path) -> bool:
    """Whether a folder holds an export, of whatever version."""
    folder = storage.as_path(folder)
    buckets.require_bucket(folder)
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8"))["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read(folder: Path) -> Exported:
    """The record of an export, checked.

    Raises:
      CheckpointError: none there, damaged, or of a newer version than this one reads.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"no exported adapter in {folder}: there is no {CONFIG}. Give a folder that `vadapter "
            "export` wrote, or the hub id of one"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); fetch it again") from None
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not the record of an exported adapter; of a run, make one with `vadapter "
            f"export {folder} DIR`"
        )
    version = values.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise CheckpointError(
            f"{path}: format version {version!r}, written by vadapter {values.get('vadapter')}; "
            f"this one reads up to {VERSION}. Update it: pip install -U vadapter"
        )
    try:
        exported = build(Exported, values, where=CONFIG)
    except ConfigError as error:
        raise CheckpointError(f"{path} is damaged: {error}; fetch it again") from None
    if exported.prompts != PROMPTS:
        raise CheckpointError(
            f"{path}: trained with other prompts than those of this vadapter; install vadapter "
            f"{exported.vadapter}, which wrote it"
        )
    return exported
