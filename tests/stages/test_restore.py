"""A trained stage is restored from its run directory alone, with its final parameters."""

import json
import logging
import shutil

import jax
import pytest
from support.recipes import tiny_recipe

from vadapter.checkpoints.digest import combined, tree_digests
from vadapter.data.media.images import ImageTransform
from vadapter.distributed.mesh import MeshConfig, make_mesh
from vadapter.errors import CheckpointError, ConfigError
from vadapter.recipe.schema import read
from vadapter.stages import initialization
from vadapter.stages.restore import open_run, read_run
from vadapter.stages.stage import Stage


@pytest.fixture
def run(chain, tmp_path):
    """A copy of the run, under a name that is no URL and with no data beside it."""
    target = tmp_path / "moved 100% #1?"
    shutil.copytree(chain / "run", target)
    config = (target / "config.json").read_text().replace(str(chain / "shapes"), "/nowhere")
    config = json.loads(config)
    config["components"]["encoder"]["weights"] = "/nowhere/weights"
    (target / "config.json").write_text(json.dumps(config))
    return target


def digest(tree):
    return combined(tree_digests(tree))


def test_a_moved_run_opens_without_data_and_weights_as_it_was_trained(run):
    loaded = open_run(run)
    assert (loaded.name, loaded.step, loaded.view) == ("perceiver", 40, ImageTransform(32))
    records = {s: json.loads((run / s / "done.json").read_text()) for s in loaded.recipe.chain}
    done = {stage: record["components"] for stage, record in records.items()}
    expected = {
        "encoder": done["vision"]["encoder"],
        "perceiver": done["perceiver"]["perceiver"],
        "fc_out": done["perceiver"]["fc_out"],
        "llm": done["llm"]["llm"],
    }
    assert {name: digest(tree) for name, tree in loaded.params.items()} == expected
    assert loaded.digests == {name: expected[name] for name in ("encoder", "llm")}
    assert loaded.mesh.size == 8  # it was trained on one device
    assert all(x.sharding.mesh == loaded.mesh for x in jax.tree.leaves(loaded.params))
    assert loaded.tokenizer.digest == records["perceiver"]["identity"]["tokenizer"]


def test_a_stage_is_opened_by_its_name_and_text_stages_have_no_images(run):
    loaded = open_run(run, "vadapter", step=40)
    assert set(loaded.params) == {"encoder", "resampler", "fc_in", "tlm", "fc_out", "llm"}
    assert "embedding" not in loaded.params["tlm"]  # dropped at its initialization
    assert open_run(run, "tlm").view is None


def test_the_default_is_the_last_stage_that_has_a_checkpoint(run):
    shutil.rmtree(run / "perceiver")
    assert open_run(run).name == "vadapter"


def test_a_corrupt_checkpoint_is_skipped_with_a_warning(run, caplog):
    newer = run / "perceiver" / "checkpoints" / "50"
    shutil.copytree(newer.with_name("40"), newer)
    with caplog.at_level(logging.WARNING):
        assert open_run(run).step == 40
    assert "50: contains step 40" in caplog.text

    for step in ("40", "50"):
        (newer.with_name(step) / "meta" / "metadata").write_text("{")
    with pytest.raises(CheckpointError, match=r"of perceiver can be used:(.|\n)*50(.|\n)*40"):
        open_run(run)


def test_the_checkpoint_overrides_a_recipe_that_was_changed_afterwards(run):
    config = json.loads((run / "config.json").read_text())
    config["components"]["perceiver"]["layers"] = 6
    config["stages"]["perceiver"]["bidirectional"] = True
    (run / "config.json").write_text(json.dumps(config))
    loaded = open_run(run)
    assert not loaded.config.bidirectional
    assert loaded.recipe.components["perceiver"]["layers"] == 2


def test_a_mesh_of_more_devices_becomes_data_parallelism(run, caplog):
    config = json.loads((run / "config.json").read_text())
    config["mesh"] = {"data": 16, "fsdp": 16, "tensor": 1}
    (run / "config.json").write_text(json.dumps(config))
    assert dict(open_run(run).mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert "does not cover 8 devices" in caplog.text
    assert dict(open_run(run, overrides=["mesh.data=4", "mesh.fsdp=2"]).mesh.shape)["fsdp"] == 2


MISTAKES = {
    "tml": (ConfigError, "did you mean 'tlm'"),
    "vision": (ConfigError, "trains the encoder; choose one of decoder, vadapter, perceiver"),
    "llm": (CheckpointError, "no checkpoint yet in .*llm: train that stage first"),
}


@pytest.mark.parametrize("stage", MISTAKES)
def test_a_stage_that_cannot_be_opened_is_explained(run, stage):
    shutil.rmtree(run / "llm")
    kind, words = MISTAKES[stage]
    with pytest.raises(kind, match=words):
        open_run(run, stage)


def test_a_missing_file_is_named(run, tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 .* there are steps \[40\]"):
        open_run(run, "decoder", step=7)
    with pytest.raises(CheckpointError, match=r"no run in .*: there is no config\.json"):
        open_run(tmp_path)
    encoder = next((run / "components").glob("encoder-*"))
    encoder.rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=rf"{encoder.name} is missing: .* copied with it"):
        open_run(run)
    for stage in ("decoder", "vadapter", "perceiver"):
        shutil.rmtree(run / stage / "checkpoints")
    with pytest.raises(CheckpointError, match=r"no checkpoint yet .*decoder, vadapter, perceiver"):
        open_run(run)


def test_a_tokenizer_of_another_run_is_refused(run):
    tokenizer = json.loads((run / "tokenizer.json").read_text())
    (run / "tokenizer.json").write_text(json.dumps({**tokenizer, "lowercase": False}))
    with pytest.raises(CheckpointError, match="another tokenizer"):
        open_run(run)


def test_overrides_reach_the_data_but_not_what_was_trained(run):
    assert read_run(run, ["data.held.source.split=train"]).data["held"].source["split"] == "train"
    with pytest.raises(ConfigError, match=r"cannot be .*components\.NAME\.weights can$"):
        read_run(run, ["components.llm.width=8"])
    with pytest.raises(ConfigError, match=r"components\.llm has no public weights in this run"):
        read_run(run, ["components.llm.weights=/x"])
    with pytest.raises(ConfigError, match=r"data\.held\.taks: unknown key; did you mean 'task'"):
        read_run(run, ["data.held.taks=caption"])


def test_a_run_keeps_the_frozen_components_that_it_took_from_another(chain, tmp_path):
    other, own = tmp_path / "other", tmp_path / "own"
    for part in ("vision", "tlm", "components"):
        shutil.copytree(chain / "run" / part, other / part)
    config = tiny_recipe(chain / "shapes")
    config.stages.decoder.start = {"tlm": f"{other}/tlm", "encoder": f"{other}/vision"}
    recipe = read(config)
    vocab = json.loads((chain / "run" / "tokenizer.json").read_text())
    size = len(vocab["bpe"]["model"]["vocab"]) + 3
    mesh = make_mesh(MeshConfig())
    stage = Stage(recipe, "decoder", mesh, workdir=own, vocab_size=size)
    abstract, starts = stage.abstract, stage.starts
    assert [path.name.split("-")[0] for path in (own / "components").iterdir()] == ["encoder"]

    tlm = digest(initialization.load(starts["tlm"], abstract["tlm"], None))
    assert tlm == starts["tlm"].digest  # a trained component is not copied
    shutil.rmtree(other)
    encoder = initialization.load(starts["encoder"], abstract["encoder"], None)
    assert digest(encoder) == starts["encoder"].digest
