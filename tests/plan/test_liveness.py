"""Estimates of memory from a trace: arrays that the backward pass needs, and no others."""

import jax
import jax.numpy as jnp
import pytest

from vadapter.plan.liveness import temporaries

B, D, L = 1009, 64, 6  # B is a prime: arrays of the batch are recognized by it
ARRAY = 4 * B * D


def estimate(fn, *arguments, scale=1.0, share=1.0):
    return temporaries(fn, *arguments, rows=B, scale=scale, share=share)


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def loss(policy):
    """Return a function of a stack of layers, with or without rematerialization, to a scalar."""

    def layer(x, kernel):
        return jax.nn.gelu(x @ kernel), None

    if policy != "none":
        layer = jax.checkpoint(layer, prevent_cse=False)
    return lambda x, kernels: jax.lax.scan(layer, x, kernels)[0].sum()


STACK = shape(B, D), shape(L, D, D)


def test_a_chain_of_products_needs_two_at_a_time():
    def chain(x, kernel):
        for _ in range(5):
            x = x @ kernel
        return x.sum()

    assert estimate(chain, shape(B, D), shape(D, D)) == 2 * ARRAY


def test_cheap_operations_are_computed_where_they_are_read():
    def fn(x, kernel):
        return (jnp.tanh(x @ kernel + 1) * 2).astype(jnp.bfloat16).sum()

    assert estimate(fn, shape(B, D), shape(D, D)) <= 1.1 * ARRAY


def test_inputs_of_a_cheap_operation_are_kept_until_its_result_is_read():
    def fn(x, kernel):
        late = jnp.tanh(x @ kernel)
        other = x @ kernel @ kernel
        return (late @ kernel + other).sum()

    assert estimate(fn, shape(B, D), shape(D, D)) == 3 * ARRAY


def test_rematerialization_keeps_an_array_a_layer():
    full = estimate(jax.grad(loss("full"), argnums=1), *STACK)
    none = estimate(jax.grad(loss("none"), argnums=1), *STACK)
    assert L * ARRAY <= full < none
    assert full <= (L + 5) * ARRAY


def test_a_gradient_of_the_input_alone_keeps_less():
    inputs = estimate(jax.grad(loss("none"), argnums=0), *STACK)
    assert inputs <= estimate(jax.grad(loss("none"), argnums=(0, 1)), *STACK)


def test_arrays_of_the_batch_scale_with_its_rows_and_others_with_the_devices_share():
    step = jax.grad(loss("full"), argnums=0)
    assert estimate(step, *STACK, scale=0.5) == pytest.approx(estimate(step, *STACK) / 2, rel=0.01)

    def product(kernel):
        return (kernel @ kernel @ kernel).sum()

    replicated = estimate(product, shape(D, D))
    assert estimate(product, shape(D, D), scale=9.0) == replicated
    assert estimate(product, shape(D, D), share=0.25) == replicated / 4


def test_arguments_and_results_need_no_further_memory():
    assert estimate(lambda x: x + 1, shape(B, D)) == 0


def test_of_a_conditional_the_larger_branch_counts():
    def fn(x, kernel):
        def larger():
            return ((x @ kernel) @ kernel.T @ kernel).sum()

        return jax.lax.cond(x[0, 0] > 0, larger, x.sum)

    assert estimate(fn, shape(B, D), shape(D, 8 * D)) == 9 * ARRAY
