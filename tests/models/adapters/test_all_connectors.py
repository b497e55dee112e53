"""What every connector must do: a new kind needs a row of `CHAINS`, and no test of its own here.

A new key of a stage or a component that changes its model or loss needs a place in `SWITCHES`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import tiny
from support.cases import some_slow
from support.recipes import FRAMES, SIZE, draw, tiny_recipe

from benches.fake_batch import fake_batch
from vadapter import VAdapter
from vadapter.data.tokenizers.bpe import BPETokenizer
from vadapter.distributed.mesh import MeshConfig, batch_sharding, make_mesh, with_mesh
from vadapter.errors import ConfigError
from vadapter.hub.write import export
from vadapter.inspect.check import check
from vadapter.inspect.check_text import as_text
from vadapter.models.registry import KINDS, load_kind
from vadapter.recipe.model import make_model
from vadapter.recipe.schema import read
from vadapter.stages.stage import Stage
from vadapter.stages.steps import init_state, make_train_step, split

FC = {"kind": "fc"}
QUERIES = {"queries": 4, "query_dim": 16, "hidden_dim": 16, "layers": 1, "heads": 2}
# kind -> the components of a chain that has it, in order; its own has no "kind".
CHAINS = {
    "resampler": (QUERIES, FC),
    "pooler": ({"queries": 3, "width": 16, "heads": 2}, FC),
    "qformer": ({"queries": 3, "width": 16, "depth": 2, "heads": 2, "mlp_dim": 24}, FC),
    "mlp": ({"pool": "shuffle", "norm": True, "frames": 8},),
    "c_abstractor": ({"queries": 9, "hidden_dim": 8, "blocks": 1},),
    "cross_attention": (QUERIES | {"kind": "resampler"}, {"heads": 2, "head_dim": 8}),
    "words": (FC, {"hard": False}),  # words themselves change in jumps
    "fc": ({},),
}
LM = {"kind": "lm", "width": 16, "depth": 2, "heads": 2, "mlp_dim": 24, "vocab_size": 0}
# name of a stage -> its components beside the frozen ones, and its keys, which are off by default.
SWITCHES = {
    "stage_1": (
        {"look": QUERIES | {"kind": "resampler"}, "lm_1": LM},
        {"kind": "decoder", "chain": ("look",), "lm": "lm_1", "start": {"encoder": "vision"},
         "bidirectional": True, "query_loss": 0.5},
    ),
    "stage_2": (
        {"look": QUERIES | {"kind": "resampler"}, "lm_2": LM, "out": FC | {"init": "words"}},
        {"chain": ("look", "lm_2", "out"), "bidirectional": True, "exit_layer": 1,
         "optim": {"warmup": 0, "lr_mults": {"lm_2": 0.5}}},
    ),
}  # fmt: skip
STAGES = (*CHAINS, *SWITCHES)
NOT_CONNECTORS = {"vit", "video_vit", "mobilenet", "lm", "fusion"}
ROWS = 4


def _name(kind, spec):
    """The name of a component: that of the kind itself, or of another in its chain."""
    return f"{kind}_{spec['kind']}" if "kind" in spec else f"my_{kind}"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("connectors") / "shapes")


@pytest.fixture(scope="module")
def make_recipe(shapes):
    """Return the recipe with a stage per kind and switches, all of the same frozen parts."""

    @functools.cache
    def make(dtype="float32"):
        config = tiny_recipe(shapes)
        every = config.stages.perceiver
        with config.unlocked():
            config.dtype = dtype
            config.stages = {name: config.stages[name] for name in ("llm", "vision")}
            for kind, specs in CHAINS.items():
                names = tuple(_name(kind, spec) for spec in specs)
                for name, spec in zip(names, specs, strict=True):
                    config.components[name] = {"kind": kind} | spec
                config.stages[kind] = {**every, "chain": names}
            for name, (specs, keys) in SWITCHES.items():
                config.components.update(specs)
                config.stages[name] = every.to_dict() | keys
            config.chain = ("llm", "vision", *STAGES)
        return read(config)

    return make


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(["a red circle on white"], 270)


@pytest.fixture(scope="module")
def make_stage(make_recipe, tokenizer):
    """Return the stage of a kind on one device, or on a mesh of 2 × 2."""

    @functools.cache
    def make(kind, dtype="float32", sharded=False):
        shape = MeshConfig(data=2, fsdp=2) if sharded else MeshConfig(data=1)
        mesh = make_mesh(shape, jax.devices()[: 4 if sharded else 1])
        return Stage(make_recipe(dtype), kind, mesh, tokenizer=tokenizer)

    return make


def batch_of(frames=1):
    return fake_batch(
        ROWS, frames=frames, size=SIZE, prompt_len=2, text_len=6, vocab_size=32, segments=1
    )


def loss_of(stage, params, batch):
    visual = stage.objective.prepare(params, batch)
    total = batch["weights"].sum()
    return stage.objective.loss(params, visual, batch, total, None)[0]


def connectors():
    return [pytest.param(kind, id=kind) for kind in STAGES]


# Where the loss alone is compared, kinds that differ in what they compute.
FAST = ("resampler", "c_abstractor", "cross_attention", "words", *SWITCHES)
SOME = some_slow(STAGES, fast=FAST)


def test_every_kind_of_connector_has_a_row_here():
    assert set(CHAINS) == set(KINDS) - NOT_CONNECTORS


@pytest.mark.parametrize("kind", connectors())
def test_a_train_step_moves_every_trained_leaf_and_lowers_the_loss(kind, make_stage):
    stage = make_stage(kind)
    state, frozen = start(stage)
    step = jax.jit(make_train_step(stage.objective, optax.sgd(3e-3), seed=0))
    after, before = step(state, frozen, batch_of())
    for path, leaf in tiny.paths(after.params).items():
        assert np.isfinite(leaf).all(), path
        if path.endswith("/k/bias"):  # adds the same to a query's score of every key: no gradient
            continue
        assert (leaf != tiny.paths(state.params)[path]).any(), f"no gradient reaches {path}"
    # The same step again: what is random in training is as it was.
    _, again = step(after.replace(step=state.step), frozen, batch_of())
    assert float(again["loss"]) < float(before["loss"])


def start(stage):
    """State and frozen components, random."""
    trained, frozen = split(tiny.filled(stage.abstract), stage.trained)
    return init_state(jax.tree.map(jnp.asarray, trained), optax.sgd(3e-3)), frozen


@pytest.mark.parametrize("kind", SOME)
def test_a_mesh_of_four_devices_gives_the_loss_of_one(kind, make_stage):
    one, four = make_stage(kind), make_stage(kind, sharded=True)
    params, batch = tiny.filled(one.abstract), batch_of()
    placed = jax.device_put(params, jax.tree.map(lambda x: x.sharding, four.abstract))
    rows = jax.device_put(batch, batch_sharding(four.mesh))
    sharded = jax.jit(with_mesh(four.mesh, functools.partial(loss_of, four)))
    plain = jax.jit(functools.partial(loss_of, one))
    np.testing.assert_allclose(sharded(placed, rows), plain(params, batch), rtol=1e-5)


@pytest.mark.parametrize("kind", SOME)
def test_a_clip_in_bfloat16_costs_about_what_it_costs_in_float32(kind, make_stage):
    exact, short = make_stage(kind), make_stage(kind, "bfloat16")
    params, batch = tiny.filled(exact.abstract), batch_of(FRAMES)
    losses = [float(jax.jit(functools.partial(loss_of, s))(params, batch)) for s in (exact, short)]
    assert np.isfinite(losses).all()
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


@pytest.mark.parametrize("kind", connectors())
def test_its_train_step_is_planned_from_shapes_alone(kind, make_stage):
    stage = make_stage(kind, sharded=True)
    new, metrics = jax.eval_shape(stage.train_step, *stage.arguments())
    shape = lambda leaf: (leaf.shape, leaf.dtype)  # noqa: E731
    assert jax.tree.map(shape, new) == jax.tree.map(shape, stage.abstract_state)
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize("kind", connectors())
def test_an_export_gives_the_same_model_and_parameters(kind, make_stage, tmp_path):
    stage = make_stage(kind)
    loaded = Stage(stage.recipe, kind, stage.mesh, tokenizer=stage.tokenizer)
    loaded.params = jax.tree.map(jnp.asarray, tiny.filled(stage.abstract))
    loaded.digests = {name: "" for name in loaded.params if name not in stage.trained}
    export(loaded, tmp_path / "adapter")
    back = VAdapter.from_pretrained(tmp_path / "adapter").loaded
    assert back.adapter_model == stage.adapter_model
    jax.tree.map(np.testing.assert_array_equal, back.params, loaded.params)


def test_check_prints_every_connector_with_its_parameters(make_recipe, make_stage):
    facts, problems = check(make_recipe)
    assert not problems.lines()
    text = as_text(facts)
    for kind in CHAINS:
        own = jax.tree.leaves(make_stage(kind).abstract[f"my_{kind}"])
        count = sum(math.prod(leaf.shape) for leaf in own)
        (line,) = (line for line in text.splitlines() if line.strip().startswith(f"my_{kind} "))
        assert f"{count:,}" in line
        assert f" {kind} " in line


# -- grids ---------------------------------------------------------------------------------------

TOKENS = (SIZE // 8) ** 2
GRIDLESS = {
    "queries": {"tap": "queries", "pooler": {"queries": TOKENS + 1, "width": 16, "heads": 2}},
    "a class token": {"class_token": True},
    "registers": {"registers": 3},
}


def needs_grid(kind):
    (fields,) = (spec for spec in CHAINS[kind] if "kind" not in spec)
    return getattr(load_kind(kind)[0](**fields), "needs_grid", False)


GRID_KINDS = [kind for kind in CHAINS if needs_grid(kind)]


def model_of(recipe, kind, encoder=None, **own):
    """The model of a kind's stage with other keys of the encoder and of the connector."""
    spec = recipe.components
    changed = {"encoder": spec["encoder"] | (encoder or {}), f"my_{kind}": spec[f"my_{kind}"] | own}
    recipe = dataclasses.replace(recipe, components=spec | changed)
    return make_model(recipe, recipe.stages[kind], 64)


@pytest.mark.parametrize("kind", GRID_KINDS)
@pytest.mark.parametrize("encoder", GRIDLESS)
def test_an_encoder_without_a_grid_is_refused_with_what_to_do(kind, encoder, make_recipe):
    recipe, keys = make_recipe(), GRIDLESS[encoder]
    fix = "those of encoder are none.*tap to last or penultimate and patches_only=True"
    with pytest.raises(ConfigError, match=rf"components\.my_{kind} reads.*{fix}"):
        model_of(recipe, kind, keys)
    fixed = {key: value for key, value in keys.items() if key != "tap"} | {"patches_only": True}
    assert model_of(recipe, kind, fixed).modules[f"my_{kind}"].config.grid == (4, 4)


@pytest.mark.parametrize("kind", GRID_KINDS)
def test_a_grid_in_the_recipe_must_have_the_encoders_tokens(kind, make_recipe):
    recipe = make_recipe()
    queries = GRIDLESS["queries"]
    assert model_of(recipe, kind, queries, grid=(2, 8)).modules[f"my_{kind}"].config.grid == (2, 8)
    for grid in ((4, 5), (16,), (2, 2, 4)):
        with pytest.raises(ConfigError, match=rf"components\.my_{kind}\.grid=.*gives 16 tokens"):
            model_of(recipe, kind, grid=grid)


@pytest.mark.parametrize("kind", GRID_KINDS)
def test_mobilenet_has_a_grid(kind, make_recipe):
    recipe = make_recipe()
    mobilenet = {"kind": "mobilenet", "image_size": 96, "width_mult": 0.35}
    recipe = dataclasses.replace(recipe, components=recipe.components | {"encoder": mobilenet})
    assert make_model(recipe, recipe.stages[kind], 64).modules[f"my_{kind}"].config.grid == (3, 3)
