"""The model of a stage: its components as modules whose sizes fit together."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vadapter.errors import ConfigError
from vadapter.models.adapter_model import AdapterModel
from vadapter.models.adapters.cross_attention import CrossAttention
from vadapter.models.adapters.projection import Projection
from vadapter.models.adapters.words import Words
from vadapter.models.coca import CoCa
from vadapter.models.lm import LM
from vadapter.models.registry import expand, make_module
from vadapter.recipe.schema import DTYPES, STAGES, Recipe, StageConfig, components, trained

if TYPE_CHECKING:
    from flax import linen as nn


def make_model(recipe: Recipe, stage: StageConfig, vocab_size: int) -> AdapterModel | CoCa:
    """Return the stage's model; a width of 0 becomes that of the language model that follows.

    Raises:
      ConfigError: vocabularies or widths do not fit together.
    """
    dtype = DTYPES[recipe.dtype]
    modules: dict[str, nn.Module] = {}
    # Values for fields that follow from other components; width and depth are of the next LM.
    derived: dict[str, Any] = {"vocab_size": vocab_size, "width": 0, "depth": 0}
    encoder = stage.encoder if STAGES[stage.kind].visual and stage.kind != "vision" else ""
    tokens = 0
    if encoder:
        modules[encoder] = make_module(encoder, recipe.components[encoder], dtype=dtype)
        derived["grid"] = modules[encoder].grid()  # type: ignore[attr-defined]
        tokens = modules[encoder].tokens_per_frame()  # type: ignore[attr-defined]
    for name in reversed(components(stage)):
        if name == encoder:
            continue
        spec = recipe.components[name]
        if stage.exit_layer and name in stage.chain:
            spec = _up_to(stage.exit_layer, name, spec)
        module = make_module(name, spec, dtype=dtype, **derived)
        _check_grid(name, module, encoder, tokens)
        modules[name] = module
        if isinstance(module, LM):
            derived |= {"width": module.config.width, "depth": module.config.depth}
            if name == stage.lm and module.config.vocab_size < vocab_size:
                raise ConfigError(
                    f"components.{name}.vocab_size={module.config.vocab_size} is smaller than the "
                    f"tokenizer's {vocab_size}; set it to 0 to follow the tokenizer"
                )
    if stage.kind == "vision":
        return CoCa(modules)
    _check_chain(stage, modules)
    frozen = stage.lm not in trained(stage)
    return AdapterModel(modules, stage.lm, stage.chain, encoder, stage.bidirectional, frozen)


def _up_to(layer: int, name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a component of the chain, if it is a language model with its first layers alone.

    Raises:
      ConfigError: it has no such layer.
    """
    spec = expand(name, spec)
    if spec["kind"] != "lm":
        return spec
    depth = layer if layer > 0 else spec["depth"] + layer
    if not 1 <= depth <= spec["depth"]:
        raise ConfigError(
            f"exit_layer={layer}: components.{name} has the layers 1 to {spec['depth']}"
        )
    return spec | {"depth": depth}


def _check_grid(name: str, module: Any, encoder: str, tokens: int) -> None:
    """Check that a component that reads the visual tokens as a grid has one of that many tokens."""
    if not getattr(module.config, "needs_grid", False):
        return
    grid = module.config.grid
    if not grid:
        raise ConfigError(
            f"components.{name} reads the visual tokens as a grid, but those of {encoder} are none "
            "(pooled queries, or a class token or registers among them): set its tap to last or "
            f"penultimate and patches_only=True, or components.{name}.grid=(rows, columns)"
        )
    if len(grid) != 2 or math.prod(grid) != tokens:
        raise ConfigError(
            f"components.{name}.grid={tuple(grid)}: {encoder} gives {tokens} tokens a frame, which "
            "rows times columns must be; leave it out to take the encoder's grid"
        )


def _check_chain(stage: StageConfig, modules: "dict[str, nn.Module]") -> None:
    """Check that widths fit together, and that what works on the LLM is last in the chain."""
    if stage.exit_layer and not any(isinstance(modules[name], LM) for name in stage.chain):
        raise ConfigError(
            f"exit_layer={stage.exit_layer}: there is no language model in the stage's chain, "
            f"{', '.join(stage.chain) or 'which is empty'}; leave it out"
        )
    _check_init(stage, modules)
    before, width = "", 0
    for name in (*stage.chain, stage.lm):
        module, config = modules[name], modules[name].config  # type: ignore[attr-defined]
        if isinstance(module, CrossAttention | Words):
            kind = "cross_attention" if isinstance(module, CrossAttention) else "words"
            if name != stage.chain[-1] or stage.lm in trained(stage):
                raise ConfigError(
                    f"components.{name}: a component of kind {kind} works on the frozen LLM; put "
                    "it at the end of the chain of a stage of kind adapter"
                )
        if isinstance(module, LM | Words) and before and width != config.width:
            raise ConfigError(
                f"{before} gives width {width}, but {name} reads {config.width}; put a component "
                "of kind fc between them"
            )
        before, width = name, getattr(config, "query_dim", 0) or config.width


def _check_init(stage: StageConfig, modules: "dict[str, nn.Module]") -> None:
    """Check that there are words for a projection that starts as large as they are."""
    reader = stage.lm
    for name in reversed(stage.chain):
        module, random = modules[name], stage.start.get(name, "random") == "random"
        if isinstance(module, LM):
            reader = name
        if reader == stage.lm or not random or not isinstance(module, Projection):
            continue
        if module.config.init == "words":
            raise ConfigError(
                f"components.{name}.init=words: {reader}, which reads it, has no words in the "
                "chain; use unit"
            )
