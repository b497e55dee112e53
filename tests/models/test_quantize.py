"""Weight-only int8 and int4: how far from full precision, where they lie, what is never held."""

import dataclasses
import sys
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.dtypes import itemsize_bits
from support import tiny

from vadapter.distributed.mesh import MeshConfig, make_mesh, with_mesh
from vadapter.errors import ConfigError
from vadapter.models.lm import LM, LMConfig, empty_cache
from vadapter.models.quantize import STORED, full_precision, library, quantize
from vadapter.models.quantized_linear import QuantizedLinear
from vadapter.models.registry import make_module
from vadapter.stages import outline

T, V, E = 16, 64, 32
CONFIG = LMConfig(V, width=E, depth=3, heads=4, mlp_dim=64, max_len=64)
KINDS = {
    "parallel, tied": {},
    "serial, head, biases, gelu": {
        "parallel": False, "tied": False, "bias": True, "mlp": "gelu", "kv_heads": 4,
        "positions": "learned", "norm": "layer",
    },
}  # fmt: skip
# How kernels are stored, and how far logits are then from those of full precision, on average: a
# step is 0.8 % of the largest weight with int8, 13 % with int4.
FORMS = {
    "int8": ({"int8": True}, 0.02),
    "int8 by groups": ({"int8": True, "scale_group": 8}, 0.02),
    "int4": ({"int4": True}, 0.25),
    "int4 by groups": ({"int4": True, "scale_group": 8}, 0.2),
}


def abstract(module, mesh=None):
    """Shapes of the module's parameters, with shardings if there is a mesh."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    boxed = jax.eval_shape(lambda k: module.init(k, tokens), jax.random.key(0))["params"]
    if mesh is None:
        return nn.unbox(boxed)
    return outline.abstract(boxed, mesh)


def leaves(params):
    return traverse_util.flatten_dict(params, sep="/").items()


def pair(config=CONFIG, dtype=jnp.float32, seed=0, form="int8"):
    """A model, its parameters, and both of integers."""
    full, small = (LM(dataclasses.replace(config, **f), dtype) for f in ({}, FORMS[form][0]))
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), tiny.filled(abstract(full), seed))
    return full, params, small, quantize(leaves(params), abstract(small))


def states(module, params, x):
    shape = x.shape[:2]
    positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((shape[1],) * 2, bool)), (*shape, shape[1]))
    call = {"method": "hidden", "positions": positions, "mask": mask}
    return module.apply({"params": params}, x, **call)[0]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def tokens(rng):
    return jnp.asarray(rng.integers(0, V, (8, T)), jnp.int32)


@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_weight_is_off_by_half_a_step_of_its_group_and_output_at_most(dtype, stored, groups, rng):
    kernel = rng.standard_normal((2, 40, 6)) * 10.0 ** np.arange(-4, 2)  # outputs of all sizes
    kernel[0, :, 3] = 0
    kernel = jnp.asarray(kernel, dtype)
    integers = jax.ShapeDtypeStruct(kernel.shape, STORED[stored])
    scale = jax.ShapeDtypeStruct((2, groups, 6), jnp.float32)
    made = quantize([("q/kernel", kernel)], {"q": {"kernel": integers, "kernel_scale": scale}})["q"]
    assert made["kernel"].dtype == STORED[stored]
    assert (made["kernel_scale"].shape, made["kernel_scale"].dtype) == (scale.shape, scale.dtype)
    grouped = lambda x: np.asarray(x, np.float32).reshape(2, groups, -1, 6)  # noqa: E731
    error = np.abs(grouped(made["kernel"]) * grouped(made["kernel_scale"]) - grouped(kernel))
    bits = {"int8": 8, "int4": 4}[stored]
    bound = np.abs(grouped(kernel)).max(2, keepdims=True) / (2**bits - 1)
    assert (error <= bound * (1 + 1e-4)).all()
    assert error.max() > bound.max() / 2, "the steps are not finer"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_logits_are_close_to_those_of_full_precision(kind, form, tokens):
    full, params, small, made = pair(dataclasses.replace(CONFIG, **KINDS[kind]), form=form)
    want, got = (
        jax.jit(lambda p, m=m: m.apply({"params": p}, tokens))(p)
        for m, p in ((full, params), (small, made))
    )
    error = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert 1e-4 < error.mean() < FORMS[form][1]
    assert error.max() < 2.5 * FORMS[form][1]


def test_groups_are_closer_than_outputs(tokens):
    def distance(form):
        full, params, small, made = pair(form=form)
        want, got = (m.apply({"params": p}, tokens) for m, p in ((full, params), (small, made)))
        return np.linalg.norm(got - want)

    assert distance("int4 by groups") < 0.9 * distance("int4")
    assert distance("int8") < 0.1 * distance("int4 by groups")


@pytest.mark.parametrize("form", ["int8", "int4 by groups"])
def test_cached_decoding_equals_the_whole_pass(form, tokens):
    _, _, small, made = pair(form=form)
    words = small.apply({"params": made}, tokens, method="embed")
    whole = jax.jit(states, static_argnums=0)(small, made, words)

    @jax.jit
    def step(cache, x, i):
        at = jnp.full((len(tokens), 1), i)
        slots = jnp.broadcast_to(jnp.arange(T), (len(tokens), T))
        return small.apply(
            {"params": made}, x, method="hidden", positions=at, mask=(slots <= i)[:, None],
            key_positions=slots, cache=cache, index=i,
        )  # fmt: skip

    cache = empty_cache(small.config, len(tokens), T)
    for i in range(T):
        state, cache = step(cache, words[:, i : i + 1], i)
        np.testing.assert_allclose(state[:, 0], whole[:, i], atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "names"])
def test_the_gradient_to_the_prefix_is_close_to_that_of_full_precision(remat, rng):
    full, params, small, made = pair(dataclasses.replace(CONFIG, remat=remat))
    x = jnp.asarray(rng.standard_normal((2, T, E)), jnp.float32)
    pick = jnp.asarray(rng.standard_normal((2, T, V)), jnp.float32)

    def readout(module, x, params):
        logits = module.apply({"params": params}, states(module, params, x), method="logits")
        return (jax.nn.log_softmax(logits) * pick).sum()

    want, got = (
        jax.jit(jax.grad(readout, argnums=1), static_argnums=0)(m, x, p)
        for m, p in ((full, params), (small, made))
    )
    assert 1e-4 < np.linalg.norm(got - want) / np.linalg.norm(want) < 0.03


@pytest.mark.parametrize("form", FORMS)
def test_full_precision_is_what_the_module_has_without_integers(form):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    for kind in KINDS.values():
        config = dataclasses.replace(CONFIG, **kind)
        full, small = (LM(dataclasses.replace(config, **f)) for f in ({}, FORMS[form][0]))
        for where in (None, mesh):
            want = abstract(full, where)
            assert full_precision(abstract(small, where)) == want
            assert full_precision(want) == want


@pytest.mark.parametrize(
    ("stored", "group", "share"), [("int8", 0, 0.5), ("int4", 0, 0.25), ("int4", 64, 0.28)]
)
def test_kernels_take_their_share_of_bfloat16_and_the_rest_stays_as_it_is(stored, group, share):
    config = dataclasses.replace(CONFIG, width=256, mlp_dim=512, tied=False, bias=True)
    form = {stored: True, "scale_group": group}
    full, small = (abstract(LM(dataclasses.replace(config, **f))) for f in ({}, form))
    full, small = dict(leaves(full)), dict(leaves(small))
    kernels = {path for path in full if path.endswith("kernel")}
    assert {p.split("/")[-2] for p in kernels} == {*"qkvo", "gate", "up", "down", "head"}
    assert small.keys() == full.keys() | {f"{p}_scale" for p in kernels}
    assert {p for p, leaf in small.items() if leaf.dtype == STORED[stored]} == kernels
    assert all(small[p].shape == full[p].shape for p in full)
    size = sum(
        x.size * itemsize_bits(x.dtype) / 8
        for p, x in small.items()
        if p not in full.keys() - kernels
    )
    assert share < size / sum(2 * full[p].size for p in kernels) < share + 0.01


@pytest.mark.parametrize("form", ["int8", "int4 by groups"])
def test_on_a_mesh_scales_are_sharded_like_their_outputs_with_the_same_results(form, tokens):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    config = dataclasses.replace(CONFIG, tied=False)
    _, params, small, alone = pair(config, form=form)
    shapes = abstract(small, mesh)
    place = jax.tree.map(lambda x: x.sharding, full_precision(shapes))
    made = quantize(leaves(jax.device_put(params, place)), shapes)
    jax.tree.map(np.testing.assert_array_equal, made, alone)
    for path, leaf in leaves(made):
        assert leaf.sharding.is_equivalent_to(dict(leaves(shapes))[path].sharding, leaf.ndim)
    block = made["stack"]["blocks"]
    spec = lambda layer: [tuple(layer[k].sharding.spec) for k in ("kernel", "kernel_scale")]  # noqa: E731
    assert spec(block["mlp"]["up"]) == [(None, "fsdp", "tensor"), (None, None, "tensor")]
    assert spec(block["mlp"]["down"]) == [(None, "tensor", "fsdp"), (None, None, None)]
    assert spec(made["head"]) == [(None, ("tensor", "fsdp"))] * 2
    run = lambda p, t: small.apply({"params": p}, t)  # noqa: E731
    many = jax.jit(with_mesh(mesh, run))(made, tokens)
    np.testing.assert_allclose(many, jax.jit(run)(alone, tokens), atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "names", "dots"])
def test_no_pass_holds_the_floats_of_more_than_a_few_kernels(remat):
    config = dataclasses.replace(CONFIG, width=128, depth=16, mlp_dim=512, tied=False, remat=remat)
    module = LM(dataclasses.replace(config, int8=True))
    shapes = abstract(module)
    layer = sum(x.size * 4 for x in jax.tree.leaves(shapes["stack"]["blocks"])) / config.depth

    def temporary(tokens):
        x = jax.ShapeDtypeStruct((1, tokens, config.width), jnp.float32)
        energy = lambda x, p: jnp.square(states(module, p, x)).sum()  # noqa: E731
        step = jax.jit(jax.grad(energy)).lower(x, shapes).compile()
        return step.memory_analysis().temp_size_in_bytes

    few, more = temporary(1), temporary(2)
    activations = more - few  # of one token
    assert few - activations < 3 * layer


def test_a_leaf_is_freed_before_the_next_is_read():
    _, params, small, _ = pair()
    seen = []

    def read():
        for path, leaf in leaves(params):
            assert all(old() is None for old in seen), path
            fresh = leaf + 0
            if path.endswith("kernel"):
                seen.append(weakref.ref(fresh))
            yield path, fresh
            del fresh

    quantize(read(), abstract(small))
    assert len(seen) == 7


@pytest.mark.parametrize(("stored", "group"), [("int8", 0), ("int4", 0), ("int4", 16)])
def test_a_random_start_has_the_variance_of_any_other(stored, group):
    module = QuantizedLinear(64, (None, None), stored=STORED[stored], group=group)
    x = jnp.ones((1, 48))
    params = nn.unbox(module.init(tiny.key(0), x)["params"])
    scale = np.asarray(params["kernel_scale"])
    kernel = np.asarray(params["kernel"], np.float32) * np.repeat(scale, 48 // len(scale), 0)
    assert np.std(kernel) == pytest.approx(48**-0.5, rel=0.05)


def test_a_language_model_may_be_int8_and_nothing_else_may():
    spec = {"kind": "lm", "width": 8, "depth": 1, "heads": 2, "mlp_dim": 8, "vocab_size": 8}
    module = make_module("llm", spec | {"int8": True})
    assert jax.tree.leaves(abstract(module)["stack"]["blocks"]["attn"]["q"])[0].dtype == jnp.int8
    with pytest.raises(ConfigError, match=r"^components\.encoder\.int8: unknown key"):
        make_module("encoder", {"size": "coca_b", "int8": True})


def test_without_qwix_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ConfigError, match=r"int8 and int4 need qwix.*'vadapter\[int8\]'"):
        library()


def test_a_group_that_does_not_divide_the_inputs_is_refused_with_both_numbers():
    module = LM(dataclasses.replace(CONFIG, int4=True, scale_group=24))
    with pytest.raises(ConfigError, match=r"scale_group=24 does not divide the 32 inputs"):
        abstract(module)
