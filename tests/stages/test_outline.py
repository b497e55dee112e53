"""The outline of a stage: what its model says, kept under all that the model follows from."""

import dataclasses
from pathlib import Path

import jax
import pytest
from support import programs
from support.recipes import tiny_recipe

from vadapter.distributed.mesh import make_mesh
from vadapter.io import results
from vadapter.recipe.schema import read
from vadapter.stages import abstract_state, outline
from vadapter.stages.stage import Stage

RECIPE = read(tiny_recipe(Path("nowhere")))
MESH = make_mesh(programs.MESHES["all"])


@pytest.fixture(autouse=True)
def folder(tmp_path):
    before = results.folder()
    results.keep_in(tmp_path / "cache")
    yield
    results.keep_in(before)


def stage(name, recipe=RECIPE, **options):
    return Stage(recipe, name, MESH, vocab_size=300, **options)


@pytest.mark.parametrize("name", RECIPE.stages)
def test_a_later_process_knows_the_same_without_building_the_model(name, monkeypatch):
    made = stage(name)
    abstract, view, length = made.abstract, made.view, made.outline.max_len
    boxed = jax.eval_shape(lambda: made.initializer.random(abstract, jax.random.key(0), abstract))
    assert jax.tree.structure(abstract) == jax.tree.structure(boxed)

    def forbidden(*_):
        raise AssertionError("the model was built")

    monkeypatch.setattr(abstract_state.Initializer, "__init__", forbidden)
    again = stage(name)
    assert (again.view, again.outline.max_len) == (view, length)
    assert list(again.abstract) == list(abstract)
    assert jax.tree.structure(again.abstract) == jax.tree.structure(abstract)
    for one, other in zip(*map(jax.tree.leaves, (abstract, again.abstract)), strict=True):
        assert (one.shape, one.dtype, one.sharding) == (other.shape, other.dtype, other.sharding)


def test_an_outline_does_not_depend_on_the_mesh():
    whole = stage("vadapter")
    sharded = whole.abstract
    one = Stage(RECIPE, "vadapter", make_mesh(programs.MESHES["data"]), vocab_size=300)
    assert one.outline == whole.outline
    assert jax.tree.structure(one.abstract) == jax.tree.structure(sharded)


def changed(recipe, stages=None, components=None, **keys):
    """Return a recipe with other keys, of some stages and components too."""
    new_stages = {
        name: dataclasses.replace(config, **(stages or {}).get(name, {}))
        for name, config in recipe.stages.items()
    }
    specs = {
        name: spec | (components or {}).get(name, {}) for name, spec in recipe.components.items()
    }
    return dataclasses.replace(recipe, stages=new_stages, components=specs, **keys)


@pytest.mark.parametrize(
    "change",
    [
        {"components": {"llm": {"depth": 3}}},
        {"components": {"encoder": {"tap": "penultimate"}}},
        {"components": {"resampler": {"kind": "mlp", "hidden_dim": 8}}},
        {"stages": {"vadapter": {"bidirectional": True}}},
        {"stages": {"vadapter": {"exit_layer": 1}}},
        {"stages": {"vadapter": {"chain": ("resampler", "fc_out")}}},
        {"dtype": "bfloat16"},
        {"vocab_size": 301},
    ],
    ids=str,
)
def test_what_the_model_follows_from_has_its_own_outline(change):
    size = change.get("vocab_size", 300)
    recipe = changed(RECIPE, **{k: v for k, v in change.items() if k != "vocab_size"})
    stage("vadapter").outline  # noqa: B018 - is kept
    facts = outline.facts(recipe, recipe.stages["vadapter"], size)
    assert outline.kept(facts) is None


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 7},
        {"components": {"llm": {"weights": "/elsewhere"}}},
        {"components": {"perceiver": {"layers": 5}}},  # not of this stage
        {"stages": {"vadapter": {"steps": 99, "batch": 16, "fresh": ("fc_out",)}}},
        {"data": {}},
    ],
    ids=str,
)
def test_what_the_model_does_not_follow_from_shares_an_outline(change):
    recipe = changed(RECIPE, **change)
    known = stage("vadapter").outline
    assert outline.kept(outline.facts(recipe, recipe.stages["vadapter"], 300)) == known


def test_a_size_counts_by_what_it_is(monkeypatch):
    from vadapter.models import registry

    recipe = changed(RECIPE)
    recipe.components["llm"] = {"size": "tiny"}
    monkeypatch.setitem(registry.SIZES, "tiny", {"kind": "lm", "width": 16})
    before = outline.facts(recipe, recipe.stages["vadapter"], 300)
    monkeypatch.setitem(registry.SIZES, "tiny", {"kind": "lm", "width": 32})
    assert outline.facts(recipe, recipe.stages["vadapter"], 300) != before
