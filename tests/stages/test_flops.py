"""The formula, the count of the traced program and arithmetic on paper say the same."""

import dataclasses
import functools
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from support.cases import some_slow
from support.recipes import tiny_recipe

from vadapter import config
from vadapter.distributed.mesh import MeshConfig, make_mesh
from vadapter.recipe.schema import read, resized
from vadapter.stages import flops
from vadapter.stages.stage import Stage

ADAPTERS = ("vadapter", "resampler", "mlp")
PAPER = [  # and frames: images, and clips where a part handles them in its own way
    *((f"stage=1,encoder={e}", 1) for e in "bl"),
    *((f"stage=2,encoder={e},llm=1b,adapter={a}", 1) for e in "bl" for a in ADAPTERS),
    *((f"stage=2,encoder=b,llm=1b,adapter={a}", 8) for a in ADAPTERS),
    ("stage=1,encoder=b,front=pooler", 8),
]
VISUAL = ("vision", "decoder", "vadapter", "perceiver")
ROWS = 2
SIZE = 32  # pixels a side of the tiny recipe's images
VIT = dict(kind="vit", image_size=SIZE, patch=8, width=16, depth=2, heads=2, mlp_dim=32)  # noqa: C408
POOLER = dict(queries=4, width=16, heads=2)  # noqa: C408
ENCODERS = {
    "vit": {},
    "penultimate": {"tap": "penultimate", "class_token": True, "patches_only": True},
    "pooled": {"tap": "queries", "pooler": POOLER},
    "mobilenet": {"kind": "mobilenet", "image_size": SIZE, "width_mult": 0.25},
    "grouped": {
        "kind": "mobilenet", "image_size": SIZE, "depthwise": "grouped", "images_at_once": 2,
    },
}  # fmt: skip
RESAMPLER = {"kind": "resampler", "queries": 4, "query_dim": 16, "hidden_dim": 16, "heads": 2}
RESAMPLERS = {
    "concatenated": {"layers": 2, "concat_queries": True},
    "plain": {"layers": 1, "ffn": False, "time_embed": False, "norm": "none"},
    "shared": {"layers": 1, "norm": "shared", "space_embed": True, "final_norm": False},
}
CONNECTORS = runpy.run_path(str(config.find_recipe("configs/ablations.py")))["CONNECTORS"]


def program(recipe, name, frames=1, remat="none"):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return Stage(resized(recipe, name, batch=ROWS, frames=frames, remat=remat), name, mesh)


def tiny(name, frames=1, *, encoder=None, resampler=None):
    """A stage of the tiny recipe, with another encoder or resampler."""
    values: Any = tiny_recipe(Path("nowhere"))
    if encoder is not None:
        values.components.encoder = encoder if "kind" in encoder else VIT | encoder
    if resampler is not None:
        values.components.resampler = RESAMPLER | resampler
    return program(read(values), name, frames)


@functools.cache
def paper(arg, frames=1, remat="none"):
    recipe = read(config.load(f"configs/paper.py:{arg}"))
    return program(recipe, recipe.chain[-1], frames, remat)


def formula(stage):
    return sum(flops.formula(stage).values())


@functools.cache
def counted(stage):
    return flops.count(stage.train_step, *stage.arguments())


@pytest.mark.parametrize(
    ("arg", "frames"), some_slow(PAPER, fast=[case for case in PAPER if "encoder=l" not in case[0]])
)
def test_formula_and_count_are_equal_at_the_papers_sizes(arg, frames):
    stage = paper(arg, frames)
    assert formula(stage) == counted(stage)


@pytest.mark.parametrize(
    ("name", "frames"),
    [("tlm", 1), ("llm", 1)]
    + [
        (name, frames)
        for name in ("vision", "decoder", "vadapter", "perceiver")
        for frames in (1, 8)
    ],
)
def test_formula_and_count_are_equal_for_every_kind_of_stage(name, frames):
    stage = tiny(name, frames)
    assert formula(stage) == counted(stage)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_formula_and_count_are_equal_for_every_encoder(encoder):
    stage = tiny("perceiver", 4, encoder=ENCODERS[encoder])
    assert formula(stage) == counted(stage)


@pytest.mark.parametrize("stage", ["decoder", "vadapter"])  # a trained and a frozen LM
@pytest.mark.parametrize("resampler", RESAMPLERS)
def test_formula_and_count_are_equal_for_every_option_of_the_resampler(resampler, stage):
    made = tiny(stage, 8, resampler=RESAMPLERS[resampler])
    assert formula(made) == counted(made)


@pytest.mark.parametrize(
    ("name", "keys"),
    [("decoder", {"query_loss": 0.5, "bidirectional": True}), ("vadapter", {"exit_layer": -1})],
)
def test_formula_and_count_are_equal_for_keys_of_a_stage_that_change_its_products(name, keys):
    recipe = read(tiny_recipe(Path("nowhere")))
    recipe.components["tlm"]["depth"] = 2
    stage = dataclasses.replace(recipe.stages[name], **keys)
    changed = dataclasses.replace(recipe, stages={**recipe.stages, name: stage})
    before, after = program(recipe, name), program(changed, name)
    assert formula(after) == counted(after)
    assert (formula(after) > formula(before)) == ("query_loss" in keys)


@pytest.mark.parametrize("row", CONNECTORS)
def test_formula_and_count_are_equal_for_every_connector(row):
    recipe = read(config.load(f"configs/ablations.py:base=scenes,row={row}"))
    stage = program(recipe, recipe.chain[-1], frames=8)
    recomputed = 0
    if "words" in stage.config.chain:  # always recomputes its logits
        queries, llm = recipe.components["resampler"]["queries"], stage.model.modules["llm"].config
        recomputed = ROWS * 2 * queries * llm.width * stage.vocab_size
    assert formula(stage) == counted(stage) - recomputed


@pytest.mark.parametrize(("arg", "tera"), [
    ("stage=1,encoder=b", 0.38), ("stage=1,encoder=l", 0.49), ("stage=1,encoder=g", 0.87),
    ("stage=2,encoder=b,llm=1b", 1.81), ("stage=2,encoder=l,llm=1b", 1.93),
    ("stage=2,encoder=g,llm=1b", 2.30), ("stage=2,encoder=g,llm=8b", 12.4),
])  # fmt: skip
def test_the_formula_gives_what_was_worked_out_on_paper_for_an_image(arg, tera):
    """4·N·tokens for a frozen language model, 6·N for a trained one, 2·N for the encoder."""
    assert formula(paper(arg)) / ROWS / 1e12 == pytest.approx(tera, rel=0.05)


def test_products_belong_to_the_component_with_their_weights():
    stage = tiny("vadapter")
    forward, sizes = flops.formula(stage, trained=()), stage.sizes()
    visual, queries, E = (SIZE // 8) ** 2, 4, 16
    assert forward["fc_in"] == ROWS * 2 * queries * E * E
    tokens = sizes["P"] + queries + sizes["T"]
    llm = stage.model.modules["llm"].config
    keys = 2 * 2 * tokens * llm.width * (llm.width // llm.heads)  # multi-query
    text = 2 * sizes["T"] * (2 * llm.width**2 + 3 * llm.width * llm.mlp_dim)
    head = 2 * sizes["M"] * llm.width * llm.vocab_size
    assert forward["llm"] == ROWS * (keys + text + head + 4 * sizes["T"] * tokens * llm.width)
    block = 2 * visual * (4 * E * E + 2 * E * 2 * E) + 4 * visual**2 * E
    assert forward["encoder"] == ROWS * (2 * visual * 3 * 8**2 * E + block)
    training = flops.formula(stage)
    assert training["encoder"] == forward["encoder"]
    assert training["fc_in"] == 3 * forward["fc_in"]
    assert 2 * forward["llm"] < training["llm"] < 3 * forward["llm"]  # two products in attention


def test_what_the_backward_pass_recomputes_is_counted_in_the_program_alone():
    arg, *_ = next(row for row in PAPER if "adapter=vadapter" in row[0])
    stage = paper(arg, remat="full")
    recomputed = counted(stage) - counted(paper(arg, 1))
    work = flops.formula(stage, trained=())
    stacks = work["tlm"] + work["llm"]
    assert 0.5 * stacks < recomputed < stacks, (
        "but for each block's last products, and for the head"
    )
    assert formula(stage) == formula(paper(arg, 1))


def mixed(**options):
    """The tiny VAdapter on three images for each clip."""
    recipe = read(tiny_recipe(Path("nowhere")))
    media = {"images": "image", "clips": "clip"}
    data = {n: dataclasses.replace(recipe.data[n], media=media[n], **options) for n in media}
    config = dataclasses.replace(recipe.stages["vadapter"], data={"images": 3.0, "clips": 1.0})
    return dataclasses.replace(
        recipe, data=recipe.data | data, stages=recipe.stages | {"vadapter": config}
    )


def test_a_step_is_the_mean_over_images_and_clips_as_often_as_they_are_drawn():
    recipe, mesh = mixed(), make_mesh(MeshConfig(), jax.devices()[:1])
    stage = Stage(recipe, "vadapter", mesh)
    images, clips = (
        flops.count(stage.train_step, *stage.arguments(n)) for n in ("images", "clips")
    )
    assert clips > images
    assert flops.step_flops(stage) == 0.75 * images + 0.25 * clips


def test_a_step_on_cached_features_does_not_run_the_encoder():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    plain, cached = (Stage(mixed(cache=cache), "vadapter", mesh) for cache in (False, True))
    encoder = flops.formula(plain, plain.sizes("images"))["encoder"]
    encoder *= 0.75 + 0.25 * 8  # frames of a row
    assert flops.step_flops(plain) - flops.step_flops(cached) == encoder
    assert flops.step_flops(cached, encoder=True) == flops.step_flops(plain)
    assert flops.step_flops(plain, encoder=False) == flops.step_flops(cached)


def test_an_encoder_in_training_always_counts():
    stage = tiny("vision")
    recipe = stage.recipe
    data = {n: dataclasses.replace(d, media="image", cache=True) for n, d in recipe.data.items()}
    stage = Stage(dataclasses.replace(recipe, data=data), "vision", stage.mesh)
    assert flops.step_flops(stage, encoder=False) == formula(stage)


# -- programs --------------------------------------------------------------------------------------

X, W = (jax.ShapeDtypeStruct((4, 4), jnp.float32) for _ in range(2))


def scanned(w, x):
    """Weights enter the carry in the first iteration, and reach the product in the third."""
    body = lambda carry, _: ((w, carry[0], carry[1] @ carry[1]), None)  # noqa: E731
    return jax.lax.scan(body, (x, x, x), None, length=4)[0][2]


def branched(w, x):
    return jax.lax.cond(x[0, 0] > 0, lambda a, b: a @ b @ b, lambda a, b: a + b, x, w)


@jax.custom_jvp
def doubled(x):
    return 2 * x


doubled.defjvp(lambda primals, tangents: (doubled(*primals), 2 * tangents[0]))

PROGRAMS = {
    "product": lambda w, x: x @ w,
    "square": lambda w, x: (x @ w) @ (x @ w).T,
    "rows": lambda w, x: jax.lax.scan(lambda c, row: (c @ row, c @ x), x, jnp.stack([w, w]))[1],
    "scan": scanned,
    "cond": branched,
    "jit": lambda w, x: jax.jit(lambda a, b: a @ b)(x, w) @ x,
    "custom rule": lambda w, x: doubled(x @ w) @ doubled(w),
    "stopped": lambda w, x: jax.lax.stop_gradient(2 * w) @ w @ x,
    "rounded": lambda w, x: jnp.argmax(w, axis=1).astype(jnp.float32) @ w @ x,
    "grouped": lambda w, x: jax.lax.conv_general_dilated(
        x.reshape(1, 2, 2, 4), w.reshape(2, 2, 1, 4), (1, 1), [(1, 0), (1, 0)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_products_of_a_gradient_follow_from_the_forward_pass(name):
    fn = PROGRAMS[name]
    origins = [frozenset({"trained"}), flops.NOTHING]
    found, _ = flops.products(jax.make_jaxpr(fn)(W, X).jaxpr, origins)
    gradient = jax.value_and_grad(lambda w, x: jnp.sin(fn(w, x)).sum())
    expected = sum(n * (1 + bool(a) + bool(b)) for (a, b), n in found.items())
    assert expected == flops.count(gradient, W, X) > 0


def test_a_loop_of_unknown_length_counts_the_given_trips():
    def fn(x):
        return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ x, x)

    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    assert flops.count(fn, x, loops=3) == 3 * flops.count(fn, x) == 3 * 2 * 8**3


def test_what_a_loop_tests_counts_too():
    def fn(w, x):
        return jax.lax.while_loop(lambda x: (w @ x).sum() > 0, lambda x: x + w, x)

    traced = jax.make_jaxpr(fn)(W, X).jaxpr
    trained = frozenset({"trained"})
    found, results = flops.products(traced, [trained, flops.NOTHING], 3)
    assert found == {(trained, trained): 3 * 2 * 4**3}
    assert results == [trained]


def test_a_product_inside_an_unknown_operation_is_an_error():
    def fn(w, x):
        return jax.lax.custom_linear_solve(lambda v: w @ v, x, solve=lambda _, b: b, symmetric=True)

    with pytest.raises(NotImplementedError, match="custom_linear_solve"):
        flops.count(fn, W, X)
