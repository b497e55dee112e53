"""The table of connectors in the package has every kind, and the numbers that are computed."""

import functools
import math
import runpy

import jax
import jax.numpy as jnp
import pytest
from support.paths import ROOT

from vadapter import config
from vadapter.distributed.mesh import MeshConfig, make_mesh
from vadapter.models.registry import KINDS
from vadapter.recipe.schema import read
from vadapter.stages.stage import Stage

README = ROOT / "vadapter" / "models" / "adapters" / "README.md"
NOT_CONNECTORS = {"vit", "video_vit", "mobilenet", "fusion"}  # a tiny LM is part of one


def table():
    """Name of the row -> its cells by name of the column."""
    lines = [line for line in README.read_text().splitlines() if line.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    cells = [dict(zip(head, row, strict=True)) for row in rows]
    return {row["row"].strip("`"): row for row in cells}


TABLE = table()
ROWS = runpy.run_path(str(ROOT / "configs" / "ablations.py"))["CONNECTORS"]


@functools.cache
def stage(row):
    """The stage of a row of configs/ablations.py, or of a named size in place of its `mlp`."""
    arm = row if row in ROWS else "mlp"
    values = config.load(f"{ROOT}/configs/ablations.py:base=paper,encoder=l,llm=1b,row={arm}")
    if row not in ROWS:
        values.components.mlp = {"size": row}
    recipe = read(values)
    return Stage(recipe, recipe.chain[-1], make_mesh(MeshConfig(), jax.devices()[:1]))


def tokens(stage, frames):
    """The number of tokens in front of the text."""
    model = stage.adapter_model
    encoder = model.modules[model.encoder]
    visual = jax.ShapeDtypeStruct(
        (1, frames, encoder.tokens_per_frame(), encoder.width), jnp.float32
    )
    prefix = jax.eval_shape(model.prefix, stage.abstract, visual)
    return 0 if model.cross else prefix.shape[1]


def test_every_kind_of_connector_and_every_connector_of_the_ablations_is_in_the_table():
    listed = {kind.strip() for row in TABLE.values() for kind in row["kinds"].split(",")}
    assert listed == set(KINDS) - NOT_CONNECTORS
    assert set(ROWS) <= set(TABLE)


@pytest.mark.parametrize("row", TABLE)
def test_the_numbers_of_a_row_are_those_of_its_model(row):
    one, cells = stage(row), TABLE[row]
    leaves = [leaf for name in one.trained for leaf in jax.tree.leaves(one.abstract[name])]
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    assert f"{count / 1e6:.1f}M" == cells["trained"]
    assert f"{tokens(one, 1):,}" == cells["image"]
    assert f"{tokens(one, 8):,}" == cells["clip"]


@pytest.mark.parametrize("row", TABLE)
def test_the_kinds_of_a_row_and_its_need_of_a_grid_are_those_of_its_model(row):
    modules = [stage(row).adapter_model.modules[name] for name in stage(row).config.chain]
    names = {path.rpartition(":")[2]: kind for kind, path in KINDS.items()}
    assert list(dict.fromkeys(names[type(m).__name__] for m in modules)) == [
        kind.strip() for kind in TABLE[row]["kinds"].split(",")
    ]
    needs = any(getattr(module.config, "needs_grid", False) for module in modules)
    assert TABLE[row]["grid"] == ("needed" if needs else "")
