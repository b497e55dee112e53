"""The composition: any chain between encoder and language model, and what flows through it."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from benches.fake_batch import fake_batch
from vadapter.data.batch import EOS
from vadapter.models.adapter_model import AdapterModel, Training
from vadapter.models.adapters.mlp import MlpAdapter, MlpAdapterConfig
from vadapter.models.adapters.pooler import Pooler, PoolerConfig
from vadapter.models.adapters.projection import Projection, ProjectionConfig
from vadapter.models.adapters.resampler import Resampler
from vadapter.models.lm import LM
from vadapter.models.losses import token_xent
from vadapter.models.transformer import text_mask
from vadapter.models.vit import ViT
from vadapter.stages import flops

E = tiny.LLM.width
MODULES = {
    "encoder": ViT(tiny.VIT),
    "resampler": Resampler(tiny.RESAMPLER),
    "pooler": Pooler(PoolerConfig(queries=3, width=16, heads=2)),
    "mlp": MlpAdapter(MlpAdapterConfig(hidden_dim=20, width=E)),
    "fc_in": Projection(ProjectionConfig(tiny.TLM.width)),
    "tlm": LM(tiny.TLM),
    "fc_out": Projection(ProjectionConfig(E)),
    "llm": LM(tiny.LLM),
}
CHAINS = {  # name: chain, number of queries it gives
    "vadapter": (("resampler", "fc_in", "tlm", "fc_out"), 4),
    "resampler": (("resampler", "fc_out"), 4),
    "mlp": (("mlp",), tiny.N),
    "pooler+tlm": (("pooler", "fc_in", "tlm", "fc_out"), 3),
}


def make(chain, lm="llm", encoder="encoder", **kwargs):
    names = (*chain, lm, *((encoder,) if encoder else ()))
    modules = {n: MODULES[n] for n in names}
    return AdapterModel(modules=modules, lm=lm, chain=chain, encoder=encoder, **kwargs)


def batch_of(frames=1, **kwargs):
    return fake_batch(2, frames=frames, size=tiny.IMAGE, text_len=8, vocab_size=tiny.V, **kwargs)


def loss_of(model, params, batch):
    visual = model.encode(params, batch)
    logits = model.logits(params, model.hidden(params, visual, batch))
    return token_xent(logits, batch["targets"], batch["weights"])[0]


@pytest.mark.parametrize("name", CHAINS)
def test_every_chain_trains_all_its_parts_through_the_language_model(name):
    chain, queries = CHAINS[name]
    model = make(chain)
    params = tiny.filled(tiny.boxed(model))
    assert model.names() == ("encoder", *chain, "llm")
    assert set(params) == set(model.names())
    batch = batch_of()
    loss, grads = jax.jit(jax.value_and_grad(lambda p: loss_of(model, p, batch)))(params)
    assert np.isfinite(loss)
    for component in (*chain, "llm"):
        for path, grad in tiny.paths(grads[component]).items():
            assert np.isfinite(grad).all(), f"{component}/{path}"
            assert np.abs(grad).max() > 0, f"no gradient reaches {component}/{path}"
    assert all((g == 0).all() for g in jax.tree.leaves(grads["encoder"]))
    visual = jax.ShapeDtypeStruct((2, 1, tiny.N, tiny.VIT.width), jnp.float32)
    prefix = jax.eval_shape(lambda v: model.prefix(params, v), visual)
    assert prefix.shape == (2, queries, E)


def test_words_are_looked_up_once_so_their_gradient_is_written_once():
    model, batch = make(CHAINS["vadapter"][0]), batch_of()
    assert batch["prompt"].shape[1], "a prompt in front, and the text behind"
    params = jax.eval_shape(lambda: tiny.filled(tiny.boxed(model)))
    traced = jax.make_jaxpr(jax.grad(lambda p: loss_of(model, p, batch)))(params)

    def scatters(program):
        for eqn in program.eqns:
            if eqn.primitive.name.startswith("scatter"):
                yield eqn.outvars[0].aval.shape
            for inner in flops.subprograms(eqn.params):
                yield from scatters(inner)

    assert list(scatters(traced.jaxpr)).count((tiny.V, E)) == 1


def test_a_frozen_language_model_computes_the_same_with_less():
    chain, _ = CHAINS["vadapter"]
    plain = make(chain)
    frozen = dataclasses.replace(plain, frozen_lm=True)
    params, batch = tiny.filled(tiny.boxed(plain)), batch_of(segments=2)
    trainable = {name: params[name] for name in chain}
    step = lambda model: jax.value_and_grad(  # noqa: E731
        lambda trainable: loss_of(model, params | trainable, batch)
    )
    (loss, slopes), (same, equal) = (jax.jit(step(model))(trainable) for model in (plain, frozen))
    np.testing.assert_allclose(loss, same, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), slopes, equal)
    assert flops.count(step(frozen), trainable) < flops.count(step(plain), trainable)


def test_a_language_model_inside_the_chain_has_neither_embedding_nor_head():
    stage2 = tiny.boxed(make(CHAINS["vadapter"][0]))
    stage1 = tiny.boxed(make(("resampler", "fc_in"), lm="tlm"))
    assert set(stage2["tlm"]) == {"stack", "norm"}
    assert set(stage1["tlm"]) == {"stack", "norm", "embedding"}
    inside, whole = (nn.unbox(s["tlm"]["stack"]) for s in (stage2, stage1))
    assert inside == whole, "stage 2 takes the stack of stage 1 as it is"


def test_a_components_start_depends_on_the_seed_and_its_name_alone():
    modules = {
        "fc_a": Projection(ProjectionConfig(16)),
        "fc_b": Projection(ProjectionConfig(16)),
        "lm": nn.Embed(8, 16),
    }
    flat = jax.ShapeDtypeStruct((1, 4, 16), jnp.float32)

    def start(chain, seed):
        model = AdapterModel(modules, lm="lm", chain=chain)
        return nn.unbox(jax.jit(lambda k: model.init(k, flat))(tiny.key(seed)))

    alone, both, other = start(("fc_b",), 0), start(("fc_a", "fc_b"), 0), start(("fc_b",), 1)
    for name in ("fc_b", "lm"):
        jax.tree.map(np.testing.assert_array_equal, alone[name], both[name])
    kernel = lambda tree, name: tree[name]["out"]["kernel"]  # noqa: E731
    assert np.abs(kernel(both, "fc_a") - kernel(both, "fc_b")).max() > 0.1
    assert np.abs(kernel(alone, "fc_b") - kernel(other, "fc_b")).max() > 0.1


def test_the_prefix_layer_starts_with_the_stated_output_spread():
    module = Projection(ProjectionConfig(64, scale=0.05))
    params = jax.jit(module.init)(tiny.key(0), jnp.zeros((1, 256)))
    x = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    assert float(module.apply(params, x).std()) == pytest.approx(0.05, rel=0.1)


def test_only_a_bidirectional_adapter_lets_a_query_see_later_ones():
    chain = CHAINS["vadapter"][0]
    visual = np.random.default_rng(0).standard_normal((1, 1, 4, 16)).astype(np.float32)
    causal, both = make(chain), make(chain, bidirectional=True)
    params = tiny.filled(tiny.boxed(causal))
    later = jax.tree.map(np.copy, params)
    later["resampler"]["queries"][:, -1] *= -1
    for model, sees in ((causal, False), (both, True)):
        prefix = jax.jit(lambda p, m=model: m.prefix(p, visual))
        change = np.abs(prefix(params) - prefix(later)).max(axis=(0, 2))
        assert (change[:-1].max() > 1e-3) == sees
        assert change[-1] > 1e-3


def test_queries_see_each_other_both_ways_where_the_language_model_is_trained_alone():
    segments = jnp.array([[0, -1, -1, -1, 1, 1, 2, 0]])
    prefix = jnp.zeros((1, 2, E))
    trained = make(("resampler", "fc_out"), bidirectional=True)
    frozen = dataclasses.replace(trained, frozen_lm=True)
    causal, both = (np.asarray(model.mask(segments, prefix, 4))[0] for model in (frozen, trained))
    np.testing.assert_array_equal(causal, text_mask(segments)[0])
    assert np.argwhere(both != causal).tolist() == [[2, 3]]


def test_layout_is_prompt_prefix_text_and_padding_takes_no_position():
    model = make(("resampler", "fc_out"))
    params = tiny.filled(tiny.boxed(model))
    batch = batch_of(prompt_len=3, seed=1)
    batch["prompt"][0, :2] = -1  # two places of padding in front
    batch["prompt"][1, 0] = 0  # and a token whose id is 0
    prefix = np.random.default_rng(0).standard_normal((2, 2, E)).astype(np.float32)
    x, segments, positions = model.layout(params, jnp.asarray(prefix), batch)
    assert x.shape == (2, 3 + 2 + 8, E)
    np.testing.assert_array_equal(x[:, 3:5], prefix)
    np.testing.assert_array_equal(segments[:, :5], [[0, 0, -1, -1, -1], [-1] * 5])
    np.testing.assert_array_equal(segments[:, 5:], batch["segments"])
    np.testing.assert_array_equal(positions[:, :5], [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])
    np.testing.assert_array_equal(positions[:, 5:], batch["positions"] + [[3], [5]])
    words = params["llm"]["embedding"]["embedding"] * E**0.5
    np.testing.assert_allclose(x[:, 5:], words[batch["tokens"]], atol=1e-5)
    np.testing.assert_allclose(x[:, :3], words[np.maximum(batch["prompt"], 0)], atol=1e-5)


@pytest.fixture(scope="module")
def captioner():
    model = make(("resampler", "fc_out"))
    params = tiny.filled(tiny.boxed(model))
    return model, params, jax.jit(lambda b: loss_of(model, params, b))


def test_more_padding_anywhere_changes_no_loss(captioner):
    _, _, loss = captioner
    batch = batch_of()
    wide = dict(batch)
    pad = lambda key, left, right: np.pad(batch[key], ((0, 0), (left, right)))  # noqa: E731
    wide["prompt"] = np.pad(batch["prompt"], ((0, 0), (3, 0)), constant_values=-1)
    for key in ("tokens", "segments", "positions", "target_at", "targets", "weights"):
        wide[key] = pad(key, 0, 4)
    assert float(loss(wide)) == pytest.approx(float(loss(batch)), rel=1e-5)


def test_captions_sharing_one_prefix_cost_what_they_cost_apart(captioner):
    _, _, loss = captioner
    batch = batch_of(segments=2)
    parts = []
    for k in (1, 2):
        part = {key: np.copy(value) for key, value in batch.items()}
        read = np.take_along_axis(batch["segments"], batch["target_at"], 1)
        part["weights"] = batch["weights"] * (read == k)
        part["segments"] = np.where(batch["segments"] == k, 1, 0).astype(np.int32)
        parts.append(float(loss(part)))
    assert float(loss(batch)) == pytest.approx(sum(parts), rel=1e-5)


def test_the_image_reaches_the_text_and_features_stand_in_for_frames(captioner):
    model, params, loss = captioner
    batch = batch_of()
    features = dict(batch)
    frames = features.pop("frames")
    features["features"] = np.asarray(model.encode(params, batch))
    assert float(loss(features)) == pytest.approx(float(loss(batch)), rel=1e-5)
    other = batch | {"frames": np.roll(frames, 1, axis=0)}
    assert abs(float(loss(other)) - float(loss(batch))) > 1e-3


def test_a_text_batch_needs_no_encoder_and_costs_what_its_documents_cost_alone():
    model = make((), encoder="")
    params = tiny.filled(jax.eval_shape(lambda k: model.init(k, None), jax.random.key(0)))
    assert tuple(params) == model.names() == ("llm",)
    batch = batch_of(frames=0, prompt_len=0)
    plain = jax.jit(lambda tokens: MODULES["llm"].apply({"params": params["llm"]}, tokens))
    total = 0.0
    for row in range(2):
        for segment in (1, 2):
            where = batch["segments"][row] == segment
            n = where.sum()
            document = batch["tokens"][row, where]
            targets = [*document[1:], EOS]
            logp = jax.nn.log_softmax(plain(np.pad(document, (0, 8 - n))[None])[0, :n])
            total -= float(np.asarray(logp)[np.arange(n), targets].sum())
    loss = jax.jit(lambda p: loss_of(model, p, batch))(params)
    assert float(loss) == pytest.approx(total, rel=1e-4)


def test_dropout_in_the_chain_follows_the_training_key():
    config = dataclasses.replace(tiny.TLM, dropout=0.3)
    model = make(CHAINS["vadapter"][0])
    model = dataclasses.replace(model, modules=model.modules | {"tlm": LM(config)})
    params = tiny.filled(tiny.boxed(model))
    visual = np.random.default_rng(0).standard_normal((1, 1, 4, 16)).astype(np.float32)
    step = jnp.int32(0)
    noisy = jax.jit(lambda key: model.prefix(params, visual, Training(key, step)))
    a, b, again = (noisy(jax.random.key(s)) for s in (0, 1, 0))
    np.testing.assert_array_equal(a, again)
    assert np.abs(a - b).max() > 1e-3
