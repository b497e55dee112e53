"""Where every tensor of a stage comes from. The stages before it are fakes; nothing is trained."""

import json
import shutil

import jax
import numpy as np
import pytest
from support import runs, tiny
from support.qformer_files import write_blip2
from support.recipes import draw, tiny_recipe

from vadapter.distributed.mesh import make_mesh
from vadapter.errors import CheckpointError, ConfigError
from vadapter.recipe.schema import read, trained
from vadapter.stages.initialization import DONE, check_sources, load, plan, report
from vadapter.stages.stage import Stage

VOCAB = 300


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run directory in which tlm, llm, vision and decoder are finished, and its recipe."""
    folder = tmp_path_factory.mktemp("initialization")
    config = tiny_recipe(draw(folder / "shapes"))
    config.components.tlm.depth = 2
    recipe, stages = read(config), {}
    for seed, name in enumerate(("tlm", "llm", "vision", "decoder")):
        shapes = abstract(recipe, name)
        stages[name] = {n: tiny.filled(shapes[n], seed) for n in trained(recipe.stages[name])}
        runs.finish_stage(folder / "run" / name, stages[name])
    return config, folder / "run", stages


@pytest.fixture
def config(world):
    return world[0].copy_and_resolve_references()


def abstract(recipe, stage):
    return Stage(recipe, stage, make_mesh(recipe.mesh), vocab_size=VOCAB).abstract


def planned(config, workdir, stage="vadapter"):
    recipe = read(config)
    shapes = abstract(recipe, stage)
    return plan(recipe, recipe.stages[stage], workdir, shapes), shapes, recipe


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_stage_2_takes_every_tensor_from_the_source_in_the_recipe(config, world):
    _, workdir, stages = world
    starts, shapes, _ = planned(config, workdir)
    sources = {name: start.source for name, start in starts.items()}
    assert sources == {
        "encoder": "stage vision",
        "resampler": "stage decoder",
        "fc_in": "stage decoder",
        "tlm": "stage decoder",
        "fc_out": "random",
        "llm": "stage llm",
    }
    assert starts["tlm"].dropped == ("embedding.embedding",)
    same(load(starts["resampler"], shapes["resampler"], None), stages["decoder"]["resampler"])
    without = {k: v for k, v in stages["decoder"]["tlm"].items() if k != "embedding"}
    same(load(starts["tlm"], shapes["tlm"], None), without)
    assert load(starts["fc_out"], shapes["fc_out"], "drawn") == "drawn"


def test_the_table_lists_the_size_and_the_start_of_each_component(config, world):
    starts, shapes, recipe = planned(config, world[1])
    lines = report(starts, recipe.stages["vadapter"], shapes).splitlines()
    order = ["encoder", "resampler", "fc_in", "tlm", "fc_out", "llm"]  # of the data flow
    assert [line.split()[0] for line in lines] == order
    digest = json.loads((world[1] / "decoder" / DONE).read_text())["components"]["tlm"]
    tlm = next(line for line in lines if line.split()[0] == "tlm")
    size = sum(x.size for x in jax.tree.leaves(shapes["tlm"]))
    assert tlm.split()[1:4] == [f"{size:,}", "trained", "stage"]
    assert tlm.endswith(f"stage decoder [{digest[:12]}] 9 tensors; dropped: embedding.embedding")
    assert [line.split()[2] for line in lines] == ["frozen", *["trained"] * 4, "frozen"]


@pytest.mark.parametrize(
    ("start", "source"),
    [("random", "random"), ("tlm", "stage tlm"), ("decoder", "stage decoder")],
    ids=["random", "language-pretrained", "stage 1"],
)
def test_the_papers_three_initializations_differ_by_one_word(config, world, start, source):
    """Paper, Table 3."""
    config.stages.vadapter.start.tlm = start
    starts, shapes, _ = planned(config, world[1])
    assert starts["tlm"].source == source
    if start != "random":
        loaded = load(starts["tlm"], shapes["tlm"], None)
        same(loaded["stack"], world[2][start]["tlm"]["stack"])


@pytest.mark.parametrize(
    ("layer", "mesh"), [(1, {}), (-1, {"data": 1, "fsdp": 2, "tensor": 4})], ids=str
)
def test_a_tiny_lm_that_queries_leave_early_takes_its_first_layers_alone(
    config, world, layer, mesh
):
    config.mesh.update(mesh)
    with config.unlocked():
        config.stages.vadapter.exit_layer = layer
    starts, shapes, recipe = planned(config, world[1])
    loaded, whole = load(starts["tlm"], shapes["tlm"], None), world[2]["decoder"]["tlm"]
    same(loaded["stack"], jax.tree.map(lambda x: x[:1], whole["stack"]))
    same(loaded["norm"], whole["norm"])
    for one, other in zip(*map(jax.tree.leaves, (loaded, shapes["tlm"])), strict=True):
        assert one.sharding == other.sharding
    assert "; the first 1 of 2 layers" in report(starts, recipe.stages["vadapter"], shapes)
    same(load(starts["resampler"], shapes["resampler"], None), world[2]["decoder"]["resampler"])


def test_a_projection_may_start_with_outputs_as_large_as_words(config, world):
    def started(init):
        config.components.fc_out.init = init
        recipe = read(config)
        mesh = make_mesh(recipe.mesh)
        stage = Stage(recipe, "vadapter", mesh, workdir=world[1], vocab_size=VOCAB)
        trained, frozen = stage.load_params()
        visual = np.random.default_rng(1).standard_normal((8, 1, 16, 16)).astype(np.float32)
        return stage.adapter_model.prefix(trained | frozen, visual), trained["fc_out"]["out"]

    with config.unlocked():
        (_, unit), (soft_tokens, words) = map(started, ("unit", "words"))
    width = config.components.llm.width
    embeddings = world[2]["llm"]["llm"]["embedding"]["embedding"] * width**0.5
    size = lambda x: float(np.sqrt(np.square(x).mean()))  # noqa: E731
    assert size(soft_tokens) == pytest.approx(size(embeddings), rel=0.05)
    ratios = np.asarray(words["kernel"] / unit["kernel"])
    np.testing.assert_allclose(ratios, ratios.mean(), rtol=1e-4)
    assert not np.any(words["bias"])


def test_a_projection_in_front_of_a_language_model_without_words_is_refused(config):
    with config.unlocked():
        config.components.fc_in.init = "words"
    assert abstract(read(config), "decoder")
    assert abstract(read(config), "vadapter"), "it comes from stage 1"
    del config.stages.vadapter.start["fc_in"]
    with pytest.raises(ConfigError, match=r"components\.fc_in\.init=words: tlm, which"):
        abstract(read(config), "vadapter")


@pytest.mark.parametrize(
    ("stage", "layer", "message"),
    [("vadapter", 3, "exit_layer=3: components.tlm has the layers 1 to 2"),
     ("vadapter", -2, "exit_layer=-2: components.tlm has the layers 1 to 2"),
     ("perceiver", 1, "exit_layer=1: there is no language model in the stage's chain, perceiver")],
)  # fmt: skip
def test_an_exit_that_there_is_not_is_refused(config, stage, layer, message):
    with config.unlocked():
        config.stages[stage].exit_layer = layer
    with pytest.raises(ConfigError, match=message):
        abstract(read(config), stage)


def test_a_stage_of_another_run_is_named_by_its_path(config, world, tmp_path, monkeypatch):
    _, workdir, stages = world
    shutil.copytree(workdir, tmp_path / "other")
    monkeypatch.setenv("RUNS", str(tmp_path))
    with config.unlocked():
        for name in ("encoder", "llm", "resampler"):
            config.stages.vadapter.start[name] = (
                f"$RUNS/other/{world[0].stages.vadapter.start[name]}"
            )
    run = shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(run / "vision")
    shutil.rmtree(run / "components")
    shutil.copytree(
        workdir / "components", run / "components", ignore=shutil.ignore_patterns("enc*")
    )
    starts, shapes, _ = planned(config, run)
    assert starts["encoder"].source == "stage $RUNS/other/vision"
    same(load(starts["resampler"], shapes["resampler"], None), stages["decoder"]["resampler"])
    shutil.rmtree(tmp_path / "other")  # what is frozen is kept by the run that needs it
    same(load(starts["encoder"], shapes["encoder"], None), stages["vision"]["encoder"])
    same(load(starts["llm"], shapes["llm"], None), stages["llm"]["llm"])


def refit(world, tmp_path, change):
    """Return a run directory whose stage `decoder` stored the resampler that `change` returns."""
    run = shutil.copytree(world[1], tmp_path / "run")
    shutil.rmtree(run / "decoder")
    parts = jax.tree.map(np.copy, world[2]["decoder"])
    runs.finish_stage(run / "decoder", {**parts, "resampler": change(parts["resampler"])})
    return run


def without_queries(tree):
    return {k: v for k, v in tree.items() if k != "queries"}


def test_a_tensor_that_is_missing_stops_the_run_unless_it_may_start_fresh(config, world, tmp_path):
    run = refit(world, tmp_path, without_queries)
    with pytest.raises(CheckpointError, match="resampler from stage decoder does not fit") as error:
        planned(config, run)
    assert "queries: missing (list resampler/queries in fresh" in str(error.value)
    with config.unlocked():
        config.stages.vadapter.fresh = ("resampler/queries",)
    starts, shapes, recipe = planned(config, run)
    assert starts["resampler"].fresh == ("queries",)
    drawn = tiny.filled(shapes["resampler"], seed=9)
    made = load(starts["resampler"], shapes["resampler"], drawn)
    same(made, {**world[2]["decoder"]["resampler"], "queries": drawn["queries"]})
    assert "; fresh: queries" in report(starts, recipe.stages["vadapter"], shapes)


def test_an_unexpected_tensor_stops_the_run_unless_it_may_be_dropped(config, world, tmp_path):
    run = refit(world, tmp_path, lambda tree: {**tree, "gate": {"bias": np.ones(3, np.float32)}})
    with pytest.raises(CheckpointError, match=r"gate\.bias: unexpected \(list resampler/gate"):
        planned(config, run)
    with config.unlocked():
        config.stages.vadapter.drop = ("resampler/gate",)
    starts, *_ = planned(config, run)
    assert starts["resampler"].dropped == ("gate.bias",)


def test_a_tensor_of_another_shape_is_never_truncated_or_padded(config, world, tmp_path):
    run = refit(world, tmp_path, lambda tree: {**tree, "queries": tree["queries"][:, :2]})
    with pytest.raises(
        CheckpointError, match=r"queries: shape \(1, 2, 16\) is .* \(1, 4, 16\) is ne"
    ):
        planned(config, run)
    with config.unlocked():
        config.stages.vadapter.fresh = ("resampler/queries",)
    starts, shapes, _ = planned(config, run)
    assert starts["resampler"].fresh == starts["resampler"].dropped == ("queries",)
    drawn = tiny.filled(shapes["resampler"], seed=9)
    made = load(starts["resampler"], shapes["resampler"], drawn)
    same(made["queries"], drawn["queries"])


def test_a_prefix_matches_whole_names_and_not_the_start_of_one(config, world, tmp_path):
    run = refit(world, tmp_path, lambda tree: {**tree, "gates": np.ones(3, np.float32)})
    with config.unlocked():
        config.stages.vadapter.drop = ("resampler/gate",)
    with pytest.raises(CheckpointError, match="gates: unexpected"):
        planned(config, run)


def test_a_long_list_is_truncated(config, world):
    with config.unlocked():
        config.stages.vadapter.rename = {"resampler": "tlm"}
    with pytest.raises(CheckpointError, match=r"^resampler from stage decoder") as error:
        planned(config, world[1])
    lines = str(error.value).splitlines()
    assert len(lines) == 10
    assert lines[-1].startswith("  … ")


def test_a_component_may_have_another_name_in_its_source_stage(config, world):
    with config.unlocked():
        config.components.first = config.components.fc_in
        config.stages.vadapter.chain = ("resampler", "first", "tlm", "fc_out")
        config.stages.vadapter.start = {
            "first": "decoder",
            **config.stages.vadapter.start.to_dict(),
        }
        del config.stages.vadapter.start.fc_in
        config.stages.vadapter.rename = {"first": "fc_in"}
    starts, shapes, _ = planned(config, world[1])
    same(load(starts["first"], shapes["first"], None), world[2]["decoder"]["fc_in"])


def test_a_stage_that_is_not_finished_or_is_corrupt_is_refused(config, world, tmp_path):
    run = shutil.copytree(world[1], tmp_path / "run")
    (run / "llm" / DONE).unlink()
    with pytest.raises(
        CheckpointError, match=r"llm is not finished \(no .*done\.json\); run it fi"
    ):
        planned(config, run)
    (run / "llm" / DONE).write_text('{"components": ')
    with pytest.raises(CheckpointError, match=r"done\.json is corrupt .*; restore it from a ba"):
        planned(config, run)
    shutil.copy(world[1] / "llm" / DONE, run / "llm" / DONE)
    [stored] = (run / "components").glob("llm-*")
    shutil.rmtree(stored)
    with pytest.raises(CheckpointError, match=r"llm-.* is missing: load the weights of llm again"):
        planned(config, run)


def test_what_public_weights_do_not_fit_starts_random_where_the_recipe_lists_it(
    config, world, tmp_path
):
    """A Q-Former that was trained with an encoder of another width."""
    with config.unlocked():
        config.components.perceiver = {"weights": str(write_blip2(tmp_path))}
    with pytest.raises(
        CheckpointError, match=r"key\.weight is \[8, 6\].* needs \[8, 16\]"
    ) as error:
        planned(config, world[1], "perceiver")
    misfits = ("groups/layer_0/cross/k/kernel", "groups/layer_0/cross/v/kernel",
               "norm_visual/bias", "norm_visual/scale")  # fmt: skip
    advice = str(error.value).splitlines()[-1]
    assert "an encoder of the same width, or list the parameters in the stage's fresh" in advice
    assert all(f"perceiver/{path}" in advice for path in misfits)

    config.stages.perceiver.fresh = ("perceiver/norm_visual",)
    with pytest.raises(CheckpointError, match=r"key\.weight is \[8, 6\]"):
        planned(config, world[1], "perceiver")
    config.stages.perceiver.fresh = ("perceiver/norm_visual", "perceiver/groups/layer_0/cross")
    starts, shapes, recipe = planned(config, world[1], "perceiver")
    start, drawn = starts["perceiver"], tiny.filled(shapes["perceiver"], seed=9)
    assert start.fresh == tuple(path.replace("/", ".") for path in misfits)
    assert start.needs_init
    assert "vision_model.post_layernorm.bias" in start.dropped
    made, own = (tiny.paths(t) for t in (load(start, shapes["perceiver"], drawn), drawn))
    assert made.keys() == own.keys()
    assert {path for path in own if np.array_equal(made[path], own[path])} == set(misfits)
    line = report(starts, recipe.stages["perceiver"], shapes).splitlines()[1]
    assert "; fresh: groups.layer_0.cross.k.kernel, " in line


def test_a_frozen_component_needs_a_source_of_weights(config, world):
    with config.unlocked():
        del config.stages.vadapter.start.llm
    with pytest.raises(ConfigError, match=r"llm is frozen in this stage but has no source of wei"):
        planned(config, world[1])
    with config.unlocked():
        config.stages.vadapter.start.llm = "random"
    with pytest.raises(ConfigError, match="llm is frozen in this stage: it cannot start random"):
        planned(config, world[1])


def test_starts_that_no_stage_of_the_run_provides_are_checked_beforehand(config, world, tmp_path):
    def check(**start):
        with config.unlocked():
            config.stages.vadapter.start.update(start)
        check_sources(read(config), "vadapter", tmp_path)

    check(encoder="vision")  # nothing is finished here, but all of it will be
    with pytest.raises(CheckpointError, match="nowhere/vision is not finished"):
        check(encoder=f"{tmp_path}/nowhere/vision")
    with pytest.raises(CheckpointError, match=r"run/tlm trained tlm, not encoder; fix start\.enc"):
        check(encoder=f"{world[1]}/tlm")
    with pytest.raises(ConfigError, match=r"environment variable NO_SUCH is not set"):
        check(encoder="$NO_SUCH/run/vision")
    with pytest.raises(
        ConfigError, match=r"start\.encoder='weights', but components\.encoder\.wei"
    ):
        check(encoder="weights")
    with config.unlocked():
        config.components.resampler.weights = "x"
    with pytest.raises(
        ConfigError, match="for mobilenet, video_vit, vit, lm, qformer, not for kind 'resampler'"
    ):
        check(resampler="weights", encoder="vision")
    with config.unlocked():
        config.components.encoder = {"kind": "mobilenet", "weights": str(tmp_path / "no")}
    with pytest.raises(CheckpointError, match=r"components\.encoder\.weights: There is no folder"):
        check(resampler="decoder", encoder="weights")
