"""Weight-only int8: how far it is from full precision, where it lies, and what it never holds."""

import dataclasses
import sys
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from support import tiny

from vadapter.distributed.mesh import MeshConfig, make_mesh, with_mesh
from vadapter.errors import ConfigError
from vadapter.models.int8_linear import Int8Linear
from vadapter.models.lm import LM, LMConfig, empty_cache
from vadapter.models.quantize import full_precision, library, quantize
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


def abstract(module, mesh=None):
    """Shapes of the module's parameters, with shardings if there is a mesh."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    boxed = jax.eval_shape(lambda k: module.init(k, tokens), jax.random.key(0))["params"]
    if mesh is None:
        return nn.unbox(boxed)
    return outline.abstract(boxed, mesh)


def leaves(params):
    return traverse_util.flatten_dict(params, sep="/").items()


def pair(config=CONFIG, dtype=jnp.float32, seed=0):
    """A model, its parameters, and both in int8."""
    full, small = (LM(dataclasses.replace(config, int8=int8), dtype) for int8 in (False, True))
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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_weight_is_off_by_half_a_step_of_its_own_output_at_most(dtype, rng):
    kernel = rng.standard_normal((2, 40, 6)) * 10.0 ** np.arange(-4, 2)  # outputs of all sizes
    kernel[0, :, 3] = 0
    kernel = jnp.asarray(kernel, dtype)
    int8 = jax.ShapeDtypeStruct(kernel.shape, jnp.int8)
    scale = jax.ShapeDtypeStruct((2, 1, 6), jnp.float32)
    made = quantize([("q/kernel", kernel)], {"q": {"kernel": int8, "kernel_scale": scale}})["q"]
    assert made["kernel"].dtype == jnp.int8
    assert (made["kernel_scale"].shape, made["kernel_scale"].dtype) == (scale.shape, scale.dtype)
    kernel = np.asarray(kernel, np.float32)
    error = np.abs(made["kernel"] * np.asarray(made["kernel_scale"]) - kernel)
    bound = np.abs(kernel).max(1, keepdims=True) / 255
    assert (error <= bound * (1 + 1e-4)).all()
    assert error.max() > bound.max() / 2, "the steps are those of 8 bits, not of more"


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_close_to_those_of_full_precision(kind, tokens):
    full, params, small, made = pair(dataclasses.replace(CONFIG, **KINDS[kind]))
    want, got = (
        jax.jit(lambda p, m=m: m.apply({"params": p}, tokens))(p)
        for m, p in ((full, params), (small, made))
    )
    error = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert 1e-4 < error.mean() < 0.02  # a step is 0.8 % of the largest weight
    assert error.max() < 0.05


def test_cached_decoding_equals_the_whole_pass(tokens):
    _, _, small, made = pair()
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


def test_full_precision_is_what_the_module_has_without_int8():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    for kind in KINDS.values():
        config = dataclasses.replace(CONFIG, **kind)
        full, small = (LM(dataclasses.replace(config, int8=i)) for i in (False, True))
        for where in (None, mesh):
            want = abstract(full, where)
            assert full_precision(abstract(small, where)) == want
            assert full_precision(want) == want


def test_kernels_take_half_of_bfloat16_and_the_rest_stays_as_it_is():
    config = dataclasses.replace(CONFIG, width=256, mlp_dim=512, tied=False, bias=True)
    full, small = (abstract(LM(dataclasses.replace(config, int8=i))) for i in (False, True))
    full, small = dict(leaves(full)), dict(leaves(small))
    kernels = {path for path in full if path.endswith("kernel")}
    assert {p.split("/")[-2] for p in kernels} == {*"qkvo", "gate", "up", "down", "head"}
    assert small.keys() == full.keys() | {f"{p}_scale" for p in kernels}
    assert {p for p, leaf in small.items() if leaf.dtype == jnp.int8} == kernels
    assert all(small[p].shape == full[p].shape for p in full)
    size = sum(
        x.size * x.dtype.itemsize for p, x in small.items() if p not in full.keys() - kernels
    )
    assert 1 / 2 < size / sum(2 * full[p].size for p in kernels) < 0.51


def test_on_a_mesh_scales_are_sharded_like_their_outputs_with_the_same_results(tokens):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    config = dataclasses.replace(CONFIG, tied=False)
    _, params, small, alone = pair(config)
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


def test_a_random_start_has_the_variance_of_any_other():
    module = Int8Linear(64, (None, None))
    x = jnp.ones((1, 48))
    params = nn.unbox(module.init(tiny.key(0), x)["params"])
    kernel = params["kernel"] * np.asarray(params["kernel_scale"])
    assert np.std(kernel) == pytest.approx(48**-0.5, rel=0.05)


def test_a_language_model_may_be_int8_and_nothing_else_may():
    spec = {"kind": "lm", "width": 8, "depth": 1, "heads": 2, "mlp_dim": 8, "vocab_size": 8}
    module = make_module("llm", spec | {"int8": True})
    assert jax.tree.leaves(abstract(module)["stack"]["blocks"]["attn"]["q"])[0].dtype == jnp.int8
    with pytest.raises(ConfigError, match=r"^components\.encoder\.int8: unknown key"):
        make_module("encoder", {"size": "coca_b", "int8": True})


def test_without_qwix_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ConfigError, match=r"int8=True needs qwix.*'vadapter\[int8\]'"):
        library()
