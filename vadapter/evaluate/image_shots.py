"""Few-shot examples with their images, as embeddings before the image that is asked about.

Legend: k examples, F frames, S pixels per side, Q queries, E language model width.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vadapter.distributed.compile import jit
from vadapter.models.adapter_model import AdapterModel, Params


def embed_image_shots(
    model: AdapterModel, params: Params, frames: np.ndarray, texts: Sequence[Sequence[int]]
) -> jax.Array:
    """Return the embeddings between the prompt and the image, see `generate.prefill`.

    Args:
      model: with an encoder.
      params: of every component.
      frames: u8[k,F,S,S,3], of the examples.
      texts: token ids after each image, up to the next image.

    Returns:
      [1, k·Q + ids, E]: each example's prefix, then its embedded text.
    """

    def embed(params: Params, frames: jax.Array, texts: list[jax.Array]) -> jax.Array:
        visual = model.encode(params, {"frames": frames})
        assert visual is not None
        lm, prefixes = model.modules[model.lm], model.prefix(params, visual)
        parts = []
        for prefix, ids in zip(prefixes, texts, strict=True):
            words: Any = lm.apply({"params": params[model.lm]}, ids, method="embed")
            parts += [prefix.astype(words.dtype), words]
        return jnp.concatenate(parts)[None]

    return jit(embed)(params, frames, [np.array(ids, np.int32) for ids in texts])
