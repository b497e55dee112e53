"""The train step: frozen components stay, their cost is saved, many devices equal one."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import tiny

from benches.fake_batch import fake_batch
from vadapter.distributed.mesh import MeshConfig, batch_sharding, make_mesh, shardings_of
from vadapter.models.adapter_model import AdapterModel
from vadapter.models.lm import LM
from vadapter.stages.outline import abstract
from vadapter.stages.steps import CaptionObjective, init_state, make_train_step, split

MODEL = tiny.stage2()
TRAINED = ("resampler", "fc_in", "tlm", "fc_out")
FROZEN = ("encoder", "llm")
OBJECTIVE = CaptionObjective(MODEL)
# Compile faster, where any model will do.
STAGE1 = AdapterModel(
    {name: MODEL.modules[name] for name in ("encoder", "resampler", "tlm")},
    lm="tlm", chain=("resampler",), encoder="encoder",
)  # fmt: skip
TEXT = AdapterModel({"tlm": LM(tiny.TLM)}, lm="tlm")
SGD = optax.sgd(0.1, momentum=0.9)  # Adam's first steps amplify rounding: no use in comparisons


def batch_of(seed=0, **kwargs):
    kwargs = {"size": tiny.IMAGE, "text_len": 8, "vocab_size": tiny.V} | kwargs
    return fake_batch(tiny.B, seed=seed, **kwargs)


@pytest.fixture(scope="module")
def params():
    return tiny.filled(tiny.boxed(MODEL))


def start(params, tx):
    """State (on the device: it is donated) and frozen components."""
    trained, frozen = split(params, tuple(n for n in TRAINED if n in params))
    return init_state(jax.tree.map(jnp.array, trained), tx), frozen


@pytest.fixture(scope="module")
def stage1():
    return tiny.filled(tiny.boxed(STAGE1))


@pytest.fixture(scope="module")
def adam():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=1e-4))


@pytest.fixture(scope="module")
def adam_step(params, adam):
    step = jax.jit(make_train_step(OBJECTIVE, adam, seed=0))
    return step.lower(*start(params, adam), batch_of()).compile()


@pytest.fixture(scope="module")
def sgd_step():
    return jax.jit(make_train_step(CaptionObjective(STAGE1), SGD, seed=0))


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for path, leaf in tiny.paths(a).items():
        np.testing.assert_array_equal(leaf, tiny.paths(b)[path], err_msg=path)


def assert_close(a, b, atol):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for path, leaf in tiny.paths(a).items():
        np.testing.assert_allclose(leaf, tiny.paths(b)[path], atol=atol, err_msg=path)


def test_three_steps_move_every_trained_leaf_and_no_frozen_one(params, adam, adam_step):
    state, frozen = start(params, adam)
    before = jax.tree.map(np.copy, frozen)
    for seed in range(3):
        state, metrics = adam_step(state, frozen, batch_of(seed))
    assert_same_bits(frozen, before)
    for path, leaf in tiny.paths(state.params).items():
        first = tiny.paths({n: params[n] for n in TRAINED})[path]
        assert (np.asarray(leaf) != first).any(), f"{path} has not moved"
    assert int(state.step) == 3
    assert float(metrics["grad_norm"]) > 0


def test_optimizer_state_exists_for_trained_components_alone(params, adam):
    state, _ = start(params, adam)
    names = {part for path in tiny.paths(state.opt_state) for part in path.split("/")}
    assert set(TRAINED) <= names
    assert not names & set(FROZEN)
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert moments == 2 * sum(x.size for x in jax.tree.leaves(state.params))


def test_split_divides_by_component_and_refuses_missing_names(params):
    trained, frozen = split(params, TRAINED)
    assert (set(trained), set(frozen)) == (set(TRAINED), set(FROZEN))
    with pytest.raises(ValueError, match=r"no components \['adaptor'\]; there are \['encoder'"):
        split(params, ("adaptor",))


@pytest.fixture(scope="module")
def two_ways(params, adam, adam_step):
    """Compiled steps: the split tree's, and one that differentiates and updates everything."""
    batch = batch_of()

    def whole(params, opt_state, batch):
        def loss_fn(params):
            encoder = MODEL.modules["encoder"]
            visual = encoder.apply({"params": params["encoder"]}, batch["frames"])
            return OBJECTIVE.loss(params, visual, batch, batch["weights"].sum(), None)[0]

        loss, grads = jax.value_and_grad(loss_fn)(params)
        trained, frozen = split(grads, TRAINED)
        masked = trained | jax.tree.map(jnp.zeros_like, frozen)
        updates, opt_state = adam.update(masked, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, optax.tree.norm(grads)

    theirs = jax.jit(whole).lower(params, adam.init(params), batch).compile()
    return adam_step, theirs


def test_the_split_step_does_less_work_than_one_that_masks_the_whole_tree(two_ways):
    ours, theirs = (step.cost_analysis()["flops"] for step in two_ways)
    assert ours < 0.85 * theirs


@pytest.mark.parametrize("kind", ["argument", "temp", "output"])
def test_the_split_step_takes_less_memory_than_one_that_masks_the_whole_tree(two_ways, kind):
    ours, theirs = (getattr(step.memory_analysis(), f"{kind}_size_in_bytes") for step in two_ways)
    assert ours < 0.9 * theirs


def test_logits_are_computed_at_targets_alone():
    """With a vocabulary that outweighs the layers, cost follows the number of targets."""
    model = AdapterModel({"tlm": LM(dataclasses.replace(tiny.TLM, vocab_size=4096))}, lm="tlm")
    shapes = nn.unbox(jax.eval_shape(lambda k: model.init(k, None), jax.random.key(0)))

    def flops(targets):
        batch = batch_of(text_len=32, frames=0)
        for key in ("target_at", "targets", "weights"):
            batch[key] = batch[key][:, :targets]

        def loss(params):
            return CaptionObjective(model).loss(params, None, batch, jnp.float32(1), None)[0]

        return jax.jit(loss).lower(shapes).compile().cost_analysis()["flops"]

    assert flops(4) < 0.25 * flops(32)


@pytest.fixture(scope="module")
def text_params():
    return tiny.filled(jax.eval_shape(lambda k: TEXT.init(k, None), jax.random.key(0)))


def test_chunked_logits_give_the_same_step(text_params):
    outcomes = []
    for rows in (0, 16):
        state = init_state(text_params, SGD)
        step = jax.jit(make_train_step(CaptionObjective(TEXT, chunk_rows=rows), SGD, seed=0))
        outcomes.append(step(state, {}, batch_of(frames=0)))
    (a, metrics_a), (b, metrics_b) = outcomes
    assert_close(a.params, b.params, 1e-6)
    assert_close(metrics_a, metrics_b, 1e-5)


def test_the_loss_of_the_queries_is_added_and_logged_beside_that_of_the_targets(stage1):
    plain, batch = CaptionObjective(STAGE1), batch_of()
    own = dataclasses.replace(plain, query_loss=0.5)

    def run(objective, part):
        def loss(params, part):
            visual = objective.prepare(params, part)
            return objective.loss(params, visual, part, batch["weights"].sum(), None)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(stage1, part)

    (alone, metrics), _ = run(plain, batch)
    (both, found), slopes = run(own, batch)
    assert set(found) == {*metrics, "loss", "query_loss"}
    np.testing.assert_allclose(found["loss"], alone, rtol=1e-6)
    np.testing.assert_allclose(both, alone + 0.5 * found["query_loss"], rtol=1e-6)
    assert found["query_loss"] > 0.1
    # Parts of a batch add up to it, and so do chunks of its logits.
    halves = [
        run(own, {key: x[part] for key, x in batch.items()}) for part in np.split(np.arange(8), 2)
    ]
    chunked = run(dataclasses.replace(own, chunk_rows=16), batch)
    for other in (jax.tree.map(jnp.add, *halves), chunked):
        np.testing.assert_allclose(other[0][0], both, rtol=1e-5)
        assert_close(other[1], slopes, atol=1e-5)


def test_four_micro_batches_give_the_step_of_the_whole_batch(stage1, sgd_step):
    batch = batch_of()
    batch["weights"][:3, 2:] = 0  # shares of the targets that differ between micro-batches
    state, frozen = start(stage1, SGD)
    step = jax.jit(make_train_step(CaptionObjective(STAGE1), SGD, seed=0, accumulate=4))
    whole, metrics = sgd_step(state, frozen, batch)
    parts, metrics_parts = step(state, frozen, batch)
    assert_close(whole.params, parts.params, 1e-6)
    assert_close(whole.opt_state, parts.opt_state, 1e-6)
    assert_close(metrics, metrics_parts, 1e-5)


def test_non_finite_gradients_change_no_bit_and_are_counted_in_a_row(params, adam, adam_step):
    good = batch_of()
    state, frozen = start(params, adam)
    broken = jax.tree.map(np.copy, frozen)
    broken["llm"]["norm"]["scale"][0] = np.inf
    state, _ = adam_step(state, frozen, good)
    before = jax.device_get(state)
    for count in (1, 2):
        state, metrics = adam_step(state, broken, good)
        assert int(state.skipped) == int(metrics["skipped"]) == count
    assert not np.isfinite(metrics["grad_norm"])
    assert_same_bits(jax.device_get(state.params), before.params)
    assert_same_bits(jax.device_get(state.opt_state), before.opt_state)
    assert int(state.step) == 3, "a dropped batch is still a batch seen"
    state, _ = adam_step(state, frozen, good)
    assert int(state.skipped) == 0
    assert (np.asarray(state.params["tlm"]["norm"]["scale"])
            != before.params["tlm"]["norm"]["scale"]).any()  # fmt: skip


def test_a_batch_of_padding_alone_has_loss_zero_and_no_gradient(stage1, sgd_step):
    empty = batch_of()
    for key in ("prompt", "tokens", "segments", "positions", "target_at", "targets", "weights"):
        empty[key] = np.zeros_like(empty[key])
    empty["bad"][:], empty["id"][:] = True, -1
    state, frozen = start(stage1, SGD)
    after, metrics = sgd_step(state, frozen, empty)
    assert (float(metrics["loss"]), float(metrics["grad_norm"])) == (0, 0)
    assert (int(metrics["bad"]), float(metrics["targets"])) == (tiny.B, 0)
    assert int(after.skipped) == 0
    assert_same_bits(after.params, state.params)


def test_a_bad_row_changes_no_gradient_and_is_counted(stage1, sgd_step):
    state, frozen = start(stage1, SGD)
    bad = batch_of()
    bad["weights"][2], bad["bad"][2] = 0, True
    other = {k: v.copy() for k, v in bad.items()}
    other["frames"][2] = 255 - other["frames"][2]
    a, metrics = sgd_step(state, frozen, bad)
    b, _ = sgd_step(state, frozen, other)
    assert int(metrics["bad"]) == 1
    assert_close(a.params, b.params, 1e-6)


def test_the_whole_state_is_donated(text_params, adam):
    state = init_state(jax.tree.map(jnp.array, text_params), adam)
    step = jax.jit(make_train_step(CaptionObjective(TEXT), adam, seed=0), donate_argnums=0)
    new, _ = step(state, {}, batch_of(frames=0))  # a donation without use warns, and fails here
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert not any(x.is_deleted() for x in jax.tree.leaves(new))


def test_dropout_depends_on_seed_and_step_alone(text_params):
    model = AdapterModel({"tlm": LM(dataclasses.replace(tiny.TLM, dropout=0.5))}, lm="tlm")
    step = jax.jit(make_train_step(CaptionObjective(model), SGD, seed=0, dropout=True))
    state = init_state(text_params, SGD)

    def loss(n):
        return float(step(state.replace(step=jnp.int32(n)), {}, batch_of(frames=0))[1]["loss"])

    assert loss(0) == loss(0)
    assert loss(0) != loss(1)


@pytest.fixture(scope="module")
def one_device(stage1, sgd_step):
    state, frozen = start(stage1, SGD)
    for seed in range(2):
        state, metrics = sgd_step(state, frozen, batch_of(seed))
    return jax.device_get((state.params, metrics))


@pytest.mark.parametrize(
    "config",
    [MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2)],
    ids=["data", "data, fsdp and tensor"],
)
def test_eight_devices_take_the_steps_of_one(stage1, one_device, config):
    mesh = make_mesh(config)
    boxed = tiny.boxed(STAGE1)
    targets = shardings_of(abstract(boxed, mesh))
    assert jax.tree.structure(targets) == jax.tree.structure(nn.unbox(boxed))
    trained, frozen = split(jax.device_put(stage1, targets), ("resampler", "tlm"))
    state = jax.jit(lambda p: init_state(p, SGD))(trained)
    if config.fsdp > 1:
        kernel = state.params["tlm"]["stack"]["blocks"]["mlp"]["up"]["kernel"]
        shard = kernel.addressable_shards[0].data
        assert shard.size == kernel.size // (config.fsdp * config.tensor)
    step = jax.jit(make_train_step(CaptionObjective(STAGE1), SGD, seed=0), donate_argnums=0)
    for seed in range(2):
        state, metrics = step(state, frozen, jax.device_put(batch_of(seed), batch_sharding(mesh)))
    expected_params, expected_metrics = one_device
    assert_close(jax.device_get(metrics), expected_metrics, 1e-5)
    assert_close(jax.device_get(state.params), expected_params, 1e-5)
