"""A stage builds its model once and traces its init once, whatever it is used for."""

from collections import Counter

import flax.linen as nn
import jax
import pytest
from support.recipes import draw, tiny_recipe

from vadapter.checkpoints.digest import combined, tree_digests
from vadapter.models.adapter_model import component_key
from vadapter.recipe.schema import read
from vadapter.stages.run import Run


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return read(tiny_recipe(draw(tmp_path_factory.mktemp("stage") / "shapes")))


@pytest.fixture
def calls():
    """How often each kind of module is called: in Python, so once per trace."""
    counts = Counter()

    def count(call, args, kwargs, context):
        if context.method_name == "__call__" and context.module.scope.path == ():
            counts[type(context.module).__name__] += 1
        return call(*args, **kwargs)

    with nn.intercept_methods(count):
        yield counts


def test_shapes_and_random_parameters_come_from_one_trace(recipe, tmp_path, calls):
    stage = Run(recipe, tmp_path).stage("vision")
    assert set(stage.abstract) == {"encoder", "pooler", "text", "fusion"}
    trainable, frozen = stage.load_params()
    assert not frozen
    assert stage.on(stage.mesh, batch=8).abstract.keys() == trainable.keys()
    assert calls == {"ViT": 1, "Pooler": 1, "Fusion": 1, "LM": 1}


def test_a_checked_stage_is_trained_without_another_trace(recipe, tmp_path):
    run = Run(recipe, tmp_path)
    run.check()
    assert run.stage("vision") is run.stage("vision")
    with nn.intercept_methods(lambda *_: pytest.fail("a module is called again")):
        run.stage("vision").load_params()


def test_the_values_of_a_component_depend_on_seed_stage_and_its_name_alone(recipe, tmp_path):
    stage = Run(recipe, tmp_path).stage("vision")
    rng = component_key(jax.random.key(recipe.seed), "vision")
    all_of_them, _ = stage.load_params()
    for name, params in all_of_them.items():
        alone = stage.initializer.random([name], rng, stage.abstract)[name]
        assert combined(tree_digests(alone)) == combined(tree_digests(params)), name
