"""Components that `vadapter export --components` wrote: their names and shapes are ours.

The folder has model.safetensors, config.json with the spec of the component and the SHA-256 of the
weights, and the tokenizer of a language model.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from vadapter.io.json_files import COMPONENT_FORMAT
from vadapter.weights.families.family import Config, Family, Spec
from vadapter.weights.name_mapping import Source, Table
from vadapter.weights.safetensors import TensorFiles


class _Leaves(Table):
    """Tensors that are named and shaped as the leaves of a component."""

    def source(self, path: str, shape: Sequence[int], prefix: str = "") -> Source:
        """Return the tensor of the same name."""
        del prefix
        return Source((path,), tuple(shape), stacked=False, transposed=False, form=path)


# A language model that is used through its hidden states does without its two ends. No tensor
# belongs to one layer alone.
_ENDS = {"embedding": r"^embedding/", "head": r"^head/"}
_TABLE = _Leaves(modules={}, layers="{}/", optional=_ENDS)


def _spec(config: Config) -> Spec:
    str(config["sha256"])  # KeyError without it
    return dict(config["component"])


def _open(folder: Path, config: Config) -> TensorFiles:
    return dataclasses.replace(TensorFiles.open(folder), expected=config["sha256"])


FAMILIES: dict[str, Family] = {COMPONENT_FORMAT: Family(_spec, (_TABLE,), files=_open)}
