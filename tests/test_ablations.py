"""The connectors and the rows of the paper's tables, over every base, and comparisons of them."""

import re
import runpy
from collections import Counter

import jax
import numpy as np
import pytest
from support.cases import some_slow
from support.paths import ROOT

from vadapter import config
from vadapter.compare.plan import read_plan
from vadapter.config import differences, digest, plain
from vadapter.data.open import make_source
from vadapter.data.scenes.world import split_of
from vadapter.distributed.mesh import MeshConfig, make_mesh
from vadapter.errors import ConfigError
from vadapter.models.registry import expand, load_kind
from vadapter.recipe.schema import components, read
from vadapter.stages.stage import Stage

ABLATIONS = runpy.run_path(str(ROOT / "configs" / "ablations.py"))
ROWS, BASES = tuple(ABLATIONS["ROWS"]), tuple(ABLATIONS["BASES"])
VARIANTS = tuple(ABLATIONS["VARIANTS"])
PUBLISHED_ROWS = tuple(row for row in ROWS if row not in VARIANTS)
SMALL = ("scenes", "flickr8k")
OTHER_ENCODER = ("table12_resampler", "table12_vadapter")
# Rows of each table of the paper.
TABLES = {
    "1a": 4, "1b": 3, "1c": 3, "1d": 3, "1e": 3, "2": 2, "3": 3, "4": 3, "9": 4, "12": 2, "13": 3,
}  # fmt: skip
PACKAGED = "packaged:"
VOCABULARY = {"scenes": 512, "flickr8k": 4096, "paper": 256_000, "public": 256_000}


def as_if_downloaded(values):
    """Give components with public weights the sizes that a hub would say."""
    for name, spec in values.components.items():
        if "kind" not in spec and not spec.get("weights", PACKAGED).startswith(PACKAGED):
            spec.size = {"encoder": "coca_b", "tlm": "tlm_108m", "llm": "llm_1b"}[name]
    return values


def load(base, row, *args):
    return as_if_downloaded(
        config.load(f"configs/ablations.py:{','.join((*args, f'base={base},row={row}'))}")
    )


_COUNTED = {}


def parameters(base, row):
    """Trained parameters of each component of the row's last stage, by shape alone."""
    recipe = read(load(base, row))
    stage = recipe.stages[recipe.chain[-1]]
    specs = [recipe.components[name] for name in components(stage)]
    key = digest([base, specs, stage.chain, stage.exit_layer])  # some rows are in several tables
    if key not in _COUNTED:
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        made = Stage(recipe, recipe.chain[-1], mesh, vocab_size=VOCABULARY[base])
        sizes = {n: sum(x.size for x in jax.tree.leaves(made.abstract[n])) for n in made.trained}
        assert set(made.abstract) == set(components(stage))
        _COUNTED[key] = sizes
    return _COUNTED[key]


def expressible(base, rows=ROWS):
    return [row for row in rows if base in ("paper", "public") or row not in OTHER_ENCODER]


# -- rows ------------------------------------------------------------------------------------------


# Most variants differ in numbers alone: over one base in the fast tests.
BUILT = some_slow(
    [(base, rows) for rows in ("published", "variants") for base in BASES],
    fast=[*((base, "published") for base in BASES), ("scenes", "variants")],
)


@pytest.mark.parametrize(("base", "rows"), BUILT)
def test_the_model_of_every_row_can_be_built_over_every_base(base, rows):
    for row in expressible(base, PUBLISHED_ROWS if rows == "published" else VARIANTS):
        assert sum(parameters(base, row).values()) > 0, row


def test_every_row_of_the_papers_tables_is_there_once():
    found = Counter(match[1] for row in ROWS if (match := re.match(r"table(\d+[a-e]?)_", row)))
    assert found == TABLES


@pytest.mark.parametrize("base", ["paper", "public"])
@pytest.mark.parametrize("table", TABLES)
def test_rows_of_one_table_differ_in_what_is_trained(base, table):
    def said(row):
        recipe = load(base, row)
        last = recipe.stages[recipe.chain[-1]].to_dict()
        return digest(plain([recipe.components.to_dict(), last]))

    names = [row for row in ROWS if row.startswith(f"table{table}_")]
    assert len({said(row) for row in names}) == len(names)


@pytest.mark.parametrize("base", BASES)
def test_a_recipe_has_the_stages_and_components_that_its_row_needs_alone(base):
    for row in expressible(base):
        recipe = read(load(base, row))
        assert set(recipe.stages) == set(recipe.chain)
        assert recipe.chain[-1] == row
        stages = recipe.stages.values()
        assert set(recipe.components) == {name for stage in stages for name in components(stage)}
        starts = {source for stage in stages for source in stage.start.values()}
        assert starts & set(recipe.stages) == set(recipe.chain[:-1])


def test_the_sizes_of_table_1_at_the_papers_base_are_the_papers():
    def perceiver(row):
        spec = dict(read(load("paper", row)).components["perceiver"])
        kind = load_kind("resampler")[0]
        spec.pop("size")
        return config.build(kind, {"layers": 6, **spec})

    rows = [f"table1{part}_{size}" for part in "cd" for size in ("half", "same", "double")]
    sizes = [(p.query_dim, p.hidden_dim, p.layers) for p in map(perceiver, rows)]
    assert sizes == [
        (384, 768, 6), (768, 768, 6), (1536, 768, 6), (768, 384, 6), (768, 768, 6), (768, 1536, 6),
    ]  # fmt: skip
    assert [perceiver(f"table1e_{n}").layers for n in (1, 3, 6)] == [1, 3, 6]
    norms = [perceiver(row) for row in ROWS if row.startswith("table1a")]
    assert [(p.norm, p.final_norm) for p in norms] == [
        ("none", True), ("shared", False), ("separate", False), ("separate", True),
    ]  # fmt: skip
    inner = [perceiver(row) for row in ROWS if row.startswith("table1b")]
    assert [(p.ffn, p.time_embed) for p in inner] == [(False, True), (True, False), (True, True)]


def test_rows_that_the_paper_calls_the_same_are_the_same():
    def model(row):
        recipe = read(load("paper", row))
        stage = recipe.stages[row]
        return plain([recipe.components, stage.chain, stage.start, stage.optim])

    for rows in (
        ("vadapter", "table2_vadapter", "table3_stage1", "table4_resampler_1", "table9_none",
         "table13_vadapter"),
        ("perceiver", "table2_resampler", "table13_resampler", "table1e_6", "table1c_same",
         "table1d_same", "table1b_both", "table1a_separate_final"),
        ("mlp", "table13_mlp"),
    ):  # fmt: skip
        first, *others = (built(model(row)) for row in rows)
        for row, other in zip(rows[1:], others, strict=True):
            assert other == first, row


def built(model):
    """The components with all fields, whatever of them a row says."""
    specs, *rest = model
    out = {}
    for name, spec in specs.items():
        spec = expand(name, spec)
        out[name] = config.build(load_kind(spec.pop("kind"))[0], spec)
    return out, *rest


# Millions, and a tolerance: of stage 2 (paper, section 4.2); of Honeybee's C-Abstractor between
# widths 1024 and 2048; of BLIP-2's Q-Former, which has a projection behind it here.
PUBLISHED = {
    ("vadapter", "encoder=b"): (120, 0.1),
    ("vadapter", "encoder=l"): (120, 0.1),
    ("vadapter", "encoder=g"): (130, 0.1),
    ("c_abstractor", "encoder=l"): (22.4, 0.01),
    ("qformer", "encoder=b"): (99.3 + 1.57, 0.001),
    ("qformer", "encoder=l"): (101.6 + 1.57, 0.001),
    ("qformer", "encoder=g"): (105.2 + 1.57, 0.001),
}


@pytest.mark.parametrize(("row", "encoder"), PUBLISHED)
def test_at_the_papers_base_as_many_parameters_are_trained_as_published(row, encoder):
    recipe = read(load("paper", row, encoder))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    made = Stage(recipe, row, mesh, vocab_size=256_000)
    count = sum(
        int(np.prod(x.shape)) for n in made.trained for x in jax.tree.leaves(made.abstract[n])
    )
    millions, tolerance = PUBLISHED[row, encoder]
    assert count / 1e6 == pytest.approx(millions, rel=tolerance)


@pytest.mark.parametrize("base", SMALL)
def test_over_a_small_base_connectors_are_about_as_large_as_the_perceiver(base):
    wanted = sum(parameters(base, "perceiver").values())
    rows = {"mlp", "shuffle", "pool", "qformer", "c_abstractor", "cross_attention"}
    for row in rows & set(expressible(base)):
        assert sum(parameters(base, row).values()) == pytest.approx(wanted, rel=0.15), row


def test_the_table_of_rows_states_how_many_parameters_each_trains():
    text = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| `(\w+)` \|.*?\| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", text, re.MULTILINE)
    stated = {row: counts for row, *counts in lines if row in ROWS}
    assert list(stated) == list(PUBLISHED_ROWS)
    for row, counts in stated.items():
        found = [
            f"{sum(parameters(base, row).values()) / 1e6:.3g}M" if row in expressible(base) else "–"
            for base in ("scenes", "flickr8k", "paper")
        ]
        assert counts == found, row


def test_every_variant_is_explained_and_differs_from_the_method_and_its_baseline():
    text = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    usual = load("scenes", "perceiver").components.perceiver.queries
    known = {digest(said("scenes", row)): row for row in ("vadapter", "perceiver")}
    for row in VARIANTS:
        assert f"`{row}`" in text
        same = row.endswith(f"queries_{usual}")
        assert (digest(said("scenes", row)) in known) == same, row
        known[digest(said("scenes", row))] = row
    assert len(known) == len(VARIANTS)  # and the two, without the two of the usual queries


def said(base, row):
    """What the stages of a row that see images are."""
    recipe = load(base, row).to_dict()
    stages = [s for s in recipe["stages"].values() if s["kind"] in ("decoder", "adapter")]
    return plain([recipe["components"], stages])


@pytest.mark.parametrize("base", [base for base in BASES if base != "public"])
def test_the_equal_perceiver_is_about_as_large_as_resampler_and_tiny_lm(base):
    wanted = sum(parameters(base, "vadapter").values())
    assert sum(parameters(base, "equal").values()) == pytest.approx(wanted, rel=0.1)


def test_the_length_of_stage_1_is_a_factor_on_its_steps_and_warm_up():
    plain, argument, row, both = (
        load("paper", *case).stages.decoder
        for case in (
            ("vadapter",), ("vadapter", "stage1=2"), ("stage1_double",),
            ("stage1_quarter", "stage1=2"),
        )
    )  # fmt: skip
    for stage, factor in ((argument, 2), (row, 2), (both, 0.5)):
        assert (stage.steps, stage.optim.warmup) == (
            plain.steps * factor, plain.optim.warmup * factor
        )  # fmt: skip
    assert load("paper", "vadapter", "stage1=2").stages.vadapter.steps == plain.steps


@pytest.mark.parametrize("base", BASES)
def test_shorter_rows_have_fewer_steps_of_the_last_stage_alone(base):
    for row in ("vadapter", "perceiver", "mlp"):
        plain = load(base, row).stages.to_dict()
        for word, factor in (("quarter", 0.25), ("half", 0.5)):
            found = load(base, f"{row}_{word}").stages.to_dict()
            short, long = found.pop(f"{row}_{word}"), plain[row]
            assert short["steps"] == round(long["steps"] * factor)
            assert short["optim"]["warmup"] == round(long["optim"]["warmup"] * factor)
            assert found == {name: stage for name, stage in plain.items() if name != row}


def test_arguments_of_the_base_pass_through():
    recipe = load("scenes", "perceiver", "scale=0.5", "queries=16")
    assert recipe.stages.perceiver.steps == 150
    assert recipe.components.perceiver.queries == 16
    assert load("scenes", "c_abstractor", "queries=10").components.c_abstractor.queries == 9
    assert load("paper", "perceiver", "encoder=b").components.encoder.size == "coca_b"


def test_decayed_temperatures_end_at_the_lowest_one():
    for scale in (1, 0.5):
        recipe = load("scenes", "words", f"scale={scale}")
        words, steps = recipe.components.words, recipe.stages.words.steps
        end = words.temperature * np.exp(-words.decay * steps)
        assert end == pytest.approx(words.min_temperature)


def test_table_12_has_the_encoder_of_its_argument_with_its_own_weights():
    for base in ("paper", "public"):
        recipe = config.load(
            f"configs/ablations.py:base={base},row=table12_vadapter,clip=some/clip"
        )
        assert recipe.components.encoder.to_dict() == {"weights": "some/clip"}
        assert all("encoder" not in stage.get("start", {}) for stage in recipe.stages.values())


# -- blind controls --------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("row", ["vadapter", "mlp"])
def test_a_blind_control_differs_in_blank_images_alone(base, row):
    seen, unseen = (read(load(base, name)) for name in (row, f"{row}.blind"))
    rows = differences(plain(seen), plain(unseen))
    changed = {path.split(".")[1] for path, *_ in rows if path != "name"}
    assert {path for path, *_ in rows} == {"name", *(f"data.{n}.blank" for n in changed)}
    stages = [s for s in unseen.stages.values() if s.kind in ("decoder", "adapter")]
    assert changed == {
        *(n for s in stages for n in (*s.data, *s.loss)), *(e.data for e in unseen.evals.values())
    }  # fmt: skip


# -- the scenes ------------------------------------------------------------------------------------


def test_training_validation_and_test_scenes_have_nothing_in_common():
    recipe = read(config.load("configs/scenes.py"))
    splits = {name: data.source["split"] for name, data in recipe.data.items()}
    assert {n for n, split in splits.items() if split == "test"} == {
        recipe.evals[n].data for n in ("test_captions", "test_clips", "test_answers")
    }
    stages = [recipe.stages[name] for name in ("decoder", "vadapter", "perceiver")]
    for stage in stages:
        assert {splits[n] for n in stage.data} == {"train"}
        assert {splits[n] for n in stage.loss} == {"val"}
        assert {splits[recipe.evals[n].data] for n in stage.evals} == {"val"}
    for name in ("images", "held_images", "test_images"):
        source = make_source(name, recipe.data[name])
        assert {split_of(source.scene(i).things) for i in range(50)} == {splits[name]}


@pytest.mark.parametrize("weights", ["packaged:scenes", ""])
def test_the_scenes_are_the_quickstart_with_longer_pretraining(weights):
    quick, scenes = (
        config.load(f"configs/{name}.py:scale=0.5,steps=300,weights={weights}").to_dict()
        for name in ("quickstart", "scenes")
    )
    assert scenes["components"] == quick["components"]
    assert scenes["chain"] == quick["chain"]
    for name, stage in quick["stages"].items():
        if stage["kind"] in ("lm", "vision"):
            assert scenes["stages"][name]["steps"] > 5 * stage["steps"]
        else:
            assert scenes["stages"][name] == stage


# -- comparisons -----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_arms_of_every_base_can_be_compared(base, tmp_path):
    values = config.load(f"configs/compare.py:base={base},arms=vadapter,mlp.blind,perceiver,mlp")
    assert values.order == ("vadapter", "mlp_blind", "perceiver", "mlp")
    for recipe in values.arms.values():
        as_if_downloaded(recipe)
        last = recipe.stages[recipe.chain[-1]]
        assert not set(values.test) & set(last.evals)
        assert last.eval_limit == 0  # every score on all items, as that of the last step is
        assert last.steps / 60 <= last.eval_every <= last.steps / 6
    plan = read_plan(values, tmp_path, seeds=2)
    assert tuple(plan.arms) == values.order
    assert plan.settings.baseline == "perceiver"
    rate = values.arms.vadapter.stages.vadapter.optim.lr
    assert plan.settings.lr == pytest.approx((rate / 2, rate, 2 * rate))


def test_a_comparison_takes_rates_a_baseline_and_arguments_of_the_base():
    values = config.load(
        "configs/compare.py:arms=linear,mlp.blind,lr=1,3,scale=0.5,baseline=mlp.blind"
    )
    assert (values.baseline, values.lr) == ("mlp_blind", (0.002, 0.006))
    assert values.arms.linear.stages.linear.steps == 150
    assert config.load("configs/compare.py:arms=linear,mlp").baseline == "linear"


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("ablations.py:row=percever", "row='percever': unknown; did you mean 'perceiver'"),
        ("ablations.py:row=mlp.blnd", "row='mlp.blnd': unknown; did you mean 'mlp.blind'"),
        ("ablations.py:base=scnes", "base='scnes': unknown; did you mean 'scenes'"),
        ("ablations.py:scal=2", "'scal': unknown; did you mean 'scale'"),
        ("ablations.py:base=paper,front=pooler", "'front': at base=paper, the row says it"),
        ("ablations.py:row=table12_vadapter", "base=scenes does not take; use base=paper or"),
        ("compare.py:arms=mlp,percever", "arms='percever': unknown; did you mean 'perceiver'"),
        ("compare.py:arms=mlp,mlp.blnd", "arms='mlp.blnd': unknown; did you mean 'mlp.blind'"),
        ("compare.py:arms=mlp,mlp", "arms: mlp twice"),
        ("compare.py:arms=", "arms and lr: at least one value each"),
        ("compare.py:arms=mlp,linear,baseline=pool", "baseline='pool': unknown; known: linear"),
        ("compare.py:base=scnes", "base='scnes': unknown; did you mean 'scenes'"),
        ("compare.py:row=mlp", "'row': a comparison has several, arms=ROW,ROW"),
        ("compare.py:lr=1,x", "'lr': 'x' is not of type float"),
    ],
)
def test_a_wrong_argument_is_one_clear_line(arg, message):
    with pytest.raises(ConfigError, match=message):
        config.load(f"configs/{arg}")


@pytest.mark.parametrize("key", ["base", "row", "clip", "stage1", "arms", "lr", "baseline"])
def test_no_base_has_an_argument_that_the_recipes_over_it_would_take(key):
    for base in BASES:
        with pytest.raises(ConfigError, match=key):
            config.load(f"configs/{base}.py:{key}=1")
