"""Every connector, the rows of the paper's tables, and variants of the method, over any base.

    vadapter train --config=configs/ablations.py:base=scenes,row=mlp --workdir=RUN
    vadapter compare --config=configs/compare.py:base=scenes,arms=table1e_1,table1e_3,table1e_6

Arguments:
    base     paper | scenes | flickr8k | public: the recipe that trains the frozen parts
    row      a row of ROWS; ROW.blind trains the same on blank images, its blind control
    clip     weights of the other encoder of Table 12, a hub id or folder
    stage1   factor on the steps of stage 1, and on its warm-up

All other arguments are those of the base: `scale=0.1`, `encoder=b`, `rung=laptop`, … The recipe has
the stages that the row needs alone, and its last one is named after it. Not run.
"""

import dataclasses
import math
from typing import Any

from ml_collections import ConfigDict

from vadapter import config
from vadapter.config import build, choose, parse_arg, split_arg
from vadapter.errors import ConfigError

CLIP_B = "openai/clip-vit-base-patch16"


class Row:
    """What stands between encoder and LLM.

    Args:
      chain: the components, from the encoder to the LLM.
      tlm: where a tiny LM in the chain, and what precedes it, starts: stage1, text (the
        tiny LM pretrained on text, the rest random) or random.
      encoder: "clip" for the encoder of Table 12.
      images: trained on images alone, at base=paper.
      stage1, steps: factors on the steps of stage 1 and of the last stage.
      first, last: keys of stage 1 and of the last stage; those of `optim` are added to it.
      **changes: fields of components; a `Times` is a factor on the base's value.
    """

    def __init__(
        self, chain: str, *, tlm="stage1", encoder="", images=False, stage1=1.0, steps=1.0,
        first: dict[str, Any] | None = None, last: dict[str, Any] | None = None, **changes: Any,
    ):  # fmt: skip
        self.chain, self.tlm, self.encoder = tuple(chain.split()), tlm, encoder
        self.images, self.changes = images, changes
        self.stage1, self.steps = stage1, steps
        self.first, self.last = first or {}, last or {}


@dataclasses.dataclass(frozen=True)
class Times:
    """A factor on what the base says."""

    factor: float


HALF, SAME, DOUBLE = Times(0.5), Times(1), Times(2)
# Table 9 does not state the rate of decay: from temperature 2 to 1/2 over the steps of the stage.
DECAY = dict(temperature=2.0, min_temperature=0.5, decay="to_min_temperature")
# Soft words with little noise that become nearly hard: they learn from images, where those of
# Table 9 hardly do.
SOFT = dict(temperature=1.0, min_temperature=0.1, decay="to_min_temperature", hard=False, noise=0.1)
PERCEIVER = "perceiver fc_out"
VADAPTER = "resampler fc_in tlm fc_out"


def perceiver(**changes: Any) -> Row:
    """Return a row of Table 1, over images alone."""
    return Row(PERCEIVER, images=True, perceiver=changes)


def slow_tlm(factor: float) -> Row:
    """Return the method with another learning rate of the tiny LM in both stages."""
    optim = dict(optim=dict(lr_mults=dict(tlm=factor)))
    return Row(VADAPTER, first=optim, last=optim)


CONNECTORS: dict[str, Row] = {
    "vadapter": Row(VADAPTER),
    "perceiver": Row(PERCEIVER),
    "pooler": Row("attention_pool fc_out"),
    "mlp": Row("mlp"),
    "linear": Row("linear"),
    "shuffle": Row("shuffle"),
    "pool": Row("pool"),
    "qformer": Row("qformer fc_out"),
    "c_abstractor": Row("c_abstractor"),
    "cross_attention": Row("media cross_attention"),
    "words": Row(f"{VADAPTER} words", words=SOFT),
}
# The rows of the paper's tables in its order. tableN_WHAT is row WHAT of Table N; numbers of
# dimensions are half, the same and double those of the base's perceiver, 384, 768 and 1536 at
# base=paper.
TABLES: dict[str, Row] = {
    "table1a_none": perceiver(norm="none", final_norm=True),
    "table1a_shared": perceiver(norm="shared", final_norm=False),
    "table1a_separate": perceiver(norm="separate", final_norm=False),
    "table1a_separate_final": perceiver(norm="separate", final_norm=True),
    "table1b_time": perceiver(ffn=False, time_embed=True),
    "table1b_ffn": perceiver(ffn=True, time_embed=False),
    "table1b_both": perceiver(ffn=True, time_embed=True),
    "table1c_half": perceiver(query_dim=HALF),
    "table1c_same": perceiver(query_dim=SAME),
    "table1c_double": perceiver(query_dim=DOUBLE),
    "table1d_half": perceiver(hidden_dim=HALF),
    "table1d_same": perceiver(hidden_dim=SAME),
    "table1d_double": perceiver(hidden_dim=DOUBLE),
    "table1e_1": perceiver(layers=1),
    "table1e_3": perceiver(layers=3),
    "table1e_6": perceiver(layers=6),
    "table2_resampler": Row(PERCEIVER),
    "table2_vadapter": Row(VADAPTER),
    "table3_random": Row(VADAPTER, tlm="random"),
    "table3_text": Row(VADAPTER, tlm="text"),
    "table3_stage1": Row(VADAPTER),
    "table4_pooler": Row("attention_pool fc_in tlm fc_out"),
    "table4_resampler_1": Row(VADAPTER),
    "table4_resampler_6": Row("perceiver fc_in tlm fc_out"),
    "table9_none": Row(VADAPTER),
    "table9_tau_1": Row(f"{VADAPTER} words", words=dict(temperature=1.0, decay=0.0)),
    "table9_tau_2": Row(f"{VADAPTER} words", words=dict(temperature=2.0, decay=0.0)),
    "table9_tau_2_decay": Row(f"{VADAPTER} words", words=DECAY),
    "table12_resampler": Row(PERCEIVER, encoder="clip"),
    "table12_vadapter": Row(VADAPTER, encoder="clip"),
    "table13_mlp": Row("mlp"),
    "table13_resampler": Row(PERCEIVER),
    "table13_vadapter": Row(VADAPTER),
}
# What could decide whether the method wins: each row changes one thing of it, or of the baseline;
# configs/README.md says why. Starts of the tiny LM are those of Table 3, layers those of Table 1e.
QUERIES = (4, 8, 16, 32, 64, 128)
BOTH_WAYS = dict(bidirectional=True)
VARIANTS: dict[str, Row] = {
    **{f"queries_{n}": Row(VADAPTER, resampler=dict(queries=n)) for n in QUERIES},
    **{f"perceiver_queries_{n}": Row(PERCEIVER, perceiver=dict(queries=n)) for n in QUERIES},
    "concat_1": Row(PERCEIVER, perceiver=dict(concat_queries=True, layers=1)),
    "concat_6": Row(PERCEIVER, perceiver=dict(concat_queries=True, layers=6)),
    "transformer": Row(VADAPTER, tlm="random", last=BOTH_WAYS),
    "equal": Row("perceiver_equal fc_out"),
    "tlm_lr_0": slow_tlm(0.0),
    "tlm_lr_10": slow_tlm(0.1),
    "tlm_lr_30": slow_tlm(0.3),
    "exit_1": Row(VADAPTER, last=dict(exit_layer=-1)),
    "exit_2": Row(VADAPTER, last=dict(exit_layer=-2)),
    "query_loss": Row(VADAPTER, first=dict(query_loss=0.3)),
    "bidirectional": Row(VADAPTER, first=BOTH_WAYS, last=BOTH_WAYS),
    "fc_out_words": Row(VADAPTER, fc_out=dict(init="words")),
    "perceiver_fc_out_words": Row(PERCEIVER, fc_out=dict(init="words")),
    "stage1_quarter": Row(VADAPTER, stage1=0.25),
    "stage1_double": Row(VADAPTER, stage1=2.0),
    "stage1_x4": Row(VADAPTER, stage1=4.0),
    **{
        f"{name}_{word}": Row(chain, steps=factor)
        for name, chain in (("vadapter", VADAPTER), ("perceiver", PERCEIVER), ("mlp", "mlp"))
        for word, factor in (("quarter", 0.25), ("half", 0.5))
    },
}
ROWS = CONNECTORS | TABLES | VARIANTS


def connectors(perceiver: Any) -> dict[str, dict[str, Any]]:
    """Return the components that the bases lack, as large as published, or as the base's perceiver.

    Args:
      perceiver: the config dataclass of the base's perceiver.
    """
    queries, width, heads = perceiver.queries, perceiver.query_dim, perceiver.heads
    time, side = perceiver.time_embed, round(queries**0.5)
    mlp = dict(kind="mlp", hidden_dim=0, width=0, frames=8)  # 0: the width of the LLM
    return dict(
        attention_pool=dict(kind="pooler", queries=queries, width=width, heads=heads),
        mlp=dict(mlp, layers=2),
        linear=dict(mlp, layers=1),
        shuffle=dict(mlp, layers=2, pool="shuffle", factor=2, norm=True),  # InternVL
        pool=dict(mlp, layers=2, pool="mean_after", factor=2),  # Perception-LM
        qformer=dict(kind="qformer", time_embed=time),  # BLIP-2
        c_abstractor=dict(kind="c_abstractor", queries=side**2, merge="concat"),  # Honeybee
        media=dict(concat_queries=True),  # Flamingo; the rest as in the perceiver
        perceiver_equal=dict(layers=16),  # about as many parameters as resampler and tiny LM
        cross_attention=dict(kind="cross_attention", every=4),
        words=dict(kind="words"),
    )


# Sizes by the name of a small base's recipe, for about as many trained parameters as the perceiver
# has, and for clips of at most 128 tokens in the LLM.
SMALL = dict(
    scenes=dict(
        mlp=dict(hidden_dim=2720, frames=2),
        linear=dict(frames=2),
        shuffle=dict(hidden_dim=1088),
        pool=dict(hidden_dim=2720),
        qformer=dict(queries=64, width=96, depth=6, heads=3, mlp_dim=288),
        c_abstractor=dict(hidden_dim=200),
        media=dict(layers=2),
        perceiver_equal=dict(layers=4),
        cross_attention=dict(every=3, heads=4, head_dim=32),
    ),
    flickr8k=dict(
        mlp=dict(hidden_dim=896),
        shuffle=dict(hidden_dim=256),
        pool=dict(hidden_dim=896),
        qformer=dict(queries=16, width=128, depth=4, heads=4, mlp_dim=384),
        c_abstractor=dict(hidden_dim=208),
        media=dict(layers=2),
        perceiver_equal=dict(layers=5),
        cross_attention=dict(every=2, heads=6, head_dim=32),
    ),
    # flickr8k.py:llm=…
    flickr8k_public=dict(
        mlp=dict(hidden_dim=2816),
        shuffle=dict(hidden_dim=912),
        pool=dict(hidden_dim=2816),
        qformer=dict(queries=49, width=256, depth=4, heads=8, mlp_dim=1024),
        c_abstractor=dict(hidden_dim=464),
        media=dict(layers=1),
        perceiver_equal=dict(layers=8),
        cross_attention=dict(every=15, heads=8, head_dim=32),
    ),
)


Recipe = dict[str, Any]  # the groups and keys of a recipe, plain


def packaged(base: str, arg: str) -> Recipe:
    """Return the recipe of a base that trains both stages of the method."""
    return config.load(f"configs/{base}.py:{arg}").to_dict()


def paper(base: str, arg: str) -> Recipe:
    """Return the paper's recipe with both stages and a held-out loss, to choose between rates."""
    for key in ("stage", "adapter", "front", "init"):
        if split_arg(arg, **{key: ""})[0]:
            raise ConfigError(f"config argument {key!r}: at base=paper, the row says it")
    recipe, first = (packaged(base, f"{arg},stage={stage}") for stage in (2, 1))
    stages = recipe["stages"] | first["stages"]
    start = stages["vadapter"]["start"]
    start |= {n: "decoder" for n, source in start.items() if source == "stage1/decoder"}
    for stage in stages.values():
        stage |= dict(loss=("val",), loss_batches=16, eval_every=max(1, stage["steps"] // 50))
    pairs = recipe["data"]["pairs"]
    recipe["data"]["val"] = pairs | dict(source=pairs["source"] | dict(split="val"))
    return recipe | dict(stages=stages, chain=("decoder", "vadapter"))


BASES = dict(paper=paper, scenes=packaged, flickr8k=packaged, public=packaged)
# What passes all visual tokens of a clip to the LLM: at base=paper 2048 of them, which leaves room
# for the inputs of its blocks alone.
MANY_TOKENS = {"mlp", "linear", "c_abstractor"}


def get_config(arg=None):
    defaults = dict(base="scenes", row="vadapter", clip=CLIP_B, stage1=1.0)
    own, rest = split_arg(arg, **defaults)
    arg = parse_arg(own, **defaults)
    choose("base", arg.base, BASES)
    name, blind = named("row", arg.row)
    row, recipe = ROWS[name], BASES[arg.base](arg.base, rest)
    if row.encoder and arg.base not in ("paper", "public"):
        raise ConfigError(
            f"config argument row={name!r}: it needs another encoder, of public weights, which "
            f"base={arg.base} does not take; use base=paper or base=public"
        )
    stages = recipe["stages"]
    first, last = stages["decoder"], stages["vadapter"]
    start1, start2 = first.get("start", {}), last["start"]
    frozen = {"encoder", "llm"} - ({"encoder"} if row.encoder else set())
    inner = (row.chain[0], "fc_in", "tlm")
    starts = dict(
        stage1=dict.fromkeys(inner, "decoder"),
        text=dict(tlm=start1.get("tlm", "weights")),
        random=dict(tlm="random"),
    )
    first["chain"], last["chain"] = inner[:2], row.chain
    first["start"] = {n: s for n, s in start1.items() if n in frozen | {"tlm"}}
    last["start"] = {n: s for n, s in start2.items() if n in frozen}
    last["start"] |= starts[row.tlm] if "tlm" in row.chain else {}
    for stage in (first, last):
        if row.images and arg.base == "paper":
            stage["data"] = dict(pairs=1.0)
        with_keys(stage, row.first if stage is first else row.last)
        # Tests are run once, on what validation chose.
        stage["evals"] = tuple(n for n in stage.get("evals", ()) if not n.startswith("test"))
    lengthen(first, arg.stage1 * row.stage1)
    lengthen(last, row.steps)
    stages[name] = stages.pop("vadapter")

    recipe["chain"] = (*(n for n in recipe["chain"] if n in needed(stages, name)), name)
    recipe["stages"] = {n: stages[n] for n in recipe["chain"]}
    sizes, steps = recipe["name"], last["steps"]
    recipe["components"] = with_row(recipe["components"], sizes, row, steps)
    if arg.base == "paper" and MANY_TOKENS & {*row.chain}:
        recipe["components"]["llm"] |= dict(remat="full")
    recipe["name"] = f"{arg.base}-{name}{'-blind' * blind}"
    if row.encoder:
        recipe["components"]["encoder"] = dict(weights=arg.clip)
    return ConfigDict(used(recipe, blind=blind))


def with_keys(stage: Recipe, keys: Recipe) -> None:
    """Set keys of a stage, of its groups those that are given."""
    for key, value in keys.items():
        stage[key] = stage[key] | value if isinstance(value, dict) else value


def lengthen(stage: Recipe, factor: float) -> None:
    """Multiply the steps of a stage and of its warm-up."""
    if factor != 1:
        stage["steps"] = max(2, round(stage["steps"] * factor))
        warmup = min(stage["optim"]["warmup"] * factor, stage["steps"] - 1)
        stage["optim"] = stage["optim"] | dict(warmup=round(warmup))


def named(key: str, row: str) -> tuple[str, bool]:
    """Return the name of a row and whether it is the blind one; ConfigError if there is none."""
    name, dot, _ = row.partition(".")
    choose(key, name, ROWS)
    if dot:
        choose(key, row, (name, f"{name}.blind"))
    return name, bool(dot)


def with_row(components: Recipe, sizes: str, row: Row, steps: int) -> Recipe:
    """Return the components of a base and those of a row whose last stage takes `steps` steps.

    `sizes` is the row of SMALL for connectors that the base lacks; others are as published.
    """
    from vadapter.models.registry import expand, load_kind

    components = dict(components)
    spec = expand("perceiver", components["perceiver"])
    config_type, _ = load_kind(spec.pop("kind"))
    perceiver = build(config_type, spec)
    for name, new in connectors(perceiver).items():
        components[name] = new | SMALL.get(sizes, {}).get(name, {})
    for name in ("media", "perceiver_equal"):  # fields beside those of the perceiver
        components[name] = components["perceiver"] | components[name]
    for name, changes in row.changes.items():
        sized = {
            key: round(getattr(perceiver, key) * value.factor)
            for key, value in changes.items()
            if isinstance(value, Times)
        }
        components[name] = components[name] | changes | sized
    words = components["words"]
    if words.get("decay") == "to_min_temperature":
        words["decay"] = math.log(words["temperature"] / words["min_temperature"]) / steps
    return components


def needed(stages: Recipe, name: str) -> set[str]:
    """Return the stages that a stage starts from, directly or not."""
    before = {s for s in stages[name].get("start", {}).values() if s in stages}
    return before.union(*(needed(stages, stage) for stage in before))


def used(recipe: Recipe, *, blind: bool) -> Recipe:
    """Return a recipe without components and data that nothing uses.

    If `blind`, all images are blank that stages with an adapter see, and evaluations.
    """
    from vadapter.recipe.schema import StageConfig, components

    stages = {n: build(StageConfig, stage) for n, stage in recipe["stages"].items()}
    parts = {name for stage in stages.values() for name in components(stage)}
    seen = {evaluation["data"] for evaluation in recipe.get("evals", {}).values()}
    read = {*recipe.get("tokenizer", {}).get("data", ())}
    for stage in stages.values():
        (read if stage.kind in ("lm", "vision") else seen).update(stage.data, stage.loss)
    blank = dict(blank=True)
    return recipe | dict(
        components={n: spec for n, spec in recipe["components"].items() if n in parts},
        data={
            n: data | (blank if blind and n in seen else {})
            for n, data in recipe["data"].items()
            if n in seen | read
        },
    )
