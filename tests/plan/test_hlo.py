"""Work read from the HLO of programs compiled here, and from lines of a TPU program."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vadapter.distributed.mesh import MeshConfig, make_mesh
from vadapter.plan.hlo import Sent, walk
from vadapter.stages import flops

D = 16


def text_of(fn, *arguments):
    return jax.jit(fn).lower(*arguments).compile().as_text() or ""


def shape(*dims, spec=None, dtype=jnp.float32):
    sharding = None if spec is None else NamedSharding(mesh(), PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)


@functools.cache
def mesh():
    return make_mesh(MeshConfig(data=4, fsdp=2), jax.devices()[:8])


def layers(x, kernels):
    """A loop of products, with a loop of products in it."""

    def inner(x, kernel):
        return jnp.tanh(x @ kernel), None

    def outer(x, kernels):
        return jax.lax.scan(inner, x, kernels)[0], None

    return jax.lax.scan(outer, x, kernels)[0]


def test_a_loop_counts_once_for_each_iteration():
    arguments = shape(8, D), shape(5, 3, D, D)
    work = walk(text_of(layers, *arguments))
    assert work.flops == flops.count(layers, *arguments) == 5 * 3 * 2 * 8 * D**2


def test_a_gradient_through_loops_counts_as_its_trace_does():
    step = jax.grad(lambda x, kernels: layers(x, kernels).sum(), argnums=1)
    arguments = shape(8, D), shape(5, 3, D, D)
    assert walk(text_of(step, *arguments)).flops == flops.count(step, *arguments)


def test_of_a_conditional_the_larger_branch_counts():
    def fn(x, kernel):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ kernel @ kernel, lambda: x @ kernel)

    assert walk(text_of(fn, shape(8, D), shape(D, D))).flops == 2 * 2 * 8 * D**2


@pytest.mark.parametrize(("stride", "padding"), [(1, "VALID"), (2, "SAME"), (4, "VALID")])
def test_a_convolution_counts_where_its_kernel_meets_the_image(stride, padding):
    def fn(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def overlap(output, size=12, kernel=4):
        pad = 0 if padding == "VALID" else max(0, kernel - stride) // 2
        return sum(0 <= output * stride + k - pad < size for k in range(kernel))

    arguments = shape(2, 12, 12, 3), shape(4, 4, 3, 8)
    outputs = jax.eval_shape(fn, *arguments).shape[1]
    products = sum(overlap(i) for i in range(outputs)) ** 2
    assert walk(text_of(fn, *arguments)).flops == 2 * 2 * products * 3 * 8


def test_every_kind_of_collective_counts_with_its_bytes_in_and_out_of_loops():
    def step(x, kernels):
        def layer(x, kernel):
            return jnp.tanh(x @ kernel), None

        return jax.lax.scan(layer, x, kernels)[0].sum()

    arguments = (
        shape(64, D, spec=(("data", "fsdp"),)),
        shape(6, D, D, spec=(None, "fsdp"), dtype=jnp.bfloat16),
    )
    work = walk(text_of(step, *arguments))
    gathered = work.collectives["all-gather"]
    assert gathered.count == 6, "each layer's weights, once"
    assert gathered.bytes in (6 * 2 * D**2, 6 * 4 * D**2)  # before or after widening
    assert work.collectives["all-reduce"] == Sent(1, 4)


RING = [(i, (i + 1) % 4) for i in range(4)]


@pytest.mark.parametrize(("operation", "options", "kind", "size"), [
    (jax.lax.all_to_all, {"split_axis": 1, "concat_axis": 1, "tiled": True},
     "all-to-all", 4 * 4 * D),
    (jax.lax.ppermute, {"perm": RING}, "collective-permute", 4 * 4 * D),
    (jax.lax.psum_scatter, {"scatter_dimension": 1, "tiled": True}, "reduce-scatter", 4 * 4 * D),
    (jax.lax.all_gather, {}, "all-gather", 4 * 4 * 4 * D),
    (jax.lax.psum, {}, "all-reduce", 4 * 4 * D),
])  # fmt: skip
def test_the_larger_of_input_and_output_of_a_collective_is_sent(operation, options, kind, size):
    spec = PartitionSpec("data")
    fn = functools.partial(operation, axis_name="data", **options)
    mapped = jax.shard_map(fn, mesh=mesh(), in_specs=spec, out_specs=spec, check_vma=False)
    work = walk(text_of(mapped, shape(16, D, spec=("data",))))
    assert work.collectives == {kind: Sent(1, size)}


TPU = """HloModule jit_step

%fused.1 (param_0: bf16[4,16], param_1: bf16[16,64]) -> bf16[4,64] {
  %param_0 = bf16[4,16]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[4,64]{1,0:T(8,128)(2,1)} convolution(%param_0, %param_1), \
dim_labels=bf_io->bf, backend_config={"estimated_cycles":"7"}
}

%batched (param_0: bf16[8,16,256,64], param_1: bf16[8,16,256,64]) -> f32[8,16,256,256] {
  %param_0 = bf16[8,16,256,64]{3,2,1,0} parameter(0)
  %param_1 = bf16[8,16,256,64]{3,2,1,0} parameter(1)
  ROOT %c = f32[8,16,256,256]{2,3,1,0} convolution(%param_0, %param_1), \
window={size=8x16 stride=7x15 lhs_dilate=8x16}, dim_labels=01bf_01oi->01bf
}

%begin (param_0: bf16[2,8]) -> bf16[16,8] {
  %param_0 = bf16[2,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[16,8]{1,0} all-gather(%param_0), channel_id=5, dimensions={0}
}

%end (param_0: bf16[2,8]) -> bf16[16,8] {
  %param_0 = bf16[2,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[16,8]{1,0} all-gather(%param_0), channel_id=5, dimensions={0}
}

%body (arg: (s32[], bf16[4,16])) -> (s32[], bf16[4,16]) {
  %arg = (s32[]{:T(128)}, bf16[4,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[4,16]{1,0} get-tuple-element(%arg), index=1
  %w = bf16[16,64]{1,0} constant({...})
  %fusion.1 = bf16[4,64]{1,0} fusion(%x, %w), kind=kOutput, calls=%fused.1, \
backend_config={"estimated_cycles":"1000"}
  %kernel = bf16[4,16]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", \
backend_config="module {
}
 more"
  %piece = bf16[2,8]{1,0} constant({...})
  %fusion.2 = bf16[16,8]{1,0} fusion(%piece), kind=kCustom, calls=%begin
  %fusion.3 = bf16[16,8]{1,0} fusion(%piece), kind=kCustom, calls=%end, \
backend_config={"estimated_cycles":"100"}
  ROOT %tuple = (s32[], bf16[4,16]{1,0}) tuple(%i, %x)
}

%less (arg.1: (s32[], bf16[4,16])) -> pred[] {
  %arg.1 = (s32[], bf16[4,16]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %constant.9 = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.9), direction=LT
}

ENTRY %main (p: (s32[], bf16[4,16])) -> (s32[], bf16[4,16]) {
  %p = (s32[], bf16[4,16]{1,0}) parameter(0)
  %q = bf16[8,16,256,64]{3,2,1,0} constant({...})
  %fusion.9 = f32[8,16,256,256]{3,2,1,0} fusion(%q, %q), kind=kOutput, calls=%batched, \
backend_config={"estimated_cycles":"5"}
  %all-reduce.1 = (f32[32]{0:T(128)S(1)}, /*index=1*/f32[8]{0}) all-reduce(%a, %b), channel_id=1
  %while.1 = (s32[], bf16[4,16]{1,0}) while(%p), condition=%less, body=%body
  ROOT %out = (s32[], bf16[4,16]{1,0}) copy(%while.1)
}
"""


def test_a_tpus_products_are_convolutions_and_batches_are_windows_that_mostly_meet_nothing():
    loop, batched = 12 * 2 * 4 * 16 * 64, 2 * 8 * 16 * 256 * 256 * 64
    assert walk(TPU).flops == loop + batched


def test_cycles_of_a_fusion_are_its_own_lines_and_loops_have_as_many_as_their_condition_says():
    assert walk(TPU).cycles == 12 * (1000 + 100) + 5


def test_operations_that_the_compiler_has_no_estimate_of_are_counted_by_their_flops():
    work = walk(TPU.replace('"1000"', '"9223372036854775807"'))
    assert work.cycles == 12 * 100 + 5
    assert work.unestimated == 12 * 2 * 4 * 16 * 64
    assert work.flops == walk(TPU).flops
    assert walk(TPU).unestimated == 0


def test_a_collective_that_is_fused_with_products_in_several_parts_is_one():
    assert walk(TPU).collectives == {
        "all-reduce": Sent(1, 4 * (32 + 8)),
        "all-gather": Sent(12, 12 * 2 * 16 * 8),
    }


def test_a_kernel_counts_with_the_flops_and_bytes_that_it_states_as_often_as_it_runs():
    stated = '"cost_estimate":{"flops":"30","transcendentals":"7","bytes_accessed":"20","more":"1"}'
    work = walk(TPU.replace('backend_config="module {', f'backend_config={{{stated}}} "module {{'))
    assert work.kernels == {(30, 20): 12}
    assert work.flops == walk(TPU).flops + 12 * 30
    assert walk(TPU).kernels == {}


def test_a_cpu_program_has_no_estimated_cycles():
    assert walk(text_of(lambda x: x @ x, shape(D, D))).cycles == 0
