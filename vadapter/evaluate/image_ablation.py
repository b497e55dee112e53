"""Honest signs that the image is used: losses with the right, a wrong and the mean image.

Legend: B batch, Q queries, E language model width.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vadapter.models.adapter_model import AdapterModel, Batch, Params
from vadapter.models.losses import token_xent


def make_image_ablation(model: AdapterModel) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """Sums that tell whether the image is used: compile once, add over batches.

    Returns:
      A function (params, batch) -> sums: `targets`, and nats with the right image's prefix
      (`right`), with another image's (`wrong`: the row before), with the batch's mean prefix
      (`mean`); and `between`/`power`, the image-specific power of the prefix that differs between
      queries, and all of it. For text-only models just `right` and `targets`.
    """

    def nats(params: Params, prefix: jax.Array | None, batch: Batch) -> jax.Array:
        logits = model.logits(params, model.read(params, prefix, batch))
        return token_xent(logits, batch["targets"], batch["weights"])[0]

    def control(params: Params, batch: Batch) -> dict[str, jax.Array]:
        visual = model.encode(params, batch)
        sums = {"targets": batch["weights"].sum()}
        if visual is None:
            return sums | {"right": nats(params, None, batch)}
        prefix = model.prefix(params, visual)
        mean = jnp.broadcast_to(prefix.mean(0, keepdims=True), prefix.shape)
        own = (prefix - mean).astype(jnp.float32)
        return sums | {
            "right": nats(params, prefix, batch),
            "wrong": nats(params, jnp.roll(prefix, 1, axis=0), batch),
            "mean": nats(params, mean, batch),
            "between": jnp.square(own - own.mean(1, keepdims=True)).sum(),
            "power": jnp.square(own).sum(),
        }

    return control


def image_ablation_scores(sums: list[Mapping[str, Any]]) -> dict[str, float]:
    """Means over batches: loss (nats a target), loss_wrong, loss_mean, query_share."""
    total = {k: float(sum(float(s[k]) for s in sums)) for k in sums[0]}
    count = max(total["targets"], 1.0)
    out = {"loss": total["right"] / count}
    if "wrong" in total:
        out["loss_wrong"] = total["wrong"] / count
        out["loss_mean"] = total["mean"] / count
        out["query_share"] = total["between"] / max(total["power"], 1e-30)
    return out
