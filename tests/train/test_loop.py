"""One stage in this process: what is logged, skipped, counted, stopped, and in which order."""

import json
import re

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from support import faults, runs
from support.patches import use_batches, use_devices, use_fake_step
from support.recipes import tiny_recipe

from vadapter.checkpoints import array_io
from vadapter.checkpoints.manager import steps
from vadapter.data.open import make_stream
from vadapter.data.pipeline import make_loader
from vadapter.errors import CheckpointError, NonFiniteError, Preempted
from vadapter.io.json_files import rows
from vadapter.recipe.schema import read
from vadapter.stages.initialization import DONE
from vadapter.stages.run import Run
from vadapter.train import loop
from vadapter.train.loop import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.prepare(tmp_path_factory.mktemp("loop"))


@pytest.fixture
def fake(monkeypatch):
    """Steps without a model."""
    use_fake_step(monkeypatch)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Programs compile faster for one device than for eight."""
    use_devices(monkeypatch, 1)


@pytest.fixture
def batches(monkeypatch):
    """Every batch that goes to the devices while training, as `(id, targets)` of its rows.

    The test may change a batch: `batches.spoil` maps the number of a batch to a function of it.
    """

    class Seen(list):
        spoil = {}  # noqa: RUF012

    seen = Seen()

    def record(batch):
        seen.append((batch["id"].tolist(), batch["targets"].tolist()))
        return seen.spoil.get(len(seen), lambda b: b)(batch)

    use_batches(monkeypatch, record)
    return seen


def infinite(batch):
    return {**batch, "weights": np.where(batch["weights"] > 0, np.inf, 0).astype(np.float32)}


def metrics(workdir, stage):
    return list(rows(workdir / stage / "metrics.jsonl"))


def test_the_first_loss_is_that_of_the_first_batch_at_the_first_parameters(folder, tmp_path):
    recipe = read(runs.text_only(folder, steps=2))
    train(recipe, tmp_path)

    (tmp_path / "llm" / DONE).unlink()
    stage = Run(recipe, tmp_path).stage("llm")
    params, _ = stage.load_params()
    items, transform = make_stream(
        "documents",
        recipe.data["documents"],
        stage.source("documents"),
        stage.tokenizer,
        None,
    )
    streams = {"documents": (items, transform, 1.0)}
    batch = next(make_loader(streams, global_batch=8, seed=recipe.seed))
    logits = np.asarray(stage.model.logits(params, stage.model.read(params, None, batch)))
    chosen = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    nats = np.log(np.exp(logits.astype(np.float64)).sum(-1)) - chosen
    by_hand = (nats * batch["weights"]).sum() / batch["weights"].sum()

    first = metrics(tmp_path, "llm")[0]
    assert first["step"] == 1
    assert first["targets"] == batch["weights"].sum()
    np.testing.assert_allclose(first["loss"], by_hand, rtol=1e-5)


def test_a_resumed_run_sees_the_batches_that_come_next_and_ends_alike(
    folder, tmp_path, fake, batches
):
    recipe = read(runs.blind(folder, steps=7, save_every=3))
    train(recipe, tmp_path / "whole")
    whole = batches.copy()
    batches.clear()
    stopped = pytest.raises(Preempted, match="decoder, step 4, saved: stopped by SIGTERM")
    with faults.injected("TERM:decoder:step:4"), stopped:  # an epoch ends with step 3
        train(recipe, tmp_path / "cut")
    assert steps(tmp_path / "cut/decoder/checkpoints") == [3, 4]
    train(recipe, tmp_path / "cut")
    assert batches == whole
    assert len(batches) == 7
    assert runs.trained_digests(tmp_path / "cut", ("decoder",)) == runs.trained_digests(
        tmp_path / "whole", ("decoder",)
    )


def test_two_stages_on_the_same_data_see_the_same_batches(folder, tmp_path, fake, batches):
    config = runs.blind(folder, steps=5)
    with config.unlocked():
        config.data.clips = tiny_recipe(folder / "shapes").data.clips
        config.stages.decoder.data = {"images": 1.0, "clips": 1.0}
        config.stages.other = {**config.stages.decoder.to_dict(), "chain": ("resampler", "fc_in")}
        config.chain = ("decoder", "other")
    train(read(config), tmp_path)
    assert batches[:5] == batches[5:]
    assert len({str(ids) for ids, _ in batches}) == 5  # and they differ within a stage


def test_images_and_clips_share_a_run_and_each_shape_is_compiled_once(folder, tmp_path):
    config = runs.blind(folder, steps=6)
    with config.unlocked():
        config.data.clips = tiny_recipe(folder / "shapes").data.clips
        config.stages.decoder.data = {"images": 1.0, "clips": 1.0}
        config.components.front = {"kind": "pooler", "queries": 2, "width": 16, "heads": 2}
    train(read(config), tmp_path)
    told = metrics(tmp_path, "decoder")
    assert [row["step"] for row in told] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in told if "compile_s" in row] == [1, 2]
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in told)


def test_an_update_that_is_not_finite_is_dropped_counted_and_harmless(
    folder, tmp_path, batches, capsys
):
    recipe = read(runs.text_only(folder, steps=4, log_every=100))
    batches.spoil = {2: infinite}
    train(recipe, tmp_path)
    told = metrics(tmp_path, "llm")
    assert [(row["step"], row["skipped"]) for row in told] == [(1, 0), (4, 1)]
    said = capsys.readouterr().out
    assert "llm: step 2: gradients not finite, update dropped (1 in a row)" in said
    assert np.isfinite(told[-1]["loss"])


@pytest.mark.parametrize(
    ("spoilt", "save_every", "kept"),
    [((3, 4, 5), 2, [2, 4]), ((2, 3, 4), 4, [])],
)
def test_three_in_a_row_end_the_run_before_anything_more_is_saved(
    folder, tmp_path, fake, batches, spoilt, save_every, kept
):
    recipe = read(runs.blind(folder, steps=8, save_every=save_every, log_every=100))
    batches.spoil = dict.fromkeys(spoilt, infinite)
    with pytest.raises(NonFiniteError, match=f"3 steps in a row, up to step {spoilt[-1]}"):
        train(recipe, tmp_path)
    assert steps(tmp_path / "decoder/checkpoints") == kept
    assert not (tmp_path / "decoder" / DONE).exists()


def test_dropped_updates_are_counted_across_a_restart(folder, tmp_path, fake, batches):
    recipe = read(runs.blind(folder, steps=8))
    batches.spoil = dict.fromkeys((2, 3, 4), infinite)
    stopped = pytest.raises(Preempted, match="step 3, saved: stopped by SIGINT")
    with faults.injected("INT:decoder:step:3"), stopped:
        train(recipe, tmp_path)
    with pytest.raises(NonFiniteError, match="up to step 4"):
        train(recipe, tmp_path)


def test_a_frozen_component_that_changes_is_an_error_and_nothing_is_finished(
    folder, tmp_path, fake, monkeypatch
):
    honest = loop._steps

    def drift(stage, state, frozen, *rest):
        state = honest(stage, state, frozen, *rest)
        leaves, tree = jax.tree.flatten(frozen["encoder"])
        leaves[3] = leaves[3].at[(0,) * leaves[3].ndim].multiply(1 + 2**-20)
        frozen["encoder"] = jax.tree.unflatten(tree, leaves)
        return state

    monkeypatch.setattr(loop, "_steps", drift)
    with pytest.raises(
        CheckpointError, match="decoder: encoder is frozen but changed during train"
    ):
        train(read(runs.blind(folder, steps=2)), tmp_path)
    assert not (tmp_path / "decoder" / DONE).exists()


def test_a_stop_between_stages_or_before_the_first_ends_the_run(
    folder, tmp_path, fake, monkeypatch
):
    recipe = read(runs.blind(folder, steps=2))
    with faults.injected("TERM:decoder:stored"):  # too late for this stage
        train(recipe, tmp_path)
    monkeypatch.setattr(Run, "check", lambda self: faults.fault("TERM", "check"))
    with pytest.raises(Preempted, match=r"^decoder: stopped by SIGTERM"):
        train(recipe, tmp_path)


def test_settings_without_effect_on_the_result_may_change_at_a_resume(folder, tmp_path, fake):
    with faults.injected("TERM:decoder:step:2"), pytest.raises(Preempted):
        train(read(runs.blind(folder)), tmp_path)
    free = {"save_every": 5, "keep": 1, "log_every": 3, "chunk_rows": 64, "eval_limit": 2}
    train(read(runs.blind(folder, **free)), tmp_path)
    train(read(runs.blind(folder)), tmp_path)  # nor once it is done
    assert json.loads((tmp_path / "decoder" / DONE).read_text())["steps"] == runs.STEPS


def test_data_may_move_to_another_folder_but_not_change(folder, tmp_path, fake):
    first, second = (runs.prepare(tmp_path / name) for name in ("first", "second"))
    with faults.injected("TERM:decoder:step:2"), pytest.raises(Preempted):
        train(read(runs.blind(first)), tmp_path / "run")
    train(read(runs.blind(second)), tmp_path / "run")
    table = second / "shapes/images.jsonl"
    table.write_text(table.read_text().replace("red", "rot", 1))
    with pytest.raises(
        CheckpointError, match=r"another configuration:\n.*\n.*fingerprints\.images"
    ):
        train(read(runs.blind(second)), tmp_path / "run")


def test_in_bfloat16_frozen_parts_are_half_and_what_is_trained_stays_float32(folder, tmp_path):
    config = runs.blind(folder)
    config.dtype = "bfloat16"
    stage = Run(read(config), tmp_path / "mixed").stage("decoder")
    dtypes = lambda tree: {str(x.dtype) for x in jax.tree.leaves(tree)}  # noqa: E731
    trainable, frozen = stage.load_params()
    assert (dtypes(trainable), dtypes(frozen)) == ({"float32"}, {"bfloat16"})
    config = runs.text_only(folder, steps=2)
    config.dtype = "bfloat16"
    recipe = read(config)
    train(recipe, tmp_path / "text")
    assert all(np.isfinite(row["loss"]) for row in metrics(tmp_path / "text", "llm"))
    (tmp_path / "text/llm" / DONE).unlink()
    stage = Run(recipe, tmp_path / "text").stage("llm")
    state, _ = array_io.load(tmp_path / "text/llm/checkpoints/2", stage.abstract_state)
    assert dtypes((state.params, state.opt_state)) == {"float32", "int32"}
    overview = (tmp_path / "text/llm/parameters.txt").read_text()
    for name, x in flatten_dict(state.params, sep="/").items():
        assert re.search(rf"\| {name} +\| {re.escape(str(x.shape))} +\| float32 ", overview)
