"""Many devices do what one does, for every kind of stage, with every part split that can be.

All comparisons are in float32. A leaf agrees if no element is off by more than 1e-5 of the leaf's
largest one (measured: at most 4e-6), or by more than 1e-8: biases of keys have no gradient but
rounding.
"""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import optax
import pytest
from support import tiny
from support.cases import some_slow
from support.programs import MESHES, ROWS, program, recipe

from benches.bench_step import random_arguments
from benches.fake_batch import fake_batch
from vadapter.checkpoints.digest import tree_digests
from vadapter.checkpoints.manager import Checkpointer
from vadapter.distributed.mesh import shardings_of, with_mesh
from vadapter.models.generate import Decode
from vadapter.recipe.optim import make_optimizer
from vadapter.stages.abstract_state import abstract_state
from vadapter.stages.steps import init_state, make_train_step

SGD = optax.sgd(0.1, momentum=0.9)  # Adam's first steps amplify rounding: no use in comparisons
STAGES = ("tlm", "vision", "decoder", "vadapter", "perceiver", "llava")
# The mesh with all axes for every kind of stage, every mesh for one: the others take minutes.
# Connectors other than the VAdapter are on meshes in tests/models/adapters/test_all_connectors.py.
KINDS = ("vision", "decoder", "vadapter")
PAIRS = some_slow(
    itertools.product(STAGES, MESHES),
    fast=[*(("tlm", mesh) for mesh in MESHES), *((stage, "all") for stage in KINDS)],
)


def batch_of(stage, seed):
    sizes = stage.sizes()
    batch = fake_batch(
        ROWS, seed=seed, frames=sizes.get("F", 0), size=sizes.get("S", 0), segments=1,
        prompt_len=sizes["P"], text_len=sizes["T"], vocab_size=recipe().tokenizer.vocab_size,
    )  # fmt: skip
    batch |= {k: batch[k][:, : sizes["M"]] for k in ("target_at", "targets", "weights")}
    batch["weights"][:3, 2:] = 0  # devices have different shares of the targets
    return batch


def put(tree, like):
    return jax.device_put(tree, shardings_of(like))


def begin(stage, tx=SGD):
    """State and frozen parameters, the same on every mesh, where they belong."""
    trainable, frozen = stage.abstract_params()
    state = init_state(tiny.filled(trainable), tx)
    return put(state, abstract_state(trainable, tx, stage.mesh)), put(
        tiny.filled(frozen, 1), frozen
    )


def run_steps(stage, n=2, tx=SGD):
    """The state after n steps, and the metrics of the last."""
    first, frozen = begin(stage, tx)
    step = make_train_step(
        stage.objective, tx, seed=stage.recipe.seed, accumulate=stage.config.accumulate
    )
    step = with_mesh(stage.mesh, step)
    step = jax.jit(step, out_shardings=(shardings_of(first), None))
    state, metrics = first, {}
    for seed in range(n):
        batch = put(batch_of(stage, seed), stage.batch_shapes())
        state, metrics = step(state, frozen, batch)
    return state, metrics


CONNECTORS = {
    "cross_attention": ({"kind": "cross_attention", "every": 1, "heads": 4, "head_dim": 8},
                        ("perceiver", "connector")),
    "words": ({"kind": "words", "hard": False}, ("mlp", "connector")),
    "qformer": ({"kind": "qformer", "queries": 4, "width": 32, "depth": 2, "heads": 4,
                 "mlp_dim": 64}, ("connector", "fc_out")),
    "c_abstractor": ({"kind": "c_abstractor", "queries": 1, "hidden_dim": 32, "blocks": 1},
                     ("connector",)),
    "shuffle": ({"kind": "mlp", "hidden_dim": 32, "pool": "shuffle", "norm": True},
                ("connector",)),
}  # fmt: skip


@functools.cache
def with_connector(name):
    """The recipe with a stage `llava` whose chain has another connector."""
    whole = recipe()
    spec, chain = CONNECTORS[name]
    stage = dataclasses.replace(whole.stages["llava"], chain=chain)
    return dataclasses.replace(
        whole, components={**whole.components, "connector": spec},
        stages={**whole.stages, "llava": stage},
    )  # fmt: skip


@functools.cache
def one_device(stage):
    return jax.device_get(run_steps(program(stage)))


def assert_close(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for path, leaf in tiny.paths(theirs).items():
        off = np.abs(np.asarray(tiny.paths(ours)[path]) - leaf).max()
        assert off <= max(1e-5 * np.abs(leaf).max(), 1e-8), (
            f"{path}: {off}, of {np.abs(leaf).max()}"
        )


@pytest.mark.parametrize(("stage", "mesh"), PAIRS)
def test_many_devices_take_the_steps_of_one(stage, mesh):
    assert_close(run_steps(program(stage, mesh)), one_device(stage))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONNECTORS)
def test_many_devices_take_the_steps_of_one_with_every_connector(name):
    one, many = (program("llava", mesh, everything=with_connector(name)) for mesh in (None, "all"))
    assert_close(run_steps(many), jax.device_get(run_steps(one)))
    assert_same_texts(one, many)


def test_the_recipes_own_optimizer_takes_the_step_of_one_device():
    """Clipping by the norm of all shards, moments and update of AdamW."""
    ends = []
    for mesh in (None, "all"):
        stage = program("vadapter", mesh)
        optim = dataclasses.replace(stage.config.optim, clip=0.01, warmup=0)
        tx = make_optimizer(optim, stage.config.steps)
        end, metrics = run_steps(stage, 1, tx)
        assert metrics["grad_norm"] > 2 * optim.clip  # and so it is clipped
        ends.append(jax.device_get(end))
    one, many = ends
    assert_close(many.opt_state, one.opt_state)
    filled = tiny.filled(program("vadapter").abstract_params()[0])
    adam = optax.tree_utils.tree_get(one.opt_state, "mu")
    for path, mean in tiny.paths(adam).items():
        sure = np.abs(mean) > 1e-3 * np.abs(mean).max()  # Adam makes rounding of nothing a step
        old, new = (tiny.paths(end.params)[path][sure] for end in ends)
        start = tiny.paths(filled)[path][sure]
        assert np.abs(new - start).max() > 0, path
        np.testing.assert_allclose(new - start, old - start, rtol=1e-2, atol=1e-6, err_msg=path)


def test_a_step_leaves_the_state_where_it_is():
    stage = program("decoder", "tensor")  # whose small leaves the compiler would like to gather
    state, frozen, batch = random_arguments(stage)
    before = shardings_of(state)
    after, _ = stage.jit_train_step()(state, frozen, batch)
    for path, leaf in tiny.paths(after).items():
        assert leaf.sharding.is_equivalent_to(tiny.paths(before)[path], leaf.ndim), path


def test_micro_batches_on_many_devices_take_the_steps_of_one():
    assert_close(run_steps(program("decoder", "all", accumulate=2)), one_device("decoder"))


def test_texts_do_not_depend_on_the_devices():
    assert_same_texts(program("vadapter"), program("vadapter", "all"))


def assert_same_texts(*stages):
    texts = []
    for stage in stages:
        state, frozen = begin(stage)
        batch = put(batch_of(stage, 0), stage.batch_shapes())
        out = jax.jit(stage.decode(Decode(8)))(state.params | frozen, batch)
        texts.append(jax.device_get(out))
    np.testing.assert_array_equal(texts[0]["tokens"], texts[1]["tokens"])
    np.testing.assert_allclose(texts[0]["logprob"], texts[1]["logprob"], rtol=1e-5)
    assert len({tuple(row) for row in texts[0]["tokens"].tolist()}) > 1, "a test of nothing"


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("stage", STAGES)
def test_matrices_and_their_moments_are_sharded_equally_over_all_devices(stage, mesh):
    stage = program(stage, mesh)
    parts = stage.mesh.shape["fsdp"] * stage.mesh.shape["tensor"]
    matrices = 0
    for path, leaf in tiny.paths(begin(stage)).items():
        if leaf.ndim >= 2 and path.endswith(("kernel", "embedding")):
            matrices += 1
            sizes = {shard.data.size for shard in leaf.addressable_shards}
            assert sizes == {leaf.size // parts}, f"{path} {leaf.shape} {leaf.sharding.spec}"
    assert matrices > 10


@pytest.mark.parametrize("mesh", ["all", None])
def test_a_state_saved_on_one_mesh_has_the_same_digests_on_another(tmp_path, mesh):
    state, other = begin(program("tlm", "data"))[0], program("tlm", mesh)
    like = abstract_state(other.abstract_params()[0], SGD, other.mesh)
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(1, state, {"stage": "tlm"})
    found = checkpointer.restore(like, expect={"stage": "tlm"})
    checkpointer.close()
    assert found is not None
    restored = found[0]
    assert tree_digests(restored) == tree_digests(state)
    for path, leaf in tiny.paths(restored).items():
        assert leaf.sharding == tiny.paths(like)[path].sharding, path
