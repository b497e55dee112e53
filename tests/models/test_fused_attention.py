"""The TPU's attention kernel, interpreted on the CPU, beside `attend`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from vadapter.distributed.mesh import AXES, MeshConfig, batch_sharding, make_mesh, with_mesh
from vadapter.distributed.topology import CHIPS, Topology, devices
from vadapter.models import fused_attention
from vadapter.models.fused_attention import Kernel
from vadapter.models.layers import ATTENTION, Attention, attend
from vadapter.models.rope import factors, rotate
from vadapter.models.transformer import text_mask
from vadapter.plan import hlo
from vadapter.plan.compiled_stats import no_compilation_cache
from vadapter.stages import flops


def inputs(kernel, batch, queries, keys, dtype=jnp.float32):
    """Queries, keys, values and the gradient of the outputs, and positions of the keys."""
    rng = np.random.default_rng(0)
    of_q, of_kv = (n * kernel.head_dim for n in (kernel.heads, kernel.kv_heads))
    shapes = ((queries, of_q), (keys, of_kv), (keys, of_kv), (queries, of_q))
    arrays = [jnp.asarray(rng.standard_normal((batch, *shape)), dtype) for shape in shapes]
    return (*arrays, jnp.asarray(rng.integers(0, 100, (batch, keys))))


def mask_of(batch, queries, keys):
    """The last rows of the mask of a padded prefix and two texts."""
    rng = np.random.default_rng(1)
    prefix, padded = keys // 3, rng.integers(0, keys // 4, batch)
    segments = np.where(np.arange(keys) < prefix, -1, np.where(np.arange(keys) < keys // 2, 1, 2))
    segments = np.where(np.arange(keys) >= keys - padded[:, None], 0, segments)
    return text_mask(jnp.asarray(segments))[:, -queries:]


def plain(kernel, freq, q, k, v, mask, positions):
    """The same attention by `attend`, with an axis of heads."""
    q, k, v = (x.reshape(*x.shape[:2], -1, kernel.head_dim) for x in (q, k, v))
    if freq is not None:
        q = rotate(q, positions[:, -q.shape[1] :], freq)
        k = rotate(k, positions, freq)
    y = attend(q, k, v, mask, kernel.scale)
    return y.reshape(*y.shape[:2], -1)


def compare(kernel, queries, keys, masked=True, dtype=jnp.float32, atol=5e-6, batch=2):
    q, k, v, do, positions = inputs(kernel, batch, queries, keys, dtype)
    mask = mask_of(batch, queries, keys) if masked else None
    freq = 0.9 ** jnp.arange(kernel.pairs) if kernel.pairs else None
    rotary = None if freq is None else factors(positions, freq)
    y, back = jax.vjp(lambda q, k, v: kernel(q, k, v, mask, rotary), q, k, v)
    expected, expected_back = jax.vjp(
        lambda q, k, v: plain(kernel, freq, q, k, v, mask, positions), q, k, v
    )
    for name, a, b in zip(
        ("o", "dq", "dk", "dv"), (y, *back(do)), (expected, *expected_back(do)), strict=True
    ):
        assert a.dtype == b.dtype == dtype
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=atol * max(1, np.abs(b).max()), err_msg=name)


HEADS = [(heads, kv) for heads in (1, 2, 4, 9) for kv in (1, 2, 3) if heads % kv == 0]
SIZES = [(64, 32), (64, 0), (64, 16), (128, 64), (256, 128)]  # head dim, rotated pairs


# Every grouping of heads, and every size.
CASES = [(h, SIZES[i % 3]) for i, h in enumerate(HEADS)] + [((4, 2), size) for size in SIZES[3:]]


@pytest.mark.parametrize(("heads", "size"), [
    pytest.param(*case, marks=[pytest.mark.slow] * (i not in (1, 2, 6, 8)))
    for i, case in enumerate(CASES)
])  # fmt: skip
def test_outputs_and_gradients_are_those_of_attend(heads, size):
    (heads, kv_heads), (head_dim, pairs) = heads, size
    compare(Kernel(heads, kv_heads, head_dim, 0.2, pairs, interpret=True), 16, 24)


def test_without_a_mask_every_query_attends_to_every_key():
    compare(Kernel(2, 1, 64, 0.0, interpret=True), 24, 24, masked=False)


def test_a_last_block_of_queries_that_is_not_full_adds_nothing_to_its_keys(monkeypatch):
    kernel = Kernel(2, 1, 64, 0.0, 32, interpret=True)
    monkeypatch.setattr(fused_attention, "ROWS", (16,))
    monkeypatch.setattr(fused_attention, "VMEM", kernel.vmem(16, 48))
    assert kernel.rows(40, 48) == 16
    compare(kernel, 40, 48)


def test_bfloat16_differs_from_attend_by_its_rounding():
    compare(Kernel(4, 1, 64, 0.0, 32, interpret=True), 16, 24, dtype=jnp.bfloat16, atol=2**-6)


@pytest.mark.parametrize("heads", [(4, 1), (4, 2)])
def test_devices_compute_their_own_rows_and_heads(heads):
    kernel = Kernel(heads[0], heads[1], 64, 0.0, 32, interpret=True)
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    q, k, v, do, positions = inputs(kernel, 2, 16, 24)
    mask, rotary = mask_of(2, 16, 24), factors(positions, 0.9 ** jnp.arange(32))

    def both(q, k, v):
        y, back = jax.vjp(lambda q, k, v: kernel(q, k, v, mask, rotary), q, k, v)
        return y, back(do)

    placed = jax.device_put((q, k, v), batch_sharding(mesh))
    sharded = jax.tree.leaves(jax.jit(with_mesh(mesh, both))(*placed))
    assert len(sharded[0].addressable_shards[0].data) == 1
    for a, b in zip(sharded, jax.tree.leaves(both(q, k, v)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


# -- where it is used ------------------------------------------------------------------------------


def program(platform="tpu", dtype=jnp.bfloat16, queries=16, mutable=(), cache=False, **fields):
    """The program of an attention layer on a device of a platform, as text."""
    module = Attention(**{"heads": 4, "kv_heads": 1, "head_dim": 64, "dtype": dtype} | fields)
    x = jax.ShapeDtypeStruct((2, queries, 32), dtype)
    positions = jax.ShapeDtypeStruct((2, queries), jnp.int32)
    call = functools.partial(module.init, jax.random.key(0))
    variables = jax.eval_shape(lambda x: call(x), x)
    slots = jnp.zeros((2, 64, queries), dtype), jnp.zeros((2, queries, 64), dtype)

    def apply(variables, x, positions):
        return module.apply(
            variables, x, positions=positions, freq=jnp.ones(32), mutable=list(mutable),
            cache=slots if cache else None,
        )  # fmt: skip

    device = jax.sharding.AbstractDevice("any", 1, platform)
    mesh = AbstractMesh((1,) * 3, AXES, (AxisType.Auto,) * 3, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return str(jax.make_jaxpr(apply)(variables, x, positions))


def test_a_tpu_uses_it_in_bfloat16():
    assert "attention_forward" in program()


@pytest.mark.parametrize("other", [
    {"platform": "cpu"}, {"platform": "gpu"}, {"dtype": jnp.float32}, {"softcap": 50.0},
    {"cache": True}, {"fused": False}, {"mutable": (ATTENTION,)}, {"head_dim": 80}, {"queries": 12},
], ids=str)  # fmt: skip
def test_nothing_else_does(other):
    assert "attention_forward" not in program(**other)


def on_tpu(*sizes, **axes):
    """Whether heads, KV heads and head dim of these sizes are computed by it."""
    device = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    shape = tuple(axes.get(axis, 1) for axis in AXES)
    mesh = AbstractMesh(shape, AXES, (AxisType.Auto,) * 3, abstract_device=device)
    heads, kv_heads, head_dim, pairs, queries, keys = sizes
    kernel = Kernel(heads, kv_heads, head_dim, 0.0, pairs)
    with jax.sharding.use_abstract_mesh(mesh):
        return kernel.is_faster(8, queries, keys, jnp.bfloat16)


@pytest.mark.parametrize(("used", "sizes"), [
    (True, (8, 1, 256, 128, 328, 328)),  # llm_1b
    (True, (16, 1, 256, 128, 328, 328)),  # llm_8b
    (True, (12, 1, 64, 32, 256, 256)),  # tlm_108m
    (True, (9, 3, 64, 32, 256, 256)),  # SmolLM2
    (True, (32, 8, 128, 64, 328, 328)),  # Llama
    (True, (12, 12, 64, 0, 256, 2048)),  # a resampler on a clip
    (False, (16, 16, 64, 0, 256, 256)),  # a ViT: nothing to rotate, few scores
    (True, (16, 16, 64, 0, 512, 512)),  # the same with more
    (False, (8, 1, 256, 128, 4096, 4096)),  # too many keys for the vector memory
])  # fmt: skip
def test_it_is_used_where_it_gains_time_and_fits(used, sizes):
    assert on_tpu(*sizes) == used


def test_it_is_not_used_where_a_device_has_query_heads_of_a_kv_head_it_has_not():
    sizes = (8, 2, 64, 32, 64, 64)
    assert on_tpu(*sizes, tensor=2)
    assert not on_tpu(*sizes, tensor=4)
    assert on_tpu(8, 1, 64, 32, 64, 64, tensor=4)


def test_the_scores_of_a_device_are_counted():
    vit = (16, 16, 64, 0, 512, 512)
    assert on_tpu(*vit)
    assert not on_tpu(*vit, data=2)
    assert not on_tpu(*vit, tensor=2)


def test_flops_are_those_of_attend_forward_and_of_its_recomputation_backward():
    kernel = Kernel(4, 2, 64, 0.0)
    q, k, v, do, _ = inputs(kernel, 2, 16, 24)
    forward = flops.count(lambda q, k, v: kernel(q, k, v, None, None), q, k, v)
    assert forward == flops.count(lambda q, k, v: plain(kernel, None, q, k, v, None, None), q, k, v)

    def both(q, k, v):
        return jax.vjp(lambda q, k, v: kernel(q, k, v, None, None), q, k, v)[1](do)

    assert flops.count(both, q, k, v) == forward * 7 // 2
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    assert flops.count(with_mesh(mesh, both), q, k, v) == forward * 7 // 2


@pytest.mark.libtpu
@pytest.mark.parametrize("chip", [name for name, row in CHIPS.items() if row.kind == "tpu"])
@pytest.mark.parametrize("shape", [(8, 1, 256, 128, 64, 328), (12, 1, 64, 32, 256, 256)])
def test_the_tpus_compiler_compiles_it(chip, shape):
    topology = Topology(chip, min(CHIPS[chip].shapes.items())[1])
    mesh = make_mesh(MeshConfig(), devices(topology))
    heads, kv_heads, head_dim, pairs, queries, keys = shape
    kernel = Kernel(heads, kv_heads, head_dim, 0.0, pairs)
    place = batch_sharding(mesh)

    def shaped(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((mesh.size, *shape), dtype, sharding=place)

    def both(q, k, v, do, mask, rotary):
        y, back = jax.vjp(lambda q, k, v: kernel(q, k, v, mask, rotary), q, k, v)
        return y, back(do)

    of_q, of_kv = shaped(queries, heads * head_dim), shaped(keys, kv_heads * head_dim)
    rotary = (shaped(keys, pairs, dtype=jnp.float32),) * 2
    arguments = (of_q, of_kv, of_kv, of_q, shaped(queries, keys, dtype=bool), rotary)
    with no_compilation_cache():
        program = jax.jit(with_mesh(mesh, both)).lower(*arguments).compile()
    work = hlo.walk(program.as_text() or "")
    assert sum(work.kernels.values()) == 2
    assert work.flops * mesh.size == flops.count(with_mesh(mesh, both), *arguments)
