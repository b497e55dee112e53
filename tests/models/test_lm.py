"""The stack and the decoder language model: who sees whom, scan, rematerialization, switches."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from vadapter.distributed.compile import LOOPS, unrolls
from vadapter.models.lm import LM, LMConfig
from vadapter.models.rope import RopeConfig, frequencies
from vadapter.models.transformer import (
    REMAT,
    Block,
    BlockConfig,
    PerLayer,
    Stack,
    text_mask,
    with_runs,
)

T = 8


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def table(rows):
    return np.array([[c == "1" for c in row.split()] for row in rows])


def test_text_mask_is_this_table():
    mask = text_mask(jnp.array([[-1, -1, 1, 1, 2, 0]]))
    expected = table([
        "1 0 0 0 0 0",
        "1 1 0 0 0 0",
        "1 1 1 0 0 0",
        "1 1 1 1 0 0",
        "1 1 0 0 1 0",
        "1 1 0 0 0 0",
    ])  # fmt: skip
    np.testing.assert_array_equal(mask[0], expected)


def test_text_mask_with_padding_before_the_prefix_is_this_table():
    mask = text_mask(jnp.array([[0, -1, -1, 1, 1]]))
    expected = table([
        "0 0 0 0 0",
        "0 1 0 0 0",
        "0 1 1 0 0",
        "0 1 1 1 0",
        "0 1 1 1 1",
    ])  # fmt: skip
    np.testing.assert_array_equal(mask[0], expected)


@pytest.mark.parametrize(
    "switches",
    [{}, {"parallel": False, "positions": "learned", "kv_heads": 2, "mlp": "gelu"}],
    ids=["parallel-rope", "serial-learned"],
)
def test_gradients_at_a_token_reach_earlier_inputs_and_no_later_ones(switches, rng):
    module, params = tiny.lm(**switches)
    positions = jnp.arange(T)[None]
    mask = jnp.tril(jnp.ones((1, T, T), bool))
    pick = rng.standard_normal((T, 16)).astype(np.float32)  # a norm's plain sum has no gradient

    def readout(x):
        out, _ = module.apply({"params": params}, x, method="hidden", positions=positions,
                              mask=mask)  # fmt: skip
        return (out[0] * pick).sum(-1)

    x = jnp.asarray(rng.standard_normal((1, T, 16)), jnp.float32)
    reach = np.abs(jax.jit(jax.jacrev(readout))(x))[:, 0].sum(-1)  # [T out, T in]
    assert (reach[np.triu_indices(T, 1)] == 0).all()
    assert (reach[np.tril_indices(T)] > 1e-4).all()


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"parallel": False, "positions": "learned", "kv_heads": 2, "remat": "names"},
        {"windows": (3, 0), "post_norms": True, "parallel": False, "qk_norm": True, "depth": 4},
        {"shared_norm": False, "depth": 1, "remat": "full"},
    ],
    ids=["parallel", "serial", "windows", "alone"],
)
def test_the_last_tokens_states_and_gradients_do_not_need_the_others_in_the_last_block(
    switches, rng
):
    module, params = tiny.lm(**switches)
    x = jnp.asarray(rng.standard_normal((2, T, 16)), jnp.float32)
    segments = jnp.array([[0, -1, -1, -1, 1, 1, 2, 2], [-1, -1, -1, -1, 1, 1, 1, 0]])
    where = {"positions": jnp.tile(jnp.arange(T), (2, 1)), "mask": text_mask(segments)}
    pick = jnp.asarray(rng.standard_normal((2, 4, 16)), jnp.float32)

    @functools.partial(jax.jit, static_argnums=1)
    def run(x, last):
        def readout(x):
            states, _ = module.apply({"params": params}, x, method="hidden", last=last, **where)
            return (states[:, -4:] * pick).sum(), states

        return jax.grad(readout, has_aux=True)(x)

    (slope, states), (every_slope, every) = run(x, 4), run(x, 0)
    assert states.shape == (2, 4, 16)
    np.testing.assert_allclose(states, every[:, -4:], atol=2e-5)
    np.testing.assert_allclose(slope, every_slope, atol=2e-5)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_segments_packed_in_one_row_equal_the_segments_in_rows_of_their_own(positions, rng):
    module, params = tiny.lm(positions=positions)
    lengths, prefix = (3, 2, 4), 2
    S = prefix + sum(lengths)
    front = rng.standard_normal((1, prefix, 16)).astype(np.float32)
    texts = [rng.integers(3, tiny.V, n) for n in lengths]

    @jax.jit
    def logits(tokens, segments, positions):
        text = module.apply({"params": params}, tokens, method="embed")
        x = jnp.concatenate([jnp.broadcast_to(front, (1, prefix, 16)), text], 1)
        states, _ = module.apply({"params": params}, x, method="hidden", positions=positions,
                                 mask=text_mask(segments))  # fmt: skip
        return module.apply({"params": params}, states, method="logits")[0]

    def row(texts):
        tokens, segments, places = [], [-1] * prefix, list(range(prefix))
        for i, text in enumerate(texts, 1):
            tokens += list(text)
            segments += [i] * len(text)
            places += list(range(prefix, prefix + len(text)))
        pad = S - len(segments)
        ints = lambda x: jnp.asarray([x + [0] * pad], jnp.int32)  # noqa: E731
        return logits(ints(tokens), ints(segments), ints(places))

    packed, at = row(texts), prefix
    for text in texts:
        alone = row([text])
        np.testing.assert_allclose(
            packed[at : at + len(text)], alone[prefix : prefix + len(text)], atol=1e-5
        )
        at += len(text)
    assert np.abs(packed[prefix] - packed[prefix + lengths[0]]).max() > 0.1


@pytest.mark.parametrize("cross", [False, True], ids=["decoder", "cross-attending"])
def test_scanned_stack_equals_a_loop_of_blocks_over_the_stacked_slices(cross, rng):
    config = BlockConfig(16, heads=4, mlp_dim=32, kv_heads=2, cross=cross)
    freq = np.stack([frequencies(RopeConfig(theta), 4) for theta in (10.0, 100.0, 1000.0)])
    layers = PerLayer(jnp.asarray(freq), jnp.asarray([2, 5, 100]))
    distance = np.arange(T)[None, :, None] - np.arange(T)[None, None, :] + np.zeros((2, 1, 1), int)
    stack = Stack(config, depth=3)
    x = rng.standard_normal((2, T, 16)).astype(np.float32)
    kv = rng.standard_normal((2, 5, 12)).astype(np.float32) if cross else None
    mask = np.tril(np.ones((2, T, T), bool))
    positions = np.tile(np.arange(T), (2, 1))
    inputs = {"mask": mask, "positions": positions, "layers": layers, "distance": distance}
    inputs["kv"] = kv
    params = tiny.init(stack, x, **inputs)
    scanned, _ = jax.jit(lambda p: stack.apply({"params": p}, x, **inputs))(params)
    one = jax.jit(lambda p, layer, mask, y: Block(config).apply(
        {"params": p}, y, None, layer, mask, positions, None, kv, None, 0)[0])  # fmt: skip
    y = x
    for i, window in enumerate((2, 5, 100)):
        slice_ = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        y = one(slice_, PerLayer(jnp.asarray(freq[i])), mask & (distance < window), y)
    np.testing.assert_allclose(scanned, y, atol=1e-5)


@pytest.fixture(scope="module")
def remat_runs():
    """policy -> (loss, gradients, bytes of temporaries) of a deep narrow model."""
    runs = {}
    tokens = np.random.default_rng(0).integers(3, tiny.V, (4, 32))
    for policy in REMAT:
        module, params = tiny.lm(depth=6, parallel=False, remat=policy)
        loss = lambda p, m=module: jnp.square(m.apply({"params": p}, tokens)).mean()  # noqa: E731
        step = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        runs[policy] = (*step(params), step.memory_analysis().temp_size_in_bytes)
    return runs


@pytest.mark.parametrize("policy", sorted(set(REMAT) - {"none"}))
def test_rematerialization_changes_memory_and_nothing_else(remat_runs, policy):
    loss, grads, temp = remat_runs[policy]
    plain_loss, plain_grads, plain_temp = remat_runs["none"]
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, plain_grads)
    assert temp < 0.7 * plain_temp, "the policy is not in effect"
    assert remat_runs["full"][2] <= temp


# Every pair of settings of two switches occurs in one of these rows.
COMBINATIONS = [
    ("rms", "swiglu", "rope", True, True),
    ("layer", "swiglu", "learned", False, False),
    ("rms", "geglu", "learned", False, True),
    ("layer", "geglu", "rope", True, False),
    ("rms", "gelu", "rope", False, False),
    ("layer", "gelu", "learned", True, True),
    ("rms", "relu", "learned", True, False),
    ("layer", "relu", "rope", False, True),
]


@pytest.mark.parametrize(("norm", "mlp", "positions", "parallel", "tied"), COMBINATIONS)
def test_every_pair_of_switches_builds_and_has_finite_gradients(
    norm, mlp, positions, parallel, tied, rng
):
    module, params = tiny.lm(
        norm=norm, mlp=mlp, positions=positions, parallel=parallel, tied=tied, bias=not tied
    )
    tokens = rng.integers(3, tiny.V, (2, T))
    loss, grads = jax.jit(
        jax.value_and_grad(lambda p: jnp.square(module.apply({"params": p}, tokens)).mean())
    )(params)
    assert np.isfinite(loss)
    for path, grad in tiny.paths(grads).items():
        assert np.isfinite(grad).all(), path
        # A bias on every key moves all scores of a query alike: softmax does not see it.
        rope_free_key_bias = path.endswith("attn/k/bias") and positions == "learned"
        assert rope_free_key_bias or np.abs(grad).max() > 0, f"{path} is not used"
    assert ("head" in params) == (not tied)
    assert ("position_embedding" in params) == (positions == "learned")
    blocks = params["stack"]["blocks"]
    assert ("norm_mlp" in blocks) == (not parallel)
    assert ("gate" in blocks["mlp"]) == mlp.endswith("glu")


def test_parameters_are_these_and_an_untied_head_is_counted_apart():
    count = lambda **kw: sum(x.size for x in jax.tree.leaves(tiny.lm(**kw)[1]))  # noqa: E731
    c = tiny.TLM
    E, K = c.width, c.width // c.heads
    attention = E * c.heads * K * 2 + E * K * 2  # q and o; one key head and one value head
    layer = attention + 3 * E * c.mlp_dim + E
    assert count() == c.vocab_size * E + c.depth * layer + E
    assert count(tied=False) == count() + E * c.vocab_size
    assert count(positions="learned") == count() + c.max_len * E


def test_parameters_at_start_have_the_stated_spread():
    module = LM(LMConfig(256, width=64, depth=2, heads=4, mlp_dim=256))
    params = nn.unbox(jax.jit(module.init)(tiny.key(0), jnp.zeros((1, 2), jnp.int32)))
    params = params["params"]
    embedded = module.apply({"params": params}, jnp.arange(256)[None], method="embed")
    assert float(embedded.std()) == pytest.approx(1.0, abs=0.05)
    down = params["stack"]["blocks"]["mlp"]["down"]["kernel"]
    assert float(down.std()) == pytest.approx(256**-0.5, rel=0.05)
    assert np.abs(down[0] - down[1]).max() > 0, "layers must not start equal"


def test_used_through_hidden_alone_a_model_has_neither_embedding_nor_head():
    module = LM(dataclasses.replace(tiny.TLM, tied=False))
    x = jnp.zeros((1, 4, 16))
    places = jnp.zeros((1, 4), jnp.int32)
    shapes = jax.eval_shape(
        lambda k: module.init(k, x, positions=places, method="hidden"), jax.random.key(0)
    )
    assert set(shapes["params"]) == {"stack", "norm"}


def test_dropout_acts_only_where_an_rng_is_given(rng):
    module, params = tiny.lm(dropout=0.5)
    plain, _ = tiny.lm()
    tokens = rng.integers(3, tiny.V, (2, T))
    silent = jax.jit(lambda p: module.apply({"params": p}, tokens))(params)
    noisy = jax.jit(lambda p, k: module.apply({"params": p}, tokens, rngs={"dropout": k}))
    a, again, b = (noisy(params, jax.random.key(s)) for s in (0, 0, 1))
    expected = jax.jit(lambda p: plain.apply({"params": p}, tokens))(params)
    np.testing.assert_array_equal(silent, expected)
    np.testing.assert_array_equal(a, again)
    assert np.abs(a - b).max() > 0.1
    assert np.abs(a - silent).max() > 0.1


def test_logits_of_a_bfloat16_model_are_close_to_those_of_its_float32_twin(rng):
    module, params = tiny.lm()
    tokens = rng.integers(3, tiny.V, (2, T))
    half = jax.jit(LM(tiny.TLM, jnp.bfloat16).apply)({"params": params}, tokens)
    full = jax.jit(module.apply)({"params": params}, tokens)
    assert half.dtype == jnp.bfloat16
    assert 0 < np.abs(half - full).max() < 0.1 * np.abs(full).max()


@pytest.mark.parametrize("last", [0, 3])
@pytest.mark.parametrize(
    ("depth", "runs", "loops"), [(3, 10, True), (3, 1e9, False), (9, 1e9, True)]
)
def test_unrolled_layers_give_the_states_and_gradients_of_the_loop(depth, runs, loops, last, rng):
    module, params = tiny.lm(depth=depth)
    x = rng.standard_normal((2, T, 16)).astype(np.float32)
    positions = jnp.broadcast_to(jnp.arange(T), (2, T))

    def fn(x):
        out, _ = module.apply(
            {"params": params}, x, method="hidden", positions=positions, last=last
        )
        return jnp.sin(out).sum()

    unrolled = with_runs(runs, jax.value_and_grad(fn))
    text = jax.jit(unrolled).lower(x).as_text()
    assert ("stablehlo.while" in text) == loops
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        unrolled(x), jax.value_and_grad(fn)(x),
    )  # fmt: skip


@pytest.mark.parametrize("use", LOOPS)
def test_loops_are_unrolled_from_some_number_of_runs_on_that_larger_layers_reach_earlier(use):
    def first(size):
        return next(n for n in range(60) if unrolls(use, 4, size, 2**n))

    assert not unrolls(use, 4, 1e9, 0)
    assert 0 < first(1e7) < first(1e6) < first(1e3)
    saved = 2 ** first(1e6) * 1e6 * LOOPS[use].copying
    assert LOOPS[use].compiling < saved <= 2 * LOOPS[use].compiling
