"""The formula, the count of the traced program and arithmetic on paper say the same."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from support.recipes import tiny_recipe

from vadapter import config
from vadapter.distributed.mesh import MeshConfig, make_mesh
from vadapter.plan import flops
from vadapter.recipe.schema import read, resized
from vadapter.stages.stage import Stage

ADAPTERS = ("vadapter", "resampler", "mlp")
PAPER = [  # and frames: images, and clips where a part handles them in its own way
    *((f"stage=1,encoder={e}", 1) for e in "bl"),
    *((f"stage=2,encoder={e},llm=1b,adapter={a}", 1) for e in "bl" for a in ADAPTERS),
    *((f"stage=2,encoder=b,llm=1b,adapter={a}", 8) for a in ADAPTERS),
    ("stage=1,encoder=b,front=pooler", 8),
]
ROWS = 2


def program(recipe, name, frames=1, remat="none"):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return Stage(resized(recipe, name, batch=ROWS, frames=frames, remat=remat), name, mesh)


@functools.cache
def paper(arg, frames=1, remat="none"):
    recipe = read(config.load(f"configs/paper.py:{arg}"))
    return program(recipe, recipe.chain[-1], frames, remat)


def formula(stage):
    each = flops.formula(stage.model, stage.trained, stage.sizes())
    assert each is not None
    return ROWS * sum(each.values())


@functools.cache
def counted(stage):
    return flops.count(stage.train_step, *stage.arguments())


@pytest.mark.parametrize(("arg", "frames"), PAPER)
def test_formula_and_count_agree_at_the_papers_sizes(arg, frames):
    stage = paper(arg, frames)
    assert formula(stage) == pytest.approx(counted(stage), rel=0.05)


@pytest.mark.parametrize("name", ["tlm", "llm", "decoder", "vadapter", "perceiver"])
def test_formula_and_count_are_equal_for_small_models(name):
    stage = program(read(tiny_recipe(Path("nowhere"))), name)
    assert formula(stage) == counted(stage)


@pytest.mark.parametrize(("arg", "tera"), [
    ("stage=1,encoder=b", 0.38), ("stage=1,encoder=l", 0.49), ("stage=1,encoder=g", 0.87),
    ("stage=2,encoder=b,llm=1b", 1.81), ("stage=2,encoder=l,llm=1b", 1.93),
    ("stage=2,encoder=g,llm=1b", 2.30), ("stage=2,encoder=g,llm=8b", 12.4),
])  # fmt: skip
def test_the_formula_gives_what_was_worked_out_on_paper_for_an_image(arg, tera):
    """4·N·tokens for a frozen language model, 6·N for a trained one, 2·N for the encoder."""
    assert formula(paper(arg)) / ROWS / 1e12 == pytest.approx(tera, rel=0.05)


def test_what_the_backward_pass_recomputes_is_counted():
    arg, *_ = next(row for row in PAPER if "adapter=vadapter" in row[0])
    stage = paper(arg, remat="full")
    recomputed = counted(stage) - counted(paper(arg, 1))
    work = flops.forward_work(stage.model, stage.sizes())
    assert work is not None
    stacks = ROWS * (work["tlm"].forward() + work["llm"].forward())
    assert 0.5 * stacks < recomputed < stacks, (
        "but for each block's last products, and for the head"
    )


def test_a_loop_of_unknown_length_counts_the_given_trips():
    def fn(x):
        return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ x, x)

    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    assert flops.count(fn, x, loops=3) == 3 * flops.count(fn, x) == 3 * 2 * 8**3


def test_modules_without_a_formula_are_reported():
    stage = program(read(tiny_recipe(Path("nowhere"))), "vision")
    assert flops.formula(stage.model, stage.trained, stage.sizes()) is None
    assert counted(stage) > 0
