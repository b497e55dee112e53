"""Components: the parts of a model, each a Flax module with parameters and randomness of its own.

A model is a handful of components (encoder, resampler, tiny LM, LLM …) that are trained, frozen,
stored and initialized one by one. Its parameters are therefore a dict keyed by component name.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

Params = Mapping[str, Any]  # component name -> tree of arrays


def component_seed(name: str) -> int:
    """Return a stable 32-bit number for a component's name."""
    return zlib.crc32(name.encode())


def component_key(rng: jax.Array, name: str) -> jax.Array:
    """Return a component's own key, which does not depend on what else is in the model."""
    return jax.random.fold_in(rng, component_seed(name))


@dataclasses.dataclass(frozen=True)
class Components:
    """What every model of several components has: their Flax modules by name."""

    modules: Mapping[str, nn.Module]

    def apply(
        self, params: Params, name: str, *args: Any, rng: jax.Array | None = None, **kwargs: Any
    ) -> Any:
        """Call a component with its parameters.

        Args:
          *args, **kwargs: of `Module.apply`: inputs, `method` and its keyword arguments.
          rng: turns dropout on.
        """
        rngs = {} if rng is None else {"dropout": component_key(rng, name)}
        return self.modules[name].apply({"params": params[name]}, *args, rngs=rngs, **kwargs)
