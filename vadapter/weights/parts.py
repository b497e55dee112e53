"""Checkpoints of several parts: vision encoders and language models of vision-language models.

A part is read as if it had been saved alone: its own group of config.json, its tensors under the
names that they would have there. The connector between them belongs to neither. What a vision
encoder returns is what the connector of its model reads.

Source: configuration_*.py of transformers, and its conversion_mapping.py for the names that older
files have.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vadapter.errors import CheckpointError

Config = Mapping[str, Any]
Rename = Callable[[str], str | None]
Prefixes = Mapping[str, str | None]
INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a model.

    Attributes:
      group: the key of config.json that describes it.
      model_type: of its family; the group's own counts unless it is `fixed`.
      alone: the model has no parts where the group is missing.
      prefixes: of the names of its tensors -> what takes their place where it is saved alone; None:
        those are of other parts. The longest that fits counts.
      absent: the keys that it has where the group is missing.
      whole: from the whole config.json and the group to keys of the group, which win.
      spec: from the whole config.json to fields of the component, which win.
    """

    group: str
    model_type: str
    prefixes: Prefixes
    absent: Config = dataclasses.field(default_factory=dict)
    whole: Callable[[Config, Config], Config] = lambda whole, group: {}
    spec: Callable[[Config], dict[str, Any]] = lambda whole: {}
    fixed: bool = False
    alone: bool = False

    def config(self, whole: Config) -> dict[str, Any]:
        """Return the part's own config, with its `model_type`."""
        group = whole.get(self.group)
        group = self.absent if group is None else group
        own = None if self.fixed else group.get("model_type")
        model_type = self.model_type if own is None else str(own)
        return {**group, **self.whole(whole, group), "model_type": model_type}

    def rename(self, name: str) -> str | None:
        """Return the name of a tensor where the part is saved alone; None: of another part."""
        fits = [prefix for prefix in self.prefixes if name.startswith(prefix)]
        if not fits or (new := self.prefixes[best := max(fits, key=len)]) is None:
            return None
        return new + name.removeprefix(best)


def _tied(default: bool, either: bool = False) -> Callable[[Config, Config], Config]:
    """Return a function to whether the head is the embedding, which the whole config says.

    With `either`, the text's own group may say so, too.
    """

    def keys(whole: Config, group: Config) -> Config:
        tied = whole.get("tie_word_embeddings", default)
        return {"tie_word_embeddings": tied or (either and group.get("tie_word_embeddings", False))}

    return keys


def _feature_layer(default: int, strategy: str) -> Callable[[Config], dict[str, Any]]:
    """Return a function to the tap that a LLaVA says: a hidden state, before any last norm."""

    def spec(whole: Config) -> dict[str, Any]:
        layer = whole.get("vision_feature_layer", default)
        taps = {-1: "last", -2: "penultimate"}
        if type(layer) is not int or layer not in taps:
            raise CheckpointError(
                f"config.json: vision_feature_layer={layer!r}: only {' or '.join(map(str, taps))} "
                "is read"
            )
        select = whole.get("vision_feature_select_strategy", strategy)
        if select not in ("default", "full"):
            raise CheckpointError(
                f"config.json: vision_feature_select_strategy={select!r}: only default or full is "
                "read"
            )
        return {"tap": taps[layer], "final_norm": False, "patches_only": select == "default"}

    return spec


def _paligemma(whole: Config, group: Config) -> Config:
    # Its prefix attends both ways, and texts attend as any language model's: that of this part.
    return {**_tied(True)(whole, group), "use_bidirectional_attention": None}


def _flat(whole: Config, group: Config) -> Config:
    """Return the keys of a text that is not in a group of its own, as Qwen2.5-VL's first files."""
    own = {} if whole.get("text_config") is not None else {**whole, "vision_config": None}
    return {**own, **_tied(False, either=True)(whole, group)}


_LLAVA_TEXT: Prefixes = {
    "language_model.": "", "model.language_model.": "model.", "lm_head.": "lm_head."
}  # fmt: skip
_LLAVA_VISION: Prefixes = {"vision_tower.": "", "model.vision_tower.": ""}
_IDEFICS_TEXT: Prefixes = {"model.text_model.": "model.", "lm_head.": "lm_head."}
_IDEFICS_VISION: Prefixes = {"model.vision_model.": ""}
_QWEN_TEXT: Prefixes = {
    "model.": "model.", "model.language_model.": "model.", "lm_head.": "lm_head.",
    "model.visual.": None,
}  # fmt: skip
_QWEN_VISION: Prefixes = {"visual.": "", "model.visual.": ""}
_SO400M = {"hidden_size": 1152, "patch_size": 14, "num_attention_heads": 16}


def _towers(kind: str, *, alone: bool = False) -> dict[str, Part]:
    """Return the one part of a model of two towers."""
    prefixes: Prefixes = {"vision_model.": ""}
    kind = f"{kind}_vision_model"
    return {"vision": Part("vision_config", kind, prefixes, fixed=True, alone=alone)}


def _idefics(kind: str) -> dict[str, Part]:
    return {
        "vision": Part("vision_config", f"{kind}_vision", _IDEFICS_VISION, fixed=True),
        "text": Part(
            "text_config", "llama", _IDEFICS_TEXT, {"rms_norm_eps": 1e-5}, whole=_tied(False)
        ),
    }


def _qwen(kind: str, whole: Callable[[Config, Config], Config]) -> dict[str, Part]:
    return {
        "vision": Part("vision_config", f"{kind}_vision", _QWEN_VISION, fixed=True),
        "text": Part("text_config", f"{kind}_text", _QWEN_TEXT, whole=whole, fixed=True),
    }


# model_type -> its parts.
MODELS: dict[str, dict[str, Part]] = {
    **{kind: _towers(kind) for kind in ("clip", "metaclip_2", "siglip", "siglip2")},
    "aimv2": _towers("aimv2", alone=True),
    "gemma3": {
        "vision": Part("vision_config", "siglip_vision_model", _LLAVA_VISION),
        "text": Part("text_config", "gemma3_text", _LLAVA_TEXT, whole=_tied(True), fixed=True),
    },
    "paligemma": {
        "vision": Part(
            "vision_config", "siglip_vision_model", _LLAVA_VISION,
            {**_SO400M, "intermediate_size": 4096, "image_size": 224, "num_hidden_layers": 27},
        ),
        "text": Part(
            "text_config", "gemma", _LLAVA_TEXT,
            {"hidden_size": 2048, "num_hidden_layers": 18, "intermediate_size": 16_384,
             "num_attention_heads": 8, "num_key_value_heads": 1, "vocab_size": 257_152},
            whole=_paligemma,
        ),
    },
    "llava": {
        "vision": Part(
            "vision_config", "clip_vision_model", _LLAVA_VISION,
            {"hidden_size": 1024, "intermediate_size": 4096, "patch_size": 14, "image_size": 336,
             "num_hidden_layers": 24, "num_attention_heads": 16},
            spec=_feature_layer(-2, "default"),
        ),
        "text": Part("text_config", "llama", _LLAVA_TEXT, whole=_tied(False, either=True)),
    },
    "llava_onevision": {
        "vision": Part(
            "vision_config", "siglip_vision_model", _LLAVA_VISION,
            {**_SO400M, "intermediate_size": 4304, "image_size": 384, "num_hidden_layers": 26},
            spec=_feature_layer(-1, "full"),
        ),
        "text": Part("text_config", "qwen2", _LLAVA_TEXT, whole=_tied(False, either=True)),
    },
    "idefics3": _idefics("idefics3"),
    "smolvlm": _idefics("smolvlm"),
    "qwen2_5_vl": _qwen("qwen2_5_vl", _flat),
    "qwen3_vl": _qwen("qwen3_vl", _tied(False)),
    "qwen3_5": _qwen("qwen3_5", _tied(False)),
    **{kind: {"text": Part("text_config", f"{kind}_text", _LLAVA_TEXT, whole=_tied(True),
                           fixed=True)} for kind in ("gemma4", "gemma4_unified")},
}  # fmt: skip
# The part of a model that is taken where none is named; of one with a single part, that.
_DEFAULTS: dict[str, str] = dict.fromkeys(("gemma3", "gemma4", "gemma4_unified", "qwen3_5"), "text")
_WORDS = {"vision": "a vision encoder", "text": "a language model"}


def find(whole: Config, name: str) -> Part | None:
    """Return the part `name` of a checkpoint; "": the one that there is no choice about.

    None: the checkpoint is of one component, and none is named.

    Raises:
      CheckpointError: the model has no such part, or several and none is named.
    """
    kind = str(whole.get("model_type", ""))
    parts = {
        name: part for name, part in MODELS.get(kind, {}).items()
        if not part.alone or part.group in whole
    }  # fmt: skip
    chosen = name or _DEFAULTS.get(kind) or (next(iter(parts)) if len(parts) == 1 else "")
    if chosen in parts:
        return parts[chosen]
    if not name:
        if not parts:
            return None
        raise CheckpointError(
            f"config.json: a {kind} has {' and '.join(_WORDS[each] for each in parts)}: name the "
            f"part beside weights: {' or '.join(f'part={each!r}' for each in parts)}"
        )
    raise CheckpointError(
        f"part={name!r}: a {kind or 'checkpoint without model_type'} has "
        + (f"only {' and '.join(map(repr, parts))}" if parts else "no parts; leave it out")
    )


def renamed(whole: Config, name: str) -> Rename | None:
    """Return how the tensors of a part are renamed, see `find`; None: they are read as they are."""
    part = find(whole, name)
    # Of a model of which one part alone is ever read, names are as they are in it.
    named = name or str(whole.get("model_type", "")) in _DEFAULTS
    return part.rename if part is not None and named else None


def shards(folder: Path, name: str) -> list[str]:
    """Return the weights files of a sharded checkpoint that hold tensors of a part.

    Empty if the checkpoint has no index, or its part cannot be told: all files are needed.
    """
    try:
        whole = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        part = find(whole, name)
        return sorted({file for tensor, file in weight_map.items() if part and part.rename(tensor)})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, CheckpointError):
        return []  # `hf_checkpoint` says what is wrong
