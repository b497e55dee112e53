"""What the components of a stage must be able to do: read images, write text, join the two."""

from vadapter.errors import ConfigError
from vadapter.models.registry import ENCODERS, expand
from vadapter.recipe.schema import COCA, Recipe, StageConfig, components

_ENCODER = "a vision encoder, such as google/siglip-so400m-patch14-384"
_LLM = "a language model, such as HuggingFaceTB/SmolLM2-135M"


def check_roles(place: str, recipe: Recipe, stage: StageConfig) -> None:
    """Raise ConfigError if a component cannot do its part; `place` names the stage.

    Public weights may hold another kind of model than the recipe takes them for.
    """
    kinds = {name: expand(name, recipe.components[name])["kind"] for name in components(stage)}
    encoder = COCA[0] if stage.kind == "vision" else stage.encoder
    if encoder in kinds and kinds[encoder] not in ENCODERS:
        role = f"reads no images; an encoder is of kind {' or '.join(ENCODERS)}"
        _fail(place, recipe, encoder, kinds, role, _ENCODER)
    if kinds.get(stage.lm, "lm") != "lm":
        role = "writes no text; a language model is of kind lm"
        _fail(place, recipe, stage.lm, kinds, role, _LLM)
    for name in (name for name in stage.chain if kinds.get(name) in ENCODERS):
        role = "reads images; what comes between encoder and LLM reads visual tokens"
        _fail(place, recipe, name, kinds, role, _LLM)


def _fail(
    place: str, recipe: Recipe, name: str, kinds: dict[str, str], role: str, instead: str
) -> None:
    weights = recipe.components[name].get("weights")
    instead = f". In place of weights={weights!r} give {instead}" if weights else ""
    raise ConfigError(f"{place}: components.{name} is of kind {kinds[name]}, which {role}{instead}")
