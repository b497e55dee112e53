"""Losses against plain numpy, in value, gradient and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vadapter.models.losses import bag_xent, chunked_xent, contrastive, in_chunks, token_xent


def arrays(B=6, M=5, E=4, V=16, seed=0):
    rng = np.random.default_rng(seed)
    states = rng.standard_normal((B, M, E)).astype(np.float32)
    kernel = rng.standard_normal((E, V)).astype(np.float32)
    targets = rng.integers(0, V, (B, M)).astype(np.int32)
    weights = (rng.random((B, M)) < 0.7).astype(np.float32)
    return states, kernel, targets, weights


def test_token_loss_sums_nats_and_hits_over_weighted_targets():
    states, kernel, targets, weights = arrays()
    logits = states @ kernel
    nats, correct = jax.jit(token_xent)(logits, targets, weights)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    picked = np.take_along_axis(p, targets[..., None], -1)[..., 0]
    assert float(nats) == pytest.approx((-np.log(picked) * weights).sum(), rel=1e-5)
    assert float(correct) == ((logits.argmax(-1) == targets) * weights).sum()


def test_targets_of_weight_zero_do_not_matter():
    states, kernel, targets, weights = arrays()
    logits = states @ kernel
    other = np.where(weights[..., None] > 0, logits, 1e30)
    changed = np.where(weights > 0, targets, 0)
    run = jax.jit(token_xent)
    a, b = run(logits, targets, weights)[0], run(other, changed, weights)[0]
    assert float(a) == pytest.approx(float(b), rel=1e-6)


def test_rounded_logits_have_the_loss_of_their_values_and_its_gradient_rounded_once():
    states, kernel, targets, weights = arrays()
    logits = jnp.asarray(2 * states @ kernel, jnp.bfloat16)
    # A target that is almost certain: rounded apart, its probability and the 1 would cancel out.
    logits = logits.at[0, 0].set(0).at[0, 0, targets[0, 0]].set(10)
    run = jax.jit(jax.value_and_grad(token_xent, has_aux=True))
    (a, hits_a), grad = run(logits, targets, weights)
    (b, hits_b), exact = run(logits.astype(jnp.float32), targets, weights)
    assert (a, hits_a) == (b, hits_b)
    assert grad.dtype == jnp.bfloat16
    assert 0 < abs(float(exact[0, 0, targets[0, 0]])) < 1e-3
    np.testing.assert_array_equal(grad, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("rows", [1, 7, 10, 15, 1000])
def test_chunked_loss_equals_the_whole_one_in_value_and_gradient(rows):
    states, kernel, targets, weights = arrays()

    def whole(kernel, states):
        return token_xent(states @ kernel, targets, weights)

    def chunked(kernel, states):
        return chunked_xent(lambda s: s @ kernel, states, targets, weights, rows)

    run = lambda f: jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(kernel, states)  # noqa: E731
    (a, hits_a), grads_a = run(whole)
    (b, hits_b), grads_b = run(chunked)
    assert float(a) == pytest.approx(float(b), rel=1e-6)
    assert float(hits_a) == float(hits_b)
    for x, y in zip(grads_a, grads_b, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_chunked_loss_holds_a_chunk_of_logits_and_not_all():
    states, kernel, targets, weights = arrays(B=16, M=16, E=4, V=4096)

    def temp(rows):
        def loss(kernel, states):
            head = lambda s: s @ kernel  # noqa: E731
            if rows:
                return chunked_xent(head, states, targets, weights, rows)[0]
            return token_xent(head(states), targets, weights)[0]

        step = jax.jit(jax.grad(loss, (0, 1))).lower(kernel, states).compile()
        return step.memory_analysis().temp_size_in_bytes

    logits = 16 * 16 * 4096 * 4  # bytes
    assert temp(0) >= logits
    assert temp(32) < 0.5 * logits
    assert temp(32) < temp(128) < temp(0)


def test_queries_predict_the_different_words_of_a_row_together_in_no_order():
    states, kernel, targets, weights = arrays()
    logits = np.stack([states[:, 0] @ kernel, states[:, 1] @ kernel], axis=1)
    weights[0] = 0  # a row without targets
    p = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).mean(1)
    expected = 0.0
    for row in range(1, len(targets)):
        words = sorted({*targets[row, weights[row] > 0].tolist()})
        expected += weights[row].sum() * np.mean([-np.log(p[row, word]) for word in words])
    run = jax.jit(bag_xent)
    assert float(run(logits, targets, weights)) == pytest.approx(expected, rel=1e-5)
    other = run(logits, targets[:, ::-1], weights[:, ::-1])
    assert float(other) == pytest.approx(expected, rel=1e-5)
    queries = states[:, :2]
    chunked = in_chunks(
        lambda s, *rest: bag_xent(s @ kernel, *rest), (queries, targets, weights), 4
    )
    assert float(chunked) == pytest.approx(expected, rel=1e-5)


def test_contrastive_loss_is_the_mean_of_both_directions():
    rng = np.random.default_rng(0)
    image, text = rng.standard_normal((2, 4, 8)).astype(np.float32)
    scores = image @ text.T / 0.5
    log_softmax = lambda x, axis: x - np.log(np.exp(x).sum(axis, keepdims=True))  # noqa: E731
    rows, columns = (-np.diag(log_softmax(scores, axis)).mean() for axis in (1, 0))
    loss, first = jax.jit(contrastive)(image, text, jnp.float32(0.5), np.ones(4, bool))
    assert float(loss) == pytest.approx((rows + columns) / 2, rel=1e-5)
    assert float(first) == (scores.argmax(1) == np.arange(4)).mean()


def test_an_invalid_row_is_neither_a_positive_nor_a_negative():
    rng = np.random.default_rng(0)
    image, text = rng.standard_normal((2, 5, 8)).astype(np.float32)
    valid = np.array([True, True, False, True, True])
    run = jax.jit(jax.value_and_grad(contrastive, (0, 1), has_aux=True))
    (loss, first), grads = run(image, text, 0.5, valid)
    (alone, first_alone), _ = run(image[valid], text[valid], 0.5, np.ones(4, bool))
    assert float(loss) == pytest.approx(float(alone), rel=1e-5)
    assert float(first) == pytest.approx(float(first_alone))
    for grad in grads:
        assert np.isfinite(grad).all()
        assert (grad[2] == 0).all()


def test_a_batch_without_a_valid_row_has_a_finite_loss_and_no_gradient():
    rng = np.random.default_rng(0)
    image, text = rng.standard_normal((2, 3, 8)).astype(np.float32)
    run = jax.jit(jax.value_and_grad(contrastive, has_aux=True))
    (loss, first), grad = run(image, text, 0.5, np.zeros(3, bool))
    assert (float(loss), float(first)) == (0, 0)
    assert (grad == 0).all()
