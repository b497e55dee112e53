"""Attention weights can be read where a caller asks for them, and cost nothing elsewhere."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from vadapter.models.adapters.pooler import Pooler, PoolerConfig
from vadapter.models.adapters.resampler import Resampler, ResamplerConfig
from vadapter.models.layers import ATTENTION

F, N, Q = 2, 6, 4
VISUAL = jnp.asarray(np.random.default_rng(0).standard_normal((3, F, N, 16)), jnp.float32)
SIZES = dict(queries=Q, query_dim=16, hidden_dim=16, heads=2, frames=F)  # noqa: C408
MODULES = {
    "one layer": (Resampler(ResamplerConfig(layers=1, **SIZES)), 1, F * N),
    "three layers": (Resampler(ResamplerConfig(layers=3, **SIZES)), 3, F * N),
    "recomputed": (Resampler(ResamplerConfig(layers=3, remat="full", **SIZES)), 3, F * N),
    "also its queries": (
        Resampler(ResamplerConfig(layers=2, concat_queries=True, **SIZES)), 2, F * N + Q,
    ),
    "pooler": (Pooler(PoolerConfig(queries=Q, width=16, heads=2)), 1, F * N),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_sown_weights_are_those_of_every_layer_and_change_no_output(name):
    module, layers, keys = MODULES[name]
    params = tiny.init(module, VISUAL)
    plain = module.apply({"params": params}, VISUAL)
    out, sown = module.apply({"params": params}, VISUAL, mutable=[ATTENTION])
    np.testing.assert_array_equal(out, plain)
    (weights,) = jax.tree.leaves(sown)
    assert weights.reshape(layers, 3, -1, Q, keys).shape == (layers, 3, 2, Q, keys)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    if layers > 1:
        assert np.abs(weights[0] - weights[1]).max() > 1e-3


def test_weights_that_nobody_asks_for_are_not_in_the_program(monkeypatch):
    module, *_ = MODULES["recomputed"]
    params = tiny.init(module, VISUAL)

    def program() -> str:
        def loss(params):  # another function each time, so that it is traced again
            return module.apply({"params": params}, VISUAL).sum()

        return jax.jit(jax.grad(loss)).lower(params).as_text()

    ordinary, calls = program(), []
    monkeypatch.setattr(nn.Module, "sow", lambda *args: calls.append(args))
    assert program() == ordinary
    assert not calls
    module.apply({"params": params}, VISUAL, mutable=[ATTENTION])
    assert calls


def test_a_model_collects_what_the_chosen_components_sow_in_every_call():
    model = tiny.stage2()
    params = tiny.filled(tiny.boxed(model))
    visual = VISUAL[:, :, : tiny.N]
    seen = dataclasses.replace(model, sown={"resampler": []})
    np.testing.assert_array_equal(seen.prefix(params, visual[:1]), model.prefix(params, visual[:1]))
    seen.prefix(params, visual)
    first, second = (jax.tree.leaves(sown)[0] for sown in seen.sown["resampler"])
    assert first.shape[1] == 1
    assert second.shape[1] == 3
    assert model.sown == {}
