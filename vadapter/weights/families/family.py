"""A family of public models: the keys of its config.json, the spec they mean, its tensor names.

The keys are the table that decides what is loaded. For every key of the original's configuration
that changes what the model computes it has the original's default and the values that are read;
another value is an error that names the key. A reader sees the keys of the table alone, all of
them, so it can neither rely on a key that is missing from the table nor forget a default. Every
other key is one that the original ignores as well.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vadapter.errors import CheckpointError
from vadapter.weights.name_mapping import Table
from vadapter.weights.safetensors import TensorFiles

Config = Mapping[str, Any]
Spec = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Values:
    """The values of a key that are read: a test of one, and all of them in words."""

    test: Callable[[Any], bool]
    words: str

    def or_null(self) -> "Values":
        """Return these values and null."""
        return Values(lambda v: v is None or self.test(v), f"{self.words} or null")


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


COUNT = Values(lambda v: type(v) is int and v > 0, "a whole number above 0")
WHOLE = Values(lambda v: type(v) is int, "a whole number")
POSITIVE = Values(lambda v: _number(v) and v > 0, "a number above 0")
NOT_NEGATIVE = Values(lambda v: _number(v) and v >= 0, "a number of at least 0")
FLAG = Values(lambda v: type(v) is bool, "true or false")
GROUP = Values(lambda v: isinstance(v, Mapping), "a group of keys")


def _square(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]


def side(value: Any) -> int:
    """Return the side of a square that is given as a number or as two equal ones, see `SIDE`."""
    return value[0] if _square(value) else value


SIDE = Values(lambda v: COUNT.test(side(v)), "a whole number above 0, or two equal ones")


def only(*values: Any) -> Values:
    """Return these values alone; 1 and 1.0 are not true."""
    words = " or ".join("null" if v is None else repr(v).lower() for v in values)
    return Values(lambda v: any(v == x and type(v) is type(x) for x in values), words)


def one_of(names: Mapping[str, Any]) -> Values:
    """Return the names in a table, which reading translates, see `read`."""
    return Values(lambda v: type(v) is str and v in names, ", ".join(names))


REQUIRED = object()  # the default of a key that the original has no default of


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of config.json: the original's default, and the values that are read."""

    default: Any
    values: Values


Keys = dict[str, Key]

# An activation's name in transformers -> ours, of a feed-forward that is not gated and of one that
# is. Names of one function are several.
ACTIVATIONS = {
    "gelu": "gelu_erf", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu",
    "quick_gelu": "quick_gelu", "relu": "relu",
}  # fmt: skip
GATED = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu_erf", "gelu_pytorch_tanh": "geglu",
         "gelu_new": "geglu", "gelu_fast": "geglu"}  # fmt: skip
ACTIVATION, GATED_ACTIVATION = one_of(ACTIVATIONS), one_of(GATED)

# Of every language model of transformers: it is causal, and all layers are alike.
LANGUAGE_MODEL: Keys = {
    "is_causal": Key(True, only(True)),
    "per_layer_config": Key(None, only(None)),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A supported model_type.

    Attributes:
      reader: from the keys of the table, each with its value or default, to the component's spec.
      tables: names of tensors in use, or those of a spec; the table that matches a checkpoint best
        is taken.
      keys: the table of keys; None passes a file on as it is, one of a format of this package.
      aliases: other names of keys, which win over them, as the original's `attribute_map` does.
      variant: from a config.json of it to the model_type that it is; None: its own.
      files: opens the tensors of a folder, whose config.json is given, too.
    """

    reader: Callable[[Config], Spec]
    tables: tuple[Table, ...] | Callable[[Spec], tuple[Table, ...]]
    keys: Keys | None = None
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    variant: Callable[[Config], str] | None = None
    files: Callable[[Path, Config], TensorFiles] = lambda folder, config: TensorFiles.open(folder)

    def spec(self, config: Config) -> Spec:
        """Return the spec of a config.json.

        Raises:
          CheckpointError: a value that is not read, or values that do not fit together.
        """
        if self.keys is None:
            return self.reader(config)
        return self.reader(read(config, self.keys, self.aliases))

    def names(self, spec: Spec) -> tuple[Table, ...]:
        """Return the tables of a spec."""
        return self.tables(spec) if callable(self.tables) else self.tables


def read(config: Config, keys: Keys, aliases: Mapping[str, str] | None = None) -> Config:
    """Return the keys of a table with their values, or their defaults.

    Raises:
      CheckpointError: a value that is not read, or no value of a key without default.
    """
    known = {**config}
    for alias, key in (aliases or {}).items():
        if alias in config:
            known[key] = config[alias]
    out = {}
    for name, key in keys.items():
        if (value := known.get(name, key.default)) is REQUIRED:
            raise CheckpointError(f"config.json has no {name!r}")
        out[name] = value
        if not key.values.test(value):
            refuse(name, value, f"only {key.values.words} is read")
    return out


def refuse(key: str, value: Any, reason: str) -> None:
    """Raise CheckpointError for the value of a key; `reason` says what is possible."""
    raise CheckpointError(f"config.json: {key}={value!r}: {reason}")


def require(c: Config, key: str, possible: bool, reason: str) -> None:
    """Refuse the value of a key, see `refuse`, unless it is `possible` beside the other keys."""
    if not possible:
        refuse(key, c[key], reason)


def require_heads(c: Config, width: str = "hidden_size", heads: str = "num_attention_heads",
                  kv_heads: str = "", head_dim: str = "") -> None:  # fmt: skip
    """Require that heads divide the width, where no head dim is given, and KV heads the heads.

    The arguments are the names of the keys.
    """
    if not (head_dim and c[head_dim]):
        require(c, heads, c[width] % c[heads] == 0, f"it does not divide {width}={c[width]}")
    if kv_heads and c[kv_heads]:
        require(c, kv_heads, c[heads] % c[kv_heads] == 0, f"it does not divide {heads}={c[heads]}")
