"""The identity of a stage: what must be equal for its checkpoint to be resumed."""

from collections.abc import Mapping
from typing import Any

from vadapter.config import with_new_keys
from vadapter.data.config import DataConfig
from vadapter.models.registry import KINDS, expand
from vadapter.recipe.schema import StageConfig


def upgrade(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity that an earlier version wrote with the current names of its keys."""
    sections = {"config": StageConfig, "data": dict[str, DataConfig]}
    new = {key: with_new_keys(sections.get(key), value) for key, value in identity.items()}
    if "components" in new:
        new["components"] = {
            name: with_new_keys(KINDS[expand(name, spec)["kind"]][0], spec)
            for name, spec in new["components"].items()
        }
    return new
