"""The train and evaluation steps: pure functions of (state, frozen, batch), no I/O.

Gradients and optimizer state exist for the trained components alone: they are another argument
than the frozen ones, so there is nothing to mask. The frozen encoder runs outside the gradient.

Legend: B batch, A micro-batches, F frames, N visual tokens, D encoder width, M targets.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vadapter.models.adapter_model import AdapterModel, Batch, Params
from vadapter.models.coca import CoCa
from vadapter.models.losses import chunked_xent, contrastive, token_xent

Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: i32[], batches seen.
      params: trained components, float32.
      opt_state: of the trained components.
      skipped: i32[], updates in a row that were dropped for non-finite gradients.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    skipped: jax.Array


class Objective(Protocol):
    """What a stage minimises."""

    def prepare(self, frozen: Params, batch: Batch) -> jax.Array | None:
        """Runs what needs no gradient: the frozen encoder."""
        ...

    def loss(
        self, params: Params, visual: Any, batch: Batch, total: jax.Array, rng: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        """Loss of (a part of) a batch whose targets weigh `total`; metrics that add up."""
        ...


@dataclasses.dataclass(frozen=True)
class CaptionObjective:
    """Next-token loss over the targets, in every stage but `vision`.

    Attributes:
      chunk_rows: at most so many rows of logits at a time; 0: all at once.
    """

    model: AdapterModel
    chunk_rows: int = 0

    def prepare(self, frozen: Params, batch: Batch) -> jax.Array | None:
        return self.model.encode(frozen, batch)

    def loss(
        self, params: Params, visual: Any, batch: Batch, total: jax.Array, rng: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        states = self.model.hidden(params, visual, batch, rng)
        head = lambda s: self.model.logits(params, s)  # noqa: E731
        targets, weights = batch["targets"], batch["weights"]
        if self.chunk_rows:
            nats, correct = chunked_xent(head, states, targets, weights, self.chunk_rows)
        else:
            nats, correct = token_xent(head(states), targets, weights)
        return nats / total, {"accuracy": correct / total}


@dataclasses.dataclass(frozen=True)
class CocaObjective:
    """CoCa's loss: captioning weighed against contrastive (arXiv 2205.01917: 2 to 1)."""

    model: CoCa
    caption_weight: float = 2.0
    contrastive_weight: float = 1.0

    def prepare(self, frozen: Params, batch: Batch) -> None:
        return None

    def loss(
        self, params: Params, visual: Any, batch: Batch, total: jax.Array, rng: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        logits, (image, text), temperature = self.model(params, batch, rng)
        nats, correct = token_xent(logits, batch["targets"], batch["weights"])
        pair, first = contrastive(image, text, temperature, batch["weights"].sum(1) > 0)
        loss = self.caption_weight * nats / total + self.contrastive_weight * pair
        return loss, {"accuracy": correct / total, "contrastive": pair, "retrieval": first}


def split(params: Mapping[str, Any], names: tuple[str, ...]) -> tuple[dict, dict]:
    """Divides components into (those named, the others): the whole mechanism of freezing."""
    if missing := set(names) - params.keys():
        raise ValueError(f"no components {sorted(missing)}; there are {sorted(params)}")
    return (
        {k: v for k, v in params.items() if k in names},
        {k: v for k, v in params.items() if k not in names},
    )


def init_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """A fresh state around the trained components."""
    zero = lambda: jnp.zeros((), jnp.int32)  # noqa: E731 - two buffers: both are donated
    return TrainState(step=zero(), params=params, opt_state=tx.init(params), skipped=zero())


def make_train_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    seed: int,
    accumulate: int = 1,
    dropout: bool = False,
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]:
    """One optimizer step: (state, frozen, batch) -> (state, metrics).

    Args:
      objective: the stage's loss.
      tx: optimizer of the trained components.
      seed: of dropout; the key at each step depends on (seed, step) alone.
      accumulate: A, micro-batches a step; gradients equal those of the whole batch.
      dropout: whether to draw dropout masks at all.

    Returns:
      A pure function. An update with non-finite gradients is dropped and counted in `skipped`:
      parameters and optimizer state keep their bits.
    """

    def grads_of(params, frozen, visual, batch, total, rng):
        def loss_fn(params):
            return objective.loss(frozen | params, visual, batch, total, rng)

        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return grads, {"loss": loss} | metrics

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        frozen, batch = dict(frozen), batch.copy()
        rng = jax.random.fold_in(jax.random.key(seed), state.step) if dropout else None
        total = jnp.maximum(batch["weights"].sum(), 1.0)
        if accumulate == 1:
            visual = objective.prepare(frozen, batch)
            grads, metrics = grads_of(state.params, frozen, visual, batch, total, rng)
        else:

            def micro(carry, part):
                i, part = part
                key = None if rng is None else jax.random.fold_in(rng, i)
                visual = objective.prepare(frozen, part)
                out = grads_of(state.params, frozen, visual, part, total, key)
                return jax.tree.map(jnp.add, carry, out), None

            # Strided, so that every micro-batch spans all devices.
            parts = jax.tree.map(
                lambda x: x.reshape(len(x) // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1),
                batch,
            )
            first = jax.tree.map(lambda x: x[0], parts)
            shapes = jax.eval_shape(
                lambda b: grads_of(
                    state.params, frozen, objective.prepare(frozen, b), b, total, rng
                ),
                first,
            )
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            (grads, metrics), _ = jax.lax.scan(micro, zeros, (jnp.arange(accumulate), parts))

        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)  # noqa: E731
        state = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            opt_state=keep(opt_state, state.opt_state),
            skipped=jnp.where(finite, 0, state.skipped + 1),
        )
        return state, metrics | {
            "grad_norm": norm,
            "skipped": state.skipped,
            "bad": batch["bad"].sum(),
            "targets": batch["weights"].sum(),
        }

    return train_step
