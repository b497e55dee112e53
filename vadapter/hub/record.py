"""The record of an exported stage, and the files of the export.

    config.json                     the record, `Exported`
    model.safetensors               trained components in float32, as `component/path/of/leaf`
    frozen-COMPONENT.safetensors    a frozen component without public weights, as the stage uses it
    tokenizer.json                  of the stage's language model
    README.md                       the model card

Frozen components with public weights are not included: the record has their source and digest.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vadapter.config import build
from vadapter.data.config import DataConfig
from vadapter.data.image_transform import ImageTransform
from vadapter.data.prompts import CAPTION, QUESTION
from vadapter.errors import CheckpointError, ConfigError
from vadapter.io.json_files import EXPORT_FORMAT
from vadapter.recipe.optim import OptimConfig
from vadapter.recipe.schema import Recipe, StageConfig, TokenizerConfig
from vadapter.recipe.schema import read as read_recipe
from vadapter.stages.restore import describing

CONFIG, WEIGHTS, TOKENIZER, CARD = "config.json", "model.safetensors", "tokenizer.json", "README.md"
VERSION = 1
PROMPTS = {"caption": dataclasses.asdict(CAPTION), "question": dataclasses.asdict(QUESTION)}

_IMAGES = "images"  # a recipe needs a data set, for the image transform; it is never opened


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A frozen component."""

    digest: str  #: of its public files, `sha256:…`, or of its arrays
    weights: str = ""  #: hub id or folder of its public weights; "": they are in the export
    revision: str = ""  #: commit of the hub id

    @property
    def location(self) -> str:
        """The hub id with its commit, or the folder."""
        return f"{self.weights}@{self.revision}" if self.revision else self.weights


@dataclasses.dataclass(frozen=True)
class Exported:
    """The content of config.json.

    Attributes:
      version: of the format.
      vadapter: version of the package that wrote the export.
      kind, lm, chain, encoder, bidirectional, exit_layer: of the stage, see `StageConfig`.
      dtype: of computation and frozen parameters.
      components: name -> kind and fields, without weights.
      trained: name -> digest of its arrays in model.safetensors.
      view: how images are transformed on the host.
      prompts: the text around the image.
      tokenizer: its digest.
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
    exit_layer: int = 0

    def public(self) -> dict[str, Frozen]:
        """Return the frozen components with public weights."""
        return {name: part for name, part in self.frozen.items() if part.weights}

    def recipe(self) -> Recipe:
        """Return a recipe with this stage alone.

        Raises:
          ConfigError: components that do not fit together, or a stage that cannot describe images.
        """
        data = DataConfig(
            source={}, task="caption", text_len=1, size=self.view.size, fit=self.view.fit,
            frames=self.clip_frames,
        )  # fmt: skip
        stage = StageConfig(
            kind=self.kind, steps=max(self.step, 1), batch=1, data={_IMAGES: 1.0}, lm=self.lm,
            chain=self.chain, encoder=self.encoder, bidirectional=self.bidirectional,
            exit_layer=self.exit_layer,
            optim=OptimConfig(warmup=0),
        )  # fmt: skip
        weights = {name: {"weights": part.location} for name, part in self.public().items()}
        recipe = read_recipe({
            "name": self.stage,
            "components": {n: spec | weights.get(n, {}) for n, spec in self.components.items()},
            "data": {_IMAGES: data}, "stages": {self.stage: stage}, "chain": (self.stage,),
            "tokenizer": TokenizerConfig(), "dtype": self.dtype,
        })  # fmt: skip
        if not describing(recipe):
            raise ConfigError(f"a stage of kind {self.kind!r} does not generate text about images")
        return recipe


def frozen_file(component: str) -> str:
    """Return the name of the file of a frozen component without public weights."""
    return f"frozen-{component}.safetensors"


def files(exported: Exported) -> tuple[str, ...]:
    """Return the names of all files of an export."""
    included = [frozen_file(name) for name in exported.frozen if name not in exported.public()]
    return (CONFIG, WEIGHTS, *included, TOKENIZER, CARD)


def read(folder: Path) -> Exported:
    """Return the validated record of an export.

    Raises:
      CheckpointError: the record is missing, corrupt, or of a newer version of the format.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"no exported adapter in {folder}: {CONFIG} is missing. Pass a folder that `vadapter "
            "export` wrote, or the hub id of an export"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, Mapping) or values.get("format") != EXPORT_FORMAT:
            raise CheckpointError(
                f"{path} is not the record of an exported adapter; if {folder} is a run, export it "
                f"first: `vadapter export {folder} DIR`"
            )
        version = values.get("version")
        if not isinstance(version, int) or version > VERSION:
            raise CheckpointError(
                f"{path} has format version {version!r}, written by vadapter "
                f"{values.get('vadapter')}; this vadapter reads up to version {VERSION}. Upgrade: "
                "pip install -U vadapter"
            )
        exported = build(Exported, values, CONFIG)
    except (ValueError, ConfigError) as error:
        raise CheckpointError(f"{path} is corrupt: {error}; download it again") from None
    if exported.prompts != PROMPTS:
        raise CheckpointError(
            f"{path}: the adapter was trained with prompts other than those of this vadapter; "
            f"install vadapter {exported.vadapter}, which wrote it"
        )
    return exported
