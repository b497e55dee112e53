"""The packaged components: small, intact, and what the recipe beside them makes."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from vadapter import config
from vadapter.cli.train import QUICKSTART
from vadapter.data.tokenizers.pretrained import load_tokenizer
from vadapter.distributed.mesh import MeshConfig, make_mesh
from vadapter.models.registry import expand
from vadapter.recipe.schema import read, trained
from vadapter.stages import initialization
from vadapter.stages.restore import stored_recipe
from vadapter.stages.stage import Stage
from vadapter.weights import hub
from vadapter.weights.hf_checkpoint import Checkpoint, complete

MOST = 8 * 10**6  # bytes of all files together
SETS = sorted(path.parent for path in hub.PACKAGE.glob("*/recipe.json"))
COMPONENTS = sorted(path.parent for path in hub.PACKAGE.glob("*/*/config.json"))


def name_of(folder: Path) -> str:
    return folder.relative_to(hub.PACKAGE).as_posix()


def test_all_of_them_are_small():
    files = [path for path in hub.PACKAGE.rglob("*") if path.is_file()]
    assert 10**6 < sum(path.stat().st_size for path in files) <= MOST


@pytest.mark.parametrize("folder", COMPONENTS, ids=name_of)
def test_a_component_is_bfloat16_and_has_the_digest_of_its_record(folder):
    checkpoint = Checkpoint.open(hub.resolve(f"packaged:{name_of(folder)}").path)
    record = json.loads((folder / "config.json").read_text())
    assert checkpoint.files.expected == record["sha256"] == checkpoint.digest()
    assert {str(info.dtype) for info in checkpoint.files.tensors.values()} == {"bfloat16"}
    for path, info in checkpoint.files.tensors.items():
        values = checkpoint.files.read(path).astype(np.float32)
        assert np.isfinite(values).all(), path
        assert info.shape == values.shape
    if record["tokenizer"]:
        assert load_tokenizer(folder).vocab_size == checkpoint.spec["vocab_size"]


@pytest.mark.parametrize("folder", SETS, ids=name_of)
def test_the_recipe_trains_every_component_as_its_record_says(folder):
    recipe = read(stored_recipe(folder / "recipe.json"))
    stages = set()
    for path in folder.glob("*/config.json"):
        record, name = json.loads(path.read_text()), path.parent.name
        stage = recipe.stages[record["stage"]]
        assert name in trained(stage)
        assert (record["steps"], record["dtype"]) == (stage.steps, "bfloat16")
        spec = complete({"weights": f"packaged:{name_of(path.parent)}"}, name)
        del spec["weights"]
        own = expand(name, recipe.components[name])
        assert spec == own | {k: spec[k] for k in ("vocab_size",) if k in own}
        stages.add(record["stage"])
    assert stages == set(recipe.chain)


def test_the_components_start_the_quickstart(tmp_path):
    recipe = read(config.load(QUICKSTART))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    first = recipe.chain[0]
    tokenizer = load_tokenizer(hub.resolve(recipe.components["tlm"]["weights"]).path)
    stage = Stage(recipe, first, mesh, workdir=tmp_path, tokenizer=tokenizer)
    for name in ("encoder", "tlm"):
        start = initialization.find(recipe, stage.config, tmp_path, name, stage.abstract[name])
        assert start.source == f"weights packaged:scenes/{name}"
        assert start.dropped == start.fresh == ()
