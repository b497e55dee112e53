"""Image ablation: losses with the right image, a wrong one and the mean of the batch.

The model uses the image only if the loss with the right one is the lowest: a prefix that is the
same for every image lowers the loss, too, as any soft prompt does.

Legend: B batch, Q queries, E language model width.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vadapter.models.adapter_model import AdapterModel, Batch, Params
from vadapter.models.losses import token_xent


def make_image_ablation(model: AdapterModel) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """Return a function (params, batch) -> sums, to compile once and to add over batches.

    The sums are `targets`, the nats with the prefix of the right image (`right`), of another image
    (`wrong`: that of the row before) and of the batch's mean (`mean`), and two powers of the
    image-specific part of the prefix: all of it (`power`) and what differs between queries
    (`between`). Text-only models have only `right` and `targets`.
    """

    def nats(params: Params, prefix: jax.Array | None, batch: Batch) -> jax.Array:
        logits = model.logits(params, model.read(params, prefix, batch))
        return token_xent(logits, batch["targets"], batch["weights"])[0]

    def ablate(params: Params, batch: Batch) -> dict[str, jax.Array]:
        visual = model.encode(params, batch)
        sums = {"targets": batch["weights"].sum()}
        if visual is None:
            return sums | {"right": nats(params, None, batch)}
        prefix = model.prefix(params, visual)
        mean = jnp.broadcast_to(prefix.mean(0, keepdims=True), prefix.shape)
        specific = (prefix - mean).astype(jnp.float32)
        # One after the other in a loop: the language model is compiled once instead of three times.
        prefixes = jnp.stack([prefix, jnp.roll(prefix, 1, axis=0), mean])
        right, wrong, of_mean = jax.lax.map(lambda x: nats(params, x, batch), prefixes)
        return sums | {
            "right": right,
            "wrong": wrong,
            "mean": of_mean,
            "between": jnp.square(specific - specific.mean(1, keepdims=True)).sum(),
            "power": jnp.square(specific).sum(),
        }

    return ablate


def image_ablation_scores(sums: list[Mapping[str, Any]]) -> dict[str, float]:
    """Return means over batches: loss, loss_wrong, loss_mean (nats per target) and query_share.

    `query_share` is near 0 where all queries carry the same information about an image.
    """
    total = {k: float(sum(float(s[k]) for s in sums)) for k in sums[0]}
    names = {"right": "loss", "wrong": "loss_wrong", "mean": "loss_mean"}
    count = max(total["targets"], 1.0)
    scores = {name: total[key] / count for key, name in names.items() if key in total}
    if "power" in total:
        scores["query_share"] = total["between"] / max(total["power"], 1e-30)
    return scores
