"""Rotary positions of a config.json, as transformers reads them.

Newer files have a group `rope_parameters`, older ones `rope_scaling` and `rope_theta` beside it.
`rope_scaling` wins over `rope_parameters`, and what is in a group over what is beside it.

Source: `RotaryEmbeddingConfigMixin` and `ROPE_INIT_FUNCTIONS` of transformers'
modeling_rope_utils.py.
"""

import math
from collections.abc import Mapping

from vadapter.weights.families.family import (
    COUNT,
    FLAG,
    GROUP,
    NOT_NEGATIVE,
    POSITIVE,
    REQUIRED,
    Config,
    Key,
    Keys,
    Spec,
    Values,
    read,
    refuse,
)

_ANY = Values(lambda v: True, "anything")
_NEEDED = Key(REQUIRED, POSITIVE)
SHARE = Values(lambda v: POSITIVE.test(v) and v <= 1, "a number above 0 and at most 1")
_FACTORS = Values(
    lambda v: isinstance(v, list) and all(POSITIVE.test(x) for x in v), "a list of numbers above 0"
)
_LENGTH = Key(None, COUNT)  # completed by `max_position_embeddings`
# Type of positions -> the keys of the group that it needs or may have.
TYPES: dict[str, Keys] = {
    "default": {},
    "linear": {"factor": _NEEDED},
    "llama3": {"factor": _NEEDED, "low_freq_factor": _NEEDED, "high_freq_factor": _NEEDED,
               "original_max_position_embeddings": _LENGTH},
    "yarn": {"factor": Key(REQUIRED, POSITIVE.or_null()),
             "original_max_position_embeddings": _LENGTH,
             "attention_factor": Key(None, POSITIVE.or_null()),
             "beta_fast": Key(None, NOT_NEGATIVE.or_null()),
             "beta_slow": Key(None, NOT_NEGATIVE.or_null()),
             "mscale": Key(None, NOT_NEGATIVE.or_null()),
             "mscale_all_dim": Key(None, NOT_NEGATIVE.or_null()),
             "truncate": Key(True, FLAG)},
    "longrope": {"short_factor": Key(REQUIRED, _FACTORS), "long_factor": Key(REQUIRED, _FACTORS),
                 "original_max_position_embeddings": _LENGTH,
                 "factor": Key(None, POSITIVE.or_null()),
                 "attention_factor": Key(None, POSITIVE.or_null())},
}  # fmt: skip


def keys(length: int, theta: float = 10_000.0, *, partial: bool = False) -> Keys:
    """Return the keys of a family whose default length in tokens and base these are.

    With `partial` the family may rotate a part of each head only. One that may not ignores the key,
    except where positions are scaled.
    """
    part = SHARE.or_null() if partial else _ANY
    return {
        "rope_parameters": Key(None, GROUP.or_null()),
        "rope_scaling": Key(None, GROUP.or_null()),
        "rope_theta": Key(theta, POSITIVE),
        "partial_rotary_factor": Key(None, part),
        "original_max_position_embeddings": Key(None, COUNT.or_null()),
        "max_position_embeddings": Key(length, COUNT),
    }


def rotary(c: Config, head_dim: int, *, partial: bool = False) -> Spec:
    """Return the rotary positions of a model whose layers share them, see `models.rope`.

    `c` has `keys`, which `partial` is from.
    """
    return group_spec(c, c["rope_scaling"] or c["rope_parameters"] or {}, head_dim, partial=partial)


def group_spec(c: Config, group: Config, head_dim: int, *, partial: bool = False) -> Spec:
    """Return the rotary positions of one group; `c` has what is beside it."""
    for key, value in group.items():
        if isinstance(value, Mapping):
            refuse(f"rope_parameters.{key}", value, "the layers of this model share one group")
    kind = group.get("rope_type", group.get("type", "default"))
    if not isinstance(kind, str) or kind not in TYPES:
        refuse("rope_type", kind, f"only rotary positions of type {', '.join(TYPES)} are read")
    length = c["original_max_position_embeddings"]
    beside = {"rope_theta": c["rope_theta"], "partial_rotary_factor": c["partial_rotary_factor"],
              "original_max_position_embeddings": c["max_position_embeddings"]}  # fmt: skip
    inside = {"original_max_position_embeddings": length} if length else {}
    table = {"rope_theta": Key(None, POSITIVE), **TYPES[kind]}
    if partial:
        table["partial_rotary_factor"] = Key(None, SHARE.or_null())
    g = read({**beside, **group, **inside}, table)
    part = g.get("partial_rotary_factor")
    if not partial and kind != "default":
        part = group.get("partial_rotary_factor", beside["partial_rotary_factor"])
        if part not in (None, 1):
            refuse("partial_rotary_factor", part, "this model rotates whole heads")
    part = 1.0 if part is None or not partial else float(part)
    if head_dim % 2 and int(head_dim * part) == head_dim:
        refuse("head_dim", head_dim, "rotary positions need an even one")
    pairs = -(-int(head_dim * part) // 2)
    for key in ("short_factor", "long_factor"):
        if len(g.get(key, range(pairs))) != pairs:
            refuse(key, g[key], f"it needs {pairs} numbers, one for each rotated pair of a head")
    return {"theta": float(g["rope_theta"]), "part": part} | _SCALINGS[kind](c, g)


def _default(c: Config, g: Config) -> Spec:
    del c, g
    return {}


def _linear(c: Config, g: Config) -> Spec:
    del c
    return {"scaling": "linear", "factor": float(g["factor"])}


def _llama3(c: Config, g: Config) -> Spec:
    del c
    low, high = g["low_freq_factor"], g["high_freq_factor"]
    if high <= low:
        refuse("high_freq_factor", high, f"it must be above low_freq_factor={low}")
    return {
        "scaling": "llama3", "factor": float(g["factor"]), "low_freq_factor": low,
        "high_freq_factor": high, "original_len": g["original_max_position_embeddings"],
    }  # fmt: skip


def _yarn(c: Config, g: Config) -> Spec:
    length = g["original_max_position_embeddings"]
    factor = g["factor"] or c["max_position_embeddings"] / length
    fast, slow = g["beta_fast"] or 32.0, g["beta_slow"] or 1.0
    if fast < slow:
        refuse("beta_fast", fast, f"it must not be below beta_slow={slow}")
    if g["rope_theta"] <= 1:
        refuse("rope_theta", g["rope_theta"], "yarn needs one above 1")
    spec = {
        "scaling": "yarn",
        "factor": float(factor),
        "original_len": length,
        "beta_fast": float(fast),
        "beta_slow": float(slow),
        "truncate": g["truncate"],
    }
    amplitude = g["attention_factor"]
    if amplitude is None and g["mscale"] and g["mscale_all_dim"]:
        amplitude = _amplitude(factor, g["mscale"]) / _amplitude(factor, g["mscale_all_dim"])
    return spec if amplitude is None else spec | {"attention_factor": float(amplitude)}


def _longrope(c: Config, g: Config) -> Spec:
    length = g["original_max_position_embeddings"]
    factor = g["factor"] or c["max_position_embeddings"] / length
    if factor > 1 and length < 2 and g["attention_factor"] is None:
        refuse("original_max_position_embeddings", length, "longrope needs one above 1")
    spec = {
        "scaling": "longrope", "factor": float(factor), "original_len": length,
        "short_factor": tuple(g["short_factor"]), "long_factor": tuple(g["long_factor"]),
    }  # fmt: skip
    scale = g["attention_factor"]
    return spec if scale is None else spec | {"attention_factor": float(scale)}


def _amplitude(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


_SCALINGS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn,
             "longrope": _longrope}  # fmt: skip
