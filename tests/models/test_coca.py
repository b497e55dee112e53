"""CoCa: what its outputs are, and that both losses can be learned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import tiny

from benches.fake_batch import fake_batch
from vadapter.models.adapters.pooler import Pooler, PoolerConfig
from vadapter.models.coca import CoCa, Fusion, FusionConfig
from vadapter.models.lm import LM
from vadapter.models.vit import ViT
from vadapter.stages.steps import CocaObjective, init_state, make_train_step

MODEL = CoCa({
    "encoder": ViT(tiny.VIT),
    "pooler": Pooler(PoolerConfig(queries=4, width=16, heads=2)),
    "text": LM(tiny.TLM),
    "fusion": Fusion(FusionConfig(depth=1, width=16, heads=2, mlp_dim=32, embed_dim=8)),
})  # fmt: skip
BATCH = fake_batch(4, size=tiny.IMAGE, prompt_len=0, text_len=6, segments=1, vocab_size=tiny.V)


@pytest.fixture(scope="module")
def params():
    frames = jax.ShapeDtypeStruct((1, 1, tiny.IMAGE, tiny.IMAGE, 3), jnp.uint8)
    boxed = jax.eval_shape(lambda k: MODEL.init(k, frames), jax.random.key(0))
    params = tiny.filled(boxed)
    assert set(params) == set(MODEL.names())
    params["fusion"]["log_temperature"] = np.float32(np.log(0.07))
    return params


@pytest.fixture(scope="module")
def forward():
    return jax.jit(MODEL.__call__)


def test_outputs_are_caption_logits_unit_vectors_and_a_temperature(params, forward):
    logits, (image, text), temperature = forward(params, BATCH)
    assert (logits.shape, logits.dtype) == ((4, 6, tiny.V), jnp.float32)
    assert image.shape == text.shape == (4, 8)
    np.testing.assert_allclose(np.linalg.norm(image, axis=-1), 1, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(text, axis=-1), 1, atol=1e-4)
    assert float(temperature) == pytest.approx(0.07)


def test_the_image_vector_reads_the_image_and_the_text_vector_the_whole_text(params, forward):
    logits, (image, text), _ = forward(params, BATCH)
    other = dict(BATCH)
    other["frames"] = np.roll(BATCH["frames"], 1, axis=0)
    new_logits, (new_image, new_text), _ = forward(params, other)
    np.testing.assert_allclose(new_image, np.roll(image, 1, axis=0), atol=1e-5)
    np.testing.assert_allclose(new_text, text, atol=1e-6)
    assert np.abs(new_logits - logits).max() > 1e-2, "captions are predicted from the image"

    last = (BATCH["segments"] > 0).sum(1) - 1
    for change, moves in ((last, True), (last + 1, False)):  # the last word; the padding behind
        tokens = BATCH["tokens"].copy()
        rows = np.flatnonzero(change < 6)
        tokens[rows, change[rows]] = 3 + (tokens[rows, change[rows]] + 1) % 20
        changed = forward(params, BATCH | {"tokens": tokens})[1][1]
        moved = np.abs(changed - text).max(1)
        assert (moved[rows] > 1e-3).all() if moves else (moved == 0).all()


def test_a_caption_is_predicted_from_the_words_before_it(params, forward):
    logits = forward(params, BATCH)[0]
    tokens = BATCH["tokens"].copy()
    tokens[:, 1] = 3 + (tokens[:, 1] + 1) % 20
    change = np.abs(forward(params, BATCH | {"tokens": tokens})[0] - logits).max(-1)
    assert (change[:, 0] == 0).all()
    assert (change[:, 1] > 1e-3).all()


def test_four_pairs_are_memorized_and_distinguished(params):
    tx = optax.adam(3e-3)
    step = jax.jit(make_train_step(CocaObjective(MODEL), tx, seed=0), donate_argnums=0)
    state = init_state(jax.tree.map(jnp.array, params), tx)
    history = []
    for _ in range(60):
        state, metrics = step(state, {}, BATCH)
        history.append({k: float(v) for k, v in metrics.items()})
    first, last = history[0], history[-1]
    assert last["loss"] < 0.25 * first["loss"]
    assert last["contrastive"] < 0.5 * np.log(4), "chance is log 4"
    assert last["retrieval"] == 1.0, "chance is 1/4"
    assert last["accuracy"] > 0.9
    assert int(state.skipped) == 0


def test_a_bad_row_changes_no_loss(params):
    bad = {k: v.copy() for k, v in BATCH.items()}
    bad["weights"][3], bad["bad"][3] = 0, True
    other = {k: v.copy() for k, v in bad.items()}
    other["frames"][3] = 255 - other["frames"][3]
    other["tokens"][3] = 3
    objective = CocaObjective(MODEL)
    total = bad["weights"].sum()
    run = jax.jit(lambda b: objective.loss(params, None, b, total, None)[0])
    assert float(run(other)) == pytest.approx(float(run(bad)), rel=1e-5)
    assert float(run(BATCH)) != pytest.approx(float(run(bad)), rel=1e-3)
