"""What a comparison trains follows from its configuration, and mistakes in it are explained."""

from pathlib import Path
from typing import Any

import pytest
from support.comparisons import ARMS, RATES, prepared, tiny_comparison

from vadapter.compare.plan import Plan, read_plan
from vadapter.errors import ConfigError, UserError
from vadapter.recipe.schema import read
from vadapter.stages.stage import settings


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return prepared(tmp_path_factory)


@pytest.fixture
def plan(world, tmp_path):
    """Read a plan of the tiny comparison, changed by `change`, with overrides."""

    def make(*overrides: str, change: Any = lambda config: None, **options: Any) -> Plan:
        config = tiny_comparison(world)
        with config.unlocked():
            change(config)
        return read_plan(
            config, tmp_path / "compare", **{"seeds": 2, "overrides": overrides, **options}
        )

    return make


def test_parts_are_trained_once_and_runs_start_from_their_directory(plan, tmp_path):
    made, root = plan(), tmp_path / "compare"
    assert made.parts.chain == ("llm",)
    assert made.parts.seed == 0
    runs = list(made.all())
    assert len({run.workdir for run in runs}) == 3 * len(RATES) * 2
    for run in runs:
        assert run.workdir == root / run.arm / f"lr-{run.lr}-seed-{run.seed}"
        last = run.recipe.stages[run.recipe.chain[-1]]
        assert last.start["llm"] == str(root / "parts" / "llm")
        assert "/outside/vision" in last.start["encoder"]
        assert (last.optim.lr, run.recipe.seed) == (run.lr, run.seed)
        assert {data.cache_dir for data in run.recipe.data.values() if data.cache} == {
            str(root / "features")
        }


def test_what_is_before_the_last_stage_belongs_to_the_arm(plan):
    chains = {run.arm: run.recipe.chain for run in plan().grid()}
    assert chains == {
        "mlp": ("mlp",), "perceiver": ("perceiver",), "vadapter": ("decoder", "vadapter"),
    }  # fmt: skip
    trained = plan().run("vadapter", 1e-3, 1).trained
    assert (trained.stage, trained.prior) == ("vadapter", ("decoder",))
    recipes = [plan().run("vadapter", lr, 0).recipe for lr in RATES]
    one, other = (settings(recipe, "decoder") for recipe in recipes)
    assert one == other  # the learning rates are of the last stage


def test_recipes_of_runs_are_complete_recipes(plan):
    from vadapter.config import plain

    for run in plan().grid():
        assert read(plain(run.recipe)) == run.recipe


def remove(group: Any, *names: str) -> None:
    for name in names:
        del group[name]


MISTAKES = {
    "no seed": ({"seeds": 0}, "--seeds=0: at least 1"),
    "one arm": ({"change": lambda c: remove(c.arms, "mlp", "vadapter")},
                "config.arms: perceiver; a comparison needs two arms"),
    "no arm": ({"change": lambda c: remove(c.arms, *ARMS)}, "config.arms: none"),
    "a recipe": ({"change": lambda c: remove(c, "arms")}, "is a recipe, not a comparison"),
    "a baseline that is no arm": ({"baseline": "percever"}, "did you mean 'perceiver'"),
    "a rate of zero": ({"change": lambda c: c.update(lr=(0.0, 1e-3))}, "above 0"),
    "a rate twice": ({"change": lambda c: c.update(lr=(1e-3, 1e-3))}, "each of them once"),
    "no rate": ({"change": lambda c: c.update(lr=())}, "config.lr=[]"),
    "a loss that is not measured": ({"change": lambda c: c.update(validation_loss="hold/loss")},
                                    "did you mean 'held/loss'"),
    "a score that is not measured": ({"change": lambda c: c.update(score="caption/cider")},
                                     "did you mean 'captions'"),
    "a score that there is not": ({"change": lambda c: c.update(score="captions/cidre")},
                                  "did you mean 'captions/cider'"),
    "facts of captions that nothing judges": (
        {"change": lambda c: c.update(score="captions/captions_right")}, "captions/cider"),
    "an unknown test": ({"change": lambda c: c.update(test=("tests",))}, "did you mean 'test'"),
    "the name of a folder": ({"change": lambda c: c.arms.update(parts=c.arms.mlp)},
                             "config.arms.parts: cannot be the name of a folder"),
    "no adapter": ({"change": lambda c: setattr(c.arms.vadapter, "chain", ("llm", "decoder"))},
                   "config.arms.vadapter: its chain must end in a stage of kind adapter"),
    "a wrong recipe": ({"change": lambda c: c.arms.mlp.stages.mlp.update(steps=0)},
                       "arm mlp: config.stages.mlp.steps=0"),
    "an unknown key": ({"change": lambda c: c.update(rate=1.0)}, "config.rate: unknown key"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_a_comparison_is_explained(plan, case):
    options, words = MISTAKES[case]
    with pytest.raises(UserError) as raised:
        plan(**options)
    assert words in str(raised.value)


@pytest.mark.parametrize("metric", ["captions_right", "facts", "facts_color"])
def test_facts_right_may_be_the_score_of_generated_scenes(plan, metric):
    def change(config):
        config.score = f"captions/{metric}"
        for arm in config.arms.values():
            arm.data[arm.evals.captions.data].source = {"kind": "scenes", "split": "val"}

    assert plan(change=change).settings.score == f"captions/{metric}"


# What must be equal in all arms: (where it is in a recipe, key of the difference).
UNEQUAL = {
    "the batch": ("stages.mlp.batch=16", "data.batch"),
    "the data sets": ("stages.mlp.data.questions=1.0", "data.data.questions"),
    "how images are decoded": ("data.images.decode=fast", "data.sets.images.decode"),
    "how evaluated images are decoded": ("data.held.decode=fast", "protocol.sets.held.decode"),
    "how data is read": ("data.images.flip=False", "data.sets.images.flip"),
    "where data is": ("data.images.source.split=val", "data.sets.images.source.split"),
    "the evaluation": ("evals.captions.max_new=5", "protocol.evals.captions.max_new"),
    "the evaluated data": ("data.held.text_len=38", "protocol.sets.held.text_len"),
    "the batches of a loss": ("stages.mlp.loss_batches=2", "protocol.loss_batches"),
    "the dtype": ("dtype=bfloat16", "frozen.dtype"),
    "the tokenizer": ("tokenizer.vocab_size=300", "frozen.tokenizer.vocab_size"),
    "the LLM": ("components.llm.depth=2", "frozen.llm.component.depth"),
    "the encoder": ("stages.mlp.start.encoder=elsewhere/vision", "frozen.encoder.start"),
}


@pytest.mark.parametrize("case", UNEQUAL)
def test_arms_that_differ_in_more_than_the_connector_are_refused(plan, case):
    item, key = UNEQUAL[case]
    with pytest.raises(ConfigError, match="mlp and perceiver cannot be compared") as raised:
        plan(f"arms.mlp.{item}")
    keys = [line.split("|")[0].strip() for line in str(raised.value).splitlines()[2:]]
    assert key in keys, raised.value


@pytest.mark.parametrize(
    "item",
    ["stages.mlp.optim.warmup=2", "stages.mlp.steps=7", "components.mlp.hidden_dim=32",
     "stages.mlp.log_every=3", "data.images.blank=True"],
)  # fmt: skip
def test_connector_optimizer_steps_and_blank_images_may_differ(plan, item):
    assert "mlp" in plan(f"arms.mlp.{item}").arms


def test_parts_that_two_arms_train_differently_are_refused(plan):
    with pytest.raises(ConfigError, match="their frozen parts differ") as raised:
        plan("arms.mlp.stages.llm.steps=3")
    assert "stages.llm.steps" in str(raised.value)


def test_overrides_are_of_the_comparison_of_an_arm_or_of_every_recipe_that_has_the_key(plan):
    made = plan(
        "lr=0.5", "baseline=mlp", "test=", "workers=2", "stages.vadapter.steps=9",
        "arms.mlp.stages.mlp.log_every=5", "stages.llm.steps=3",
    )  # fmt: skip
    assert (made.settings.lr, made.settings.baseline, made.settings.test) == ((0.5,), "mlp", ())
    assert {recipe.workers for recipe in made.arms.values()} == {2}
    assert made.arms["vadapter"].stages["vadapter"].steps == 9
    assert made.arms["mlp"].stages["mlp"].steps == 4
    assert made.arms["mlp"].stages["mlp"].log_every == 5
    assert made.parts.stages["llm"].steps == 3
    assert plan("lr=0.1,0.2").settings.lr == (0.1, 0.2)


@pytest.mark.parametrize(
    ("item", "words"),
    [("seed=3", "--seeds=N"), ("stages.mlq.steps=3", "did you mean 'mlp'"),
     ("validation_los=x", "did you mean 'validation_loss'"), ("arms.mpl.workers=1", "'mlp'"),
     ("stages.mlp.stepps=3", "did you mean 'steps'"), ("lr=fast", "config.lr")],
)  # fmt: skip
def test_an_override_that_nothing_has_is_explained(plan, item, words):
    with pytest.raises(ConfigError) as raised:
        plan(item)
    assert words in str(raised.value)
