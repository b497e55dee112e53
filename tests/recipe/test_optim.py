"""The optimizer: literal points of the schedule, what decays, what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from vadapter.errors import ConfigError
from vadapter.recipe.optim import OptimConfig, decayed, learning_rate, make_optimizer

LINEAR = {0: 0.2, 1: 0.4, 3: 0.8, 4: 1.0, 9: 0.5, 13: 0.1, 14: 0.0, 20: 0.0}


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        ("linear", LINEAR),
        ("cosine", {0: 0.2, 4: 1.0, 9: 0.5, 14: 0.0}),
        ("constant", {0: 0.2, 4: 1.0, 9: 1.0, 14: 1.0}),
    ],
)
def test_the_schedule_warms_up_to_its_peak_and_decays_to_the_end(schedule, points):
    rate = learning_rate(OptimConfig(lr=2.0, warmup=4, schedule=schedule), steps=14)
    for step, share in points.items():
        assert float(rate(step)) == pytest.approx(2.0 * share, abs=1e-6), step


def test_without_warm_up_the_first_step_has_the_peak_rate():
    rate = learning_rate(OptimConfig(lr=2.0, warmup=0), steps=4)
    assert [float(rate(s)) for s in range(5)] == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimConfig(warmup=10), "optim.warmup=10 must be below steps=10"),
        (OptimConfig(warmup=1, schedule="linar"), "optim.schedule='linar'.*linear, cosine"),
    ],
)
def test_a_schedule_that_cannot_run_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        make_optimizer(config, steps=10)


def test_weight_decay_acts_on_kernels_and_embeddings_alone():
    params = tiny.lm(positions="learned", norm="layer", bias=True)[1]
    decays = tiny.paths(decayed(params))
    assert {k for k, v in decays.items() if v} == {
        k for k in decays if k.endswith(("kernel", "embedding"))
    }
    tx = make_optimizer(OptimConfig(lr=0.5, warmup=0, weight_decay=0.1, clip=0), steps=10)
    zeros = {k: np.zeros_like(v) for k, v in tiny.paths(params).items()}
    flat = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(2)}
    updates, _ = tx.update({k: jnp.zeros_like(v) for k, v in flat.items()}, tx.init(flat), flat)
    assert zeros
    np.testing.assert_allclose(updates["kernel"], -0.5 * 0.1, rtol=1e-6)
    assert not updates["bias"].any()
    assert not updates["scale"].any()


def test_gradients_are_clipped_by_the_norm_of_all_of_them_together():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([0.0, 4.0])}
    # With b1 = 0 and a huge eps, AdamW's update is lr · clipped gradient / eps.
    config = OptimConfig(lr=1.0, warmup=0, b1=0.0, eps=1e6, weight_decay=0.0, clip=1.0)
    tx = make_optimizer(config, steps=10)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["a"], [-0.6e-6, 0], rtol=1e-5)
    np.testing.assert_allclose(updates["b"], [0, -0.8e-6], rtol=1e-5)


def test_a_multiplier_scales_every_update_of_its_component_and_adds_no_state():
    params = {name: {"kernel": jnp.full((2, 2), 3.0)} for name in ("tlm", "fc_out", "still")}
    grads = {name: {"kernel": jnp.full((2, 2), 0.1)} for name in params}

    def updates(**lr_mults):
        tx = make_optimizer(OptimConfig(lr=0.5, warmup=1, lr_mults=lr_mults), steps=4)
        state, found = tx.init(params), []
        for _ in range(3):
            update, state = tx.update(grads, state, params)
            found.append(update)
        return found, state

    (plain, before), (scaled, after) = updates(), updates(tlm=0.25, still=0)
    for one, other in zip(plain, scaled, strict=True):
        assert np.abs(one["tlm"]["kernel"]).min() > 0
        np.testing.assert_array_equal(other["tlm"]["kernel"], 0.25 * one["tlm"]["kernel"])
        np.testing.assert_array_equal(other["fc_out"]["kernel"], one["fc_out"]["kernel"])
        assert not other["still"]["kernel"].any()
    moments = [tiny.paths(state) for state in (before, after)]
    assert moments[0].keys() == moments[1].keys()
    for path, leaf in moments[0].items():
        np.testing.assert_array_equal(leaf, moments[1][path], err_msg=path)


def test_the_defaults_are_the_papers_table_10():
    config = OptimConfig()
    assert (config.lr, config.warmup, config.schedule) == (5e-4, 1000, "linear")
    assert (config.b1, config.b2, config.weight_decay, config.clip) == (0.9, 0.999, 1e-4, 1.0)
