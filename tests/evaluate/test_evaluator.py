"""Evaluations while a stage trains: what they share with the one at its end."""

import dataclasses

import pytest
from support.patches import with_recipe

from vadapter.evaluate import evaluator
from vadapter.metrics.scoring import Result
from vadapter.stages import feature_cache
from vadapter.stages.restore import open_run


def small(loaded, *, batch, limit):
    """The stage with an evaluation of such batches, on so many items while it trains."""
    spec = dataclasses.replace(loaded.recipe.evals["captions"], batch=batch)
    config = dataclasses.replace(
        loaded.config, evals=("captions",), loss=(), eval_every=1, eval_limit=limit
    )
    stages = {**loaded.recipe.stages, loaded.name: config}
    recipe = dataclasses.replace(loaded.recipe, stages=stages, evals={"captions": spec})
    return with_recipe(loaded, recipe)


@pytest.mark.parametrize(
    ("batch", "limit", "shared"), [(8, 4, 4), (8, 7, 7), (8, 8, 8), (8, 9, 8), (8, 3, 8), (8, 0, 8)]
)
def test_batches_have_one_size_unless_those_of_training_are_less_than_half(
    chain, monkeypatch, batch, limit, shared
):
    loaded, seen = open_run(chain / "run", "vadapter"), []

    def recorded(decoder, params, source, data, spec, view):
        seen.append((spec.limit, spec.batch))
        return Result({}, [])

    monkeypatch.setattr(evaluator, "evaluate", recorded)
    stage = small(loaded, batch=batch, limit=limit)
    evaluate = evaluator.Evaluator(stage, loaded.params)
    for items in (limit, 0):
        evaluate({}, items)
    full = stage.recipe.evals["captions"].limit
    assert seen == [(min(limit or full, full or limit), shared), (full, shared)]


def test_cached_tokens_are_checked_once_in_all_evaluations(chain, monkeypatch, tmp_path):
    loaded, opened = open_run(chain / "run", "vadapter"), []
    encoded = feature_cache.encoded
    monkeypatch.setattr(
        feature_cache, "encoded", lambda *a, **k: opened.append(1) or encoded(*a, **k)
    )
    name = loaded.recipe.evals["captions"].data
    data = dataclasses.replace(loaded.recipe.data[name], cache=True, cache_dir=str(tmp_path))
    recipe = dataclasses.replace(loaded.recipe, data={**loaded.recipe.data, name: data})
    other = with_recipe(loaded, recipe)
    first = other.features(name, other.params)
    assert other.features(name, other.params) is first
    assert opened == [1]
    other.digests = {**other.digests, other.model.encoder: "0" * 64}
    assert other.features(name, other.params) is not first, "of another encoder"
