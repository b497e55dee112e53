"""A run whose frozen encoder is a public checkpoint: a folder with config.json and safetensors."""

import json
import shutil

import flax.linen as nn
import jax
import numpy as np
import pytest
import runs

from vadapter.errors import CheckpointError
from vadapter.models.variants import make_module
from vadapter.parallel.mesh import make_mesh
from vadapter.train import loop, run
from vadapter.train.loop import train
from vadapter.train.recipe import read
from vadapter.train.restore import open_run
from vadapter.weights.families.vision import FAMILIES
from vadapter.weights.public import Checkpoint

KEYS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "image_size": 32,
        "num_attention_heads": 2, "patch_size": 8}  # fmt: skip
MEAN = [0.1, 0.2, 0.3]


def write(folder):
    """A small random CLIP as the hub has them: two towers in one file, nested keys."""
    from safetensors.numpy import save_file

    family = FAMILIES["clip_vision_model"]
    module = make_module("encoder", family.spec(KEYS))
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1, 32, 32, 3)))
    rng, tensors = np.random.default_rng(0), {"logit_scale": np.zeros((), np.float32)}
    for path, leaf in jax.tree_util.tree_flatten_with_path(nn.unbox(shapes)["params"])[0]:
        source = family.tables[0].source("/".join(k.key for k in path), leaf.shape)
        for name in source.names:
            draw = rng.standard_normal(source.expected) * 0.2
            tensors[f"vision_model.{name}"] = draw.astype(np.float32)
    tensors["text_model.embeddings.token_embedding.weight"] = np.zeros((7, 16), np.float32)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "clip", "vision_config": KEYS, "text_config": {"hidden_size": 16}}
    (folder / "config.json").write_text(json.dumps(config))
    pixels = {"image_processor_type": "CLIPImageProcessor", "size": 32, "crop_size": 32,
              "resample": 3, "image_mean": MEAN, "image_std": [0.5, 0.5, 0.5]}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with runs.cached_programs():
        folder = runs.prepare(tmp_path_factory.mktemp("public"))
        write(folder / "clip")
        yield folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(loop, "make_train_step", runs.fake_step)
    monkeypatch.setattr(run, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))


def recipe(world, **encoder):
    config = runs.blind(world)
    with config.unlocked():
        config.components.encoder = {"weights": str(world / "clip"), **encoder}
        config.stages.decoder.start = {}
    return config


def test_sizes_follow_from_the_checkpoint_and_keys_of_the_recipe_override_them(world):
    spec = read(recipe(world, tap="penultimate")).components["encoder"]
    assert (spec["kind"], spec["width"], spec["depth"], spec["patch"]) == ("vit", 16, 2, 8)
    assert (spec["mlp"], spec["pre_norm"]) == ("quick_gelu", True)
    assert spec["mean"] == tuple(MEAN)
    assert spec["tap"] == "penultimate"


def test_a_run_trains_on_it_and_is_restored_without_it(world, tmp_path, capsys):
    copy = shutil.copytree(world, tmp_path / "copy")
    train(read(recipe(copy)), tmp_path / "run")
    told = capsys.readouterr().out
    assert "clip: 37 tensors, " in told
    assert "left out: logit_scale, text_model.embeddings" in told
    checkpoint = Checkpoint.open(copy / "clip")
    shutil.rmtree(copy)
    loaded = open_run(tmp_path / "run")
    assert loaded.recipe.components["encoder"]["mlp"] == "quick_gelu"
    kernel = np.asarray(loaded.params["encoder"]["stack"]["blocks"]["mlp"]["up"]["kernel"])
    again = Checkpoint.open(write(tmp_path / "again"))
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    np.testing.assert_array_equal(kernel[1], again.files.read(name).T)
    assert checkpoint.spec["width"] == 16


def test_a_folder_that_is_not_there_or_not_a_model_is_named_by_its_key(world, tmp_path):
    for folder, message in (
        (tmp_path / "nowhere", r"components\.encoder\.weights: There is no folder"),
        (tmp_path, r"components\.encoder\.weights: No weights file 'config\.json'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read(recipe(world, weights=str(folder)))
