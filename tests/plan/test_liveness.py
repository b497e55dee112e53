"""Memory estimated from a trace: what is kept for the backward pass, and no more."""

import jax
import jax.numpy as jnp
import pytest

from vadapter.plan.liveness import temporaries

B, D, L = 1009, 64, 6  # a prime: rows are known by it
ARRAY = 4 * B * D


def held(fn, *arguments, scale=1.0, share=1.0):
    return temporaries(fn, *arguments, rows=B, scale=scale, share=share)


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def loss(policy):
    """A stack whose layers keep what the policy says, and one number of it."""

    def layer(x, kernel):
        return jax.nn.gelu(x @ kernel), None

    if policy != "none":
        layer = jax.checkpoint(layer, prevent_cse=False)
    return lambda x, kernels: jax.lax.scan(layer, x, kernels)[0].sum()


STACK = shape(B, D), shape(L, D, D)


def test_a_chain_of_products_holds_two_at_a_time():
    def chain(x, kernel):
        for _ in range(5):
            x = x @ kernel
        return x.sum()

    assert held(chain, shape(B, D), shape(D, D)) == 2 * ARRAY


def test_cheap_operations_are_computed_where_they_are_read():
    def fn(x, kernel):
        return (jnp.tanh(x @ kernel + 1) * 2).astype(jnp.bfloat16).sum()

    assert held(fn, shape(B, D), shape(D, D)) <= 1.1 * ARRAY


def test_what_a_cheap_operation_reads_is_held_until_its_result_is_read():
    def fn(x, kernel):
        late = jnp.tanh(x @ kernel)
        other = x @ kernel @ kernel
        return (late @ kernel + other).sum()

    assert held(fn, shape(B, D), shape(D, D)) == 3 * ARRAY


def test_rematerialization_keeps_an_array_a_layer():
    full = held(jax.grad(loss("full"), argnums=1), *STACK)
    none = held(jax.grad(loss("none"), argnums=1), *STACK)
    assert L * ARRAY <= full < none
    assert full <= (L + 5) * ARRAY


def test_a_gradient_of_the_input_alone_keeps_less():
    inputs = held(jax.grad(loss("none"), argnums=0), *STACK)
    assert inputs <= held(jax.grad(loss("none"), argnums=(0, 1)), *STACK)


def test_arrays_of_the_batch_scale_with_its_rows_and_others_with_the_devices_share():
    step = jax.grad(loss("full"), argnums=0)
    assert held(step, *STACK, scale=0.5) == pytest.approx(held(step, *STACK) / 2, rel=0.01)
    weights = lambda kernel: (kernel @ kernel @ kernel).sum()  # noqa: E731
    whole = held(weights, shape(D, D))
    assert held(weights, shape(D, D), scale=9.0) == whole
    assert held(weights, shape(D, D), share=0.25) == whole / 4


def test_arguments_and_results_need_no_room_of_their_own():
    assert held(lambda x: x + 1, shape(B, D)) == 0


def test_of_a_conditional_the_larger_branch_counts():
    def fn(x, kernel):
        big = lambda: ((x @ kernel) @ kernel.T @ kernel).sum()  # noqa: E731
        return jax.lax.cond(x[0, 0] > 0, big, lambda: x.sum())

    assert held(fn, shape(B, D), shape(D, 8 * D)) == 9 * ARRAY
