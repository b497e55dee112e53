"""A recipe is checked before anything is loaded: each mistake is one line that names the key."""

import re
from pathlib import Path

import pytest
from support import recipes
from support.recipes import tiny_recipe

from vadapter.config import load, override
from vadapter.errors import ConfigError
from vadapter.models.adapter_model import AdapterModel
from vadapter.models.coca import CoCa
from vadapter.recipe.model import make_model
from vadapter.recipe.schema import STAGES, components, read, trained


@pytest.fixture
def config():
    """Stages share some groups of keys, `optim` for example: a mistake there is told once."""
    return tiny_recipe(Path("shapes"))


def assign(config, path, value):
    """Set, or delete with `...`, a key that may not exist yet."""
    *parents, leaf = path.split(".")
    with config.unlocked(), config.ignore_type():
        for key in parents:
            config = config[key]
        if value is ...:
            del config[leaf]
        else:
            config[leaf] = value


MISTAKES = {
    "a mistyped key": ("stages.llm.stpes", 3, "config.stages.llm.stpes: unknown key; did you mean"),
    "a missing key": ("stages.llm.batch", ..., "config.stages.llm.batch: missing; it has no defa"),
    "a wrong type": ("seed", "one", "config.seed: expected int, got str 'one'"),
    "a rate that is no number": (
        "stages.llm.optim.lr", float("nan"), "config.stages.decoder.optim.lr: not a number"
    ),
    "an unknown dtype": (
        "dtype", "float8", "config.dtype='float8': unknown; did you mean 'float32'?"
    ),
    "an unknown kind of stage": ("stages.llm.kind", "ml", "config.stages.llm.kind: unknown 'ml'"),
    "an unknown kind of component": (
        "components.llm.kind", "lmm", "components.llm.kind='lmm': unknown; did you mean 'lm'?"
    ),
    "an unknown stage in the chain": (
        "chain", ("tlm", "decodr"), "config.chain: unknown 'decodr'; did you mean 'decoder'?"
    ),
    "an unknown component": (
        "stages.decoder.chain", ("resample",),
        "config.stages.decoder: component: unknown 'resample'; did you mean 'resampler'?",
    ),
    "an encoder that reads no images": (
        "components.encoder", {"kind": "qformer"},
        "config.stages.decoder: components.encoder is of kind qformer, which reads no images; an e",
    ),
    "no language model": ("stages.decoder.lm", "", "config.stages.decoder.lm: missing; which"),
    "nothing in the chain": ("stages.decoder.chain", (), "config.stages.decoder.chain: empty;"),
    "no data": ("stages.llm.data", {}, "config.stages.llm.data: empty; nothing to train on"),
    "unknown data": (
        "stages.llm.data", {"document": 1.0},
        "config.stages.llm.data: unknown 'document'; did you mean 'documents'?",
    ),
    "unknown data to evaluate": (
        "evals.clips.data", "held_clip",
        "config.evals.clips.data: unknown 'held_clip'; did you mean 'held_clips'?",
    ),
    "unknown data for the tokenizer": (
        "tokenizer.data", ("clip",), "config.tokenizer.data: unknown 'clip'; did you mean 'clips'?"
    ),
    "documents that are evaluated": (
        "evals.clips.data", "documents",
        "config.evals.clips.data='documents': documents are not evaluated",
    ),
    "an unknown fit": (
        "data.held.fit", "squash", "config.data.held.fit='squash': unknown; known: crop, pad, str"
    ),
    "an unknown task": (
        "data.held.task", "captions", "config.data.held.task: unknown 'captions'; did you mean 'ca"
    ),
    "int8 that would be trained": (
        "components.llm.int8", True, "components.llm.int8: llm is trained in stage llm, which int8"
    ),
    "int4 that would be trained": (
        "components.llm.int4", True, "components.llm.int4: llm is trained in stage llm, which int4"
    ),
    "groups of no scales": (
        "components.llm.scale_group", 8, "components.llm.scale_group: no scale is stored without"
    ),
    "images wanted, text given": (
        "stages.decoder.data", {"documents": 1.0},
        "config.stages.decoder: data 'documents' has no images, which decoder needs",
    ),
    "a batch that does not divide": (
        "stages.llm.accumulate", 3,
        "config.stages.llm: batch=8 does not divide into accumulate=3",
    ),
    "micro-batches of a contrastive loss": (
        "stages.vision.accumulate", 2,
        "config.stages.vision: the contrastive loss needs the whole batch: accumulate=1",
    ),
    "no steps": ("stages.llm.steps", 0, "config.stages.llm.steps=0: at least 1"),
    "no line ever": ("stages.llm.log_every", 0, "config.stages.llm.log_every=0: at least 1"),
    "no checkpoint kept": ("stages.llm.keep", 0, "config.stages.llm.keep=0: at least 1"),
    "nothing to decode": ("evals.clips.max_new", 0, "config.evals.clips.max_new=0: at least 1"),
    "warm-up longer than the run": (
        "stages.llm.optim.warmup", 4,
        "config.stages.decoder.optim.warmup=4 must be below steps=4",
    ),
    "an unknown schedule": (
        "stages.llm.optim.schedule", "cosin",
        "config.stages.decoder.optim.schedule='cosin': one of linear, cosine, constant",
    ),
    "a learning rate of a frozen component": (
        "stages.vadapter.optim.lr_mults", {"llm": 0.1},
        "config.stages.decoder.optim.lr_mults.llm: the stage does not train 'llm'; it trains res",
    ),
    "a loss of queries in front of a frozen language model": (
        "stages.vadapter.query_loss", 0.5,
        "config.stages.vadapter.query_loss=0.5: 0 or more, in a stage of kind decoder alone",
    ),
    "a negative multiplier": (
        "stages.llm.optim.lr_mults", {"resampler": -1},
        "config.stages.decoder.optim.lr_mults.resampler=-1.0: a finite number, 0 or more",
    ),
    "scores of a stage without images": (
        "stages.llm.evals", ("captions",),
        "config.stages.llm.evals: a stage of kind lm does not write about images",
    ),
    "an unknown stage to start from": (
        "stages.vadapter.start.tlm", "decode",
        "config.stages.vadapter.start.tlm: unknown 'decode'; did you mean 'decoder'?",
    ),
    "a frozen part that would stay random": (
        "stages.vadapter.fresh", ("llm/head",),
        "config.stages.vadapter.fresh: llm/head would stay random, since llm is frozen",
    ),
    "a start of a component that is not there": (
        "stages.decoder.start.llm", "llm", "config.stages.decoder.start: unknown 'llm'"
    ),
    "a stage that starts from a later one": (
        "chain", ("tlm", "llm", "vision", "vadapter", "decoder"),
        "config.stages.vadapter.start.fc_in='decoder': that stage comes later in config.chain=",
    ),
    "a stage that starts from itself": (
        "stages.decoder.start.tlm", "decoder",
        "config.stages.decoder.start.tlm='decoder': that stage comes later in config.chain=",
    ),
    "a stage that has not trained it": (
        "stages.vadapter.start.llm", "tlm",
        "config.stages.vadapter.start.llm='tlm': that stage trains tlm, not llm; name the right",
    ),
    "an exception for nobody": (
        "stages.vadapter.drop", ("tml/embedding",),
        "config.stages.vadapter.drop: unknown 'tml'; did you mean 'tlm'?",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_with_its_key(config, mistake):
    path, value, message = MISTAKES[mistake]
    assign(config, path, value)
    with pytest.raises(ConfigError, match="^" + re.escape(message)) as error:
        read(config)
    assert "\n" not in str(error.value)


def test_integers_of_two_sizes_are_refused(config):
    assign(config, "components.llm.int8", True)
    assign(config, "components.llm.int4", True)
    with pytest.raises(ConfigError, match=r"components\.llm: int8 and int4 are set; choose one"):
        read(config)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_model_that_stays_frozen_may_be_of_integers(config, kind):
    assign(config, f"components.llm.{kind}", True)
    assign(config, "components.llm.weights", "weights")
    assign(config, "chain", ("tlm", "vision", "perceiver"))
    recipe = read(config)
    model = make_model(recipe, recipe.stages["perceiver"], 320)
    assert getattr(model.modules["llm"].config, kind)


def test_a_model_with_fewer_words_than_the_tokenizer_is_refused(config):
    config.components.llm.vocab_size = 299
    recipe = read(config)
    with pytest.raises(
        ConfigError, match=r"components\.llm\.vocab_size=299 is smaller .* 300; set"
    ):
        make_model(recipe, recipe.stages["llm"], 300)
    assert make_model(recipe, recipe.stages["llm"], 299)


def test_a_model_without_a_size_of_vocabulary_takes_the_tokenizers(config):
    recipe = read(config)
    model = make_model(recipe, recipe.stages["llm"], 287)
    assert model.modules["llm"].config.vocab_size == 287


def test_widths_that_do_not_meet_are_refused(config):
    config.stages.vadapter.chain = ("resampler", "fc_in", "tlm")
    recipe = read(config)
    with pytest.raises(ConfigError, match="tlm gives width 16, but llm reads 24; put a component"):
        make_model(recipe, recipe.stages["vadapter"], 300)


def test_a_layer_without_a_width_takes_that_of_the_next_model(config):
    recipe = read(config)
    modules = make_model(recipe, recipe.stages["vadapter"], 300).modules
    assert (modules["fc_in"].config.width, modules["fc_out"].config.width) == (16, 24)


def test_the_table_says_what_each_kind_of_stage_trains(config):
    recipe = read(config)
    trainable = {name: trained(stage) for name, stage in recipe.stages.items()}
    assert trainable == {
        "tlm": ("tlm",),
        "llm": ("llm",),
        "vision": ("encoder", "pooler", "text", "fusion"),
        "decoder": ("resampler", "fc_in", "tlm"),
        "vadapter": ("resampler", "fc_in", "tlm", "fc_out"),
        "perceiver": ("perceiver", "fc_out"),
    }
    for name, stage in recipe.stages.items():
        frozen = set(components(stage)) - set(trainable[name])
        assert frozen == {"decoder": {"encoder"}, "vadapter": {"encoder", "llm"},
                          "perceiver": {"encoder", "llm"}}.get(name, set())  # fmt: skip


def test_an_override_changes_one_stage_alone_though_the_file_shares_the_group():
    values = load(f"{Path(recipes.__file__)}:shapes")
    override(values, ["stages.llm.optim.lr=0.25", "stages.perceiver.optim.warmup=2"])
    recipe = read(values)
    assert recipe.stages["llm"].optim.lr == 0.25
    assert recipe.stages["tlm"].optim.lr == 0.01
    assert [recipe.stages[name].optim.warmup for name in ("tlm", "perceiver")] == [1, 2]


def test_every_kind_of_stage_has_a_model(config):
    recipe = read(config)
    assert {stage.kind for stage in recipe.stages.values()} == set(STAGES)
    for stage in recipe.stages.values():
        model = make_model(recipe, stage, 300)
        assert isinstance(model, CoCa if stage.kind == "vision" else AdapterModel)
        assert model.names() == components(stage)
        if isinstance(model, AdapterModel):
            assert model.frozen_lm == (stage.lm not in trained(stage))
