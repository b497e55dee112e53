"""The train step: a pure function (state, frozen, batch) -> (state, metrics), without I/O.

A stage trains some components of the model in `models/adapter_model.py` and keeps the others
frozen. One step, from top to bottom of `make_train_step`:

    objective.prepare   frozen encoder, outside the gradient: images → visual tokens
    objective.loss      trained chain and language model: visual tokens → loss
    gradients           of the trained components alone, summed over micro-batches
    update              dropped where a gradient is not finite

Trained and frozen components are separate arguments. Gradients and optimizer moments then exist for
the trained ones alone, with nothing to mask; the state, which is donated and written to every
checkpoint, is small; and the frozen ones may be stored in bfloat16 or int8.

Legend: B batch, A micro-batches, F frames, N visual tokens per frame, D encoder width, M targets.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vadapter.models.adapter_model import AdapterModel, Batch, Params, Training
from vadapter.models.coca import CoCa
from vadapter.models.losses import bag_xent, chunked_xent, contrastive, in_chunks, token_xent

Metrics = dict[str, jax.Array]
Loss = tuple[jax.Array, Metrics]


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes."""

    step: jax.Array  #: i32[], number of batches seen
    params: Any  #: trained components, float32
    opt_state: Any  #: optimizer state of the trained components
    skipped: jax.Array  #: i32[], number of consecutive updates dropped for non-finite gradients


class Objective(Protocol):
    """The loss that a stage minimizes."""

    def prepare(self, frozen: Params, batch: Batch) -> jax.Array | None:
        """Return what needs no gradient: visual tokens [B,F,N,D], or None."""
        ...

    def loss(
        self, params: Params, visual: Any, batch: Batch, total: jax.Array,
        training: Training | None,
    ) -> Loss:  # fmt: skip
        """Return the loss of a batch or micro-batch, and its metrics.

        `params` are those of all components, `visual` is from `prepare`, and `total` f32[] is the
        weight of the targets of the whole batch. Dividing by it, and not by the weight of the
        micro-batch, makes losses and metrics of micro-batches add up to those of the batch.
        """
        ...


@dataclasses.dataclass(frozen=True)
class CaptionObjective:
    """Next-token loss over the targets in nats, in every stage but `vision`."""

    model: AdapterModel
    chunk_rows: int = 0  #: rows of logits that exist at a time; 0 for all
    query_loss: float = 0.0  #: weight of the queries' own loss, see `StageConfig`

    def prepare(self, frozen: Params, batch: Batch) -> jax.Array | None:
        """Return the visual tokens of the frozen encoder, [B,F,N,D]; None for text only."""
        return self.model.encode(frozen, batch)

    def loss(
        self, params: Params, visual: Any, batch: Batch, total: jax.Array,
        training: Training | None,
    ) -> Loss:  # fmt: skip
        """Return the cross entropy in nats per target, and the accuracy; see `Objective`.

        With a loss of the queries, the metric `loss` remains that of the targets alone.
        """
        model, prefix = self.model, None
        if visual is not None:
            prefix = model.prefix(params, visual, training)
        states = model.states(params, prefix, batch, training)
        head = functools.partial(model.logits, params)
        targets, weights = batch["targets"], batch["weights"]
        at_targets = model.at_targets(states, batch)
        if self.chunk_rows:
            nats, correct = chunked_xent(head, at_targets, targets, weights, self.chunk_rows)
        else:
            nats, correct = token_xent(head(at_targets), targets, weights)
        loss, metrics = nats / total, {"accuracy": correct / total}
        if not self.query_loss:
            return loss, metrics
        assert prefix is not None
        before_text = states[:, : -batch["tokens"].shape[1]]
        own = self._of_queries(head, before_text[:, -prefix.shape[1] :], batch) / total
        return loss + self.query_loss * own, {"loss": loss, "query_loss": own} | metrics

    def _of_queries(
        self, head: Callable[[jax.Array], jax.Array], states: jax.Array, batch: Batch
    ) -> jax.Array:
        """Return the nats of the words that the queries, with states [B,Q,E], predict together."""

        def loss(states: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
            return bag_xent(head(states), targets, weights)

        arrays = (states, batch["targets"], batch["weights"])
        return in_chunks(loss, arrays, self.chunk_rows) if self.chunk_rows else loss(*arrays)


@dataclasses.dataclass(frozen=True)
class CocaObjective:
    """Loss of CoCa: captioning and contrastive, weighted 2 to 1 (arXiv:2205.01917)."""

    model: CoCa
    caption_weight: float = 2.0
    contrastive_weight: float = 1.0

    def prepare(self, frozen: Params, batch: Batch) -> None:
        """Return None: the stage trains its encoder, so that nothing is frozen."""

    def loss(
        self, params: Params, visual: Any, batch: Batch, total: jax.Array,
        training: Training | None,
    ) -> Loss:  # fmt: skip
        """Return the weighted sum of both losses, and their metrics; see `Objective`."""
        logits, (image, text), temperature = self.model(params, batch, training)
        nats, correct = token_xent(logits, batch["targets"], batch["weights"])
        pair, first = contrastive(image, text, temperature, batch["weights"].sum(1) > 0)
        loss = self.caption_weight * nats / total + self.contrastive_weight * pair
        return loss, {"accuracy": correct / total, "contrastive": pair, "retrieval": first}


def split(params: Mapping[str, Any], names: tuple[str, ...]) -> tuple[dict, dict]:
    """Return (the named components, the others). This is the whole mechanism of freezing.

    ValueError if a name is not a component.
    """
    if missing := set(names) - params.keys():
        raise ValueError(f"no components {sorted(missing)}; there are {sorted(params)}")
    return (
        {name: tree for name, tree in params.items() if name in names},
        {name: tree for name, tree in params.items() if name not in names},
    )


def init_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """Return the state of the trained components and their optimizer before the first step."""
    # Two zeros, not one used twice: the state is donated, and a buffer can be donated only once.
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(step=step, params=params, opt_state=tx.init(params), skipped=skipped)


def make_train_step(
    objective: Objective, tx: optax.GradientTransformation, *, seed: int, accumulate: int = 1,
    dropout: bool = False,
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]:  # fmt: skip
    """Return the train step, a pure function (state, frozen, batch) -> (state, metrics).

    `tx` is the optimizer of the trained components. `accumulate` is A, the number of micro-batches
    per step, which must divide B. With `dropout`, masks are drawn from `seed`.
    """

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        frozen, batch = dict(frozen), batch.copy()
        # The key depends on (seed, step) alone: a resumed run draws the masks of one that was never
        # interrupted.
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        training = Training(key, state.step, dropout)
        total = jnp.maximum(batch["weights"].sum(), 1.0)  # a batch may be all padding

        def gradients(part: Batch, training: Training) -> tuple[Any, Metrics]:
            # The encoder runs outside the differentiated function: it is frozen, so that its
            # activations need not be kept for a backward pass.
            visual = objective.prepare(frozen, part)

            def loss_fn(params: Params) -> Loss:
                return objective.loss({**frozen, **params}, visual, part, total, training)

            (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
            return grads, {"loss": loss} | metrics

        if accumulate == 1:
            grads, metrics = gradients(batch, training)
        else:
            grads, metrics = _sum_over_micro_batches(gradients, batch, training, accumulate)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        # One gradient that is not finite would make every parameter NaN for good. Such an update is
        # dropped: parameters and moments keep their bits, as if the batch had not been drawn, and
        # the run stops after too many in a row (`train.supervisor`).
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        skipped = jnp.where(finite, 0, state.skipped + 1)
        return TrainState(state.step + 1, params, opt_state, skipped), metrics | {
            "grad_norm": norm,
            "skipped": skipped,
            "bad": batch["bad"].sum(),
            "targets": batch["weights"].sum(),
        }

    return train_step


def _sum_over_micro_batches(
    fn: Callable[[Batch, Training], tuple[Any, Metrics]],
    batch: Batch,
    training: Training,
    count: int,
) -> tuple[Any, Metrics]:
    """Return the sum of `fn` over micro-batches, one after the other, each with its own key.

    Strided: of A micro-batches, i holds rows i, A+i, 2A+i, … The rows of a batch are sharded in
    contiguous blocks, so that contiguous micro-batches would each be on a few devices, and the
    others idle.
    """
    parts: Any = jax.tree.map(
        lambda x: x.reshape(len(x) // count, count, *x.shape[1:]).swapaxes(0, 1), batch
    )

    def add(sums: Any, indexed: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        i, part = indexed
        own = training.replace(key=jax.random.fold_in(training.key, i))
        return jax.tree.map(jnp.add, sums, fn(part, own)), None

    shapes = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], parts), training)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, (jnp.arange(count), parts))[0]
