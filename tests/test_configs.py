"""The packaged recipes: each reads, fits together and means what the paper says."""

import itertools
import re

import jax
import numpy as np
import pytest
from support.paths import ROOT

from vadapter import config
from vadapter.distributed.mesh import MeshConfig, make_mesh
from vadapter.errors import ConfigError
from vadapter.models.registry import expand
from vadapter.recipe.schema import components, read, trained
from vadapter.stages.stage import Stage

CONFIGS = sorted((ROOT / "configs").glob("*.py"))
PAPER = [f"stage=1,front={front}" for front in ("resampler", "pooler", "perceiver")]
PAPER += [f"front={f},init={i}" for f in ("resampler", "pooler") for i in ("text", "random")]
PAPER += ["front=perceiver", "adapter=resampler", "adapter=mlp", "encoder=b,llm=8b", "encoder=g"]


def paper(arg=""):
    return read(config.load(f"configs/paper.py:{arg}"))


def counts(recipe, name):
    """Parameters of each component of a stage, by shape alone."""
    stage = recipe.stages[name]
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    abstract = Stage(recipe, name, mesh, vocab_size=256_000).abstract
    size = lambda tree: sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))  # noqa: E731
    return {component: size(abstract[component]) for component in components(stage)}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_reads_and_says_how_it_is_run(path):
    values = config.load(str(path))
    for name, spec in values.get("components", {}).items():  # as if the hub had been asked
        if "weights" in spec and "kind" not in spec:
            spec.size = {"encoder": "coca_b", "tlm": "tlm_108m", "llm": "llm_1b"}[name]
    for recipe in values.get("arms", {"": values}).values():
        assert read(recipe).name in (path.stem, f"scenes-{read(recipe).chain[-1]}")
    head = path.read_text().split('"""')[1]
    assert "vadapter " in head
    assert re.search(r"\b(Run 20\d\d-\d\d-\d\d: .*(minutes|hours)|[Nn]ot run\b)", head)


def test_the_rungs_of_the_ladder_share_one_recipe():
    def rung(name, **arg):
        text = ",".join(f"{key}={value}" for key, value in arg.items())
        return config.load(f"configs/public.py:rung={name},{text}").to_dict()

    same = {"encoder": "e", "llm": "l", "batch": 64, "samples": 640_000}
    first, *others = [
        rung(name, **same) for name in ("laptop", "gpu", "v5e-8", "v5e-64", "v5p-128")
    ]
    for other in others:
        assert other | {"workers": 0} == first | {"workers": 0}

    def schedule(**arg):
        """What of a stage counts steps, in samples."""
        stage = rung("gpu", **arg)["stages"]["vadapter"]
        steps = stage["steps"], stage["optim"]["warmup"], stage["eval_every"]
        return [count * stage["batch"] for count in steps]

    assert schedule(batch=64, samples=6_400_000) == schedule(batch=256, samples=6_400_000)


@pytest.mark.parametrize("arg", PAPER)
def test_every_row_of_the_papers_tables_fits_together(arg):
    recipe = paper(arg)
    (name,) = recipe.chain
    assert set(counts(recipe, name)) == set(components(recipe.stages[name]))


# Billions in all, millions trained (paper, Table 2 and section 4.2).
SCALES = {
    "encoder=b": (1.8, 120),
    "encoder=l": (2.0, 120),
    "encoder=g": (2.8, 130),
    "encoder=g,llm=8b": (10.8, 130),
}


@pytest.mark.parametrize("arg", SCALES)
def test_stage_2_is_as_large_as_the_papers(arg):
    recipe, (billions, millions) = paper(arg), SCALES[arg]
    sizes = counts(recipe, "vadapter")
    trainable = trained(recipe.stages["vadapter"])
    assert sum(sizes.values()) / 1e9 == pytest.approx(billions, rel=0.03)
    assert sum(sizes[name] for name in trainable) / 1e6 == pytest.approx(millions, rel=0.1)


def test_the_papers_table_3_differs_in_where_the_tiny_lm_starts():
    starts = {i: paper(f"init={i}").stages["vadapter"].start for i in ("random", "text", "stage1")}
    frozen = {"encoder": "pretrained/encoder", "llm": "pretrained/llm"}
    assert starts["random"] == frozen
    assert starts["text"] == frozen | {"tlm": "pretrained/tlm"}
    inner = dict.fromkeys(("resampler", "fc_in", "tlm"), "stage1/decoder")
    assert starts["stage1"] == frozen | inner


def test_the_papers_recipe_is_that_of_table_10():
    stage = paper().stages["vadapter"]
    assert (stage.batch, stage.steps) == (2048, 250_000)
    optim = stage.optim
    assert (optim.lr, optim.warmup, optim.schedule) == (5e-4, 1000, "linear")
    assert (optim.b1, optim.b2, optim.weight_decay) == (0.9, 0.999, 1e-4)
    recipe = paper()
    perceiver = expand("perceiver", recipe.components["perceiver"])
    assert perceiver["layers"] == 6
    assert recipe.data["clips"].frames == 8


def test_an_argument_that_the_paper_does_not_have_is_an_error():
    known = itertools.product(("stage", "adapter", "front", "init"), ("3",))
    for key, value in known:
        with pytest.raises(ConfigError, match=f"config argument {key}='?3'?: unknown; known: "):
            paper(f"{key}={value}")
