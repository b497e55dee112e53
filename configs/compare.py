"""A comparison: several connectors over the frozen parts, the data and the schedule of one base.

    vadapter compare --config=configs/compare.py:base=scenes,arms=vadapter,mlp --workdir=DIR

Arguments:
    base       scenes | flickr8k | public | paper
    arms       rows of configs/ablations.py, which lists them; ROW.blind is the blind control of a
               row, an arm named ROW_blind
    lr         the learning rates to choose from on validation data, as factors of the base's: the
               same for all arms
    baseline   the arm that the others are measured against; perceiver, if it is one, else the first

All other arguments are those of configs/ablations.py and of the base: `stage1=2`, `scale=0.1`,
`rung=laptop`, …
Not run.
"""

import runpy

from ml_collections import ConfigDict

from vadapter import config
from vadapter.config import choose, parse_arg, split_arg
from vadapter.errors import ConfigError

# validation_loss: what learning rates are chosen by. score: the curve; "": none. test: evaluations
# that are run once, on the chosen runs.
MEASURED = dict(
    scenes=dict(
        validation_loss="held_images/loss",
        score="captions/cider",
        test=("test_captions", "test_clips", "test_answers"),
    ),
    flickr8k=dict(validation_loss="val/loss", score="val/cider", test=("test",)),
    public=dict(validation_loss="val/loss", score="val/cider", test=()),
    paper=dict(validation_loss="val/loss", score="", test=()),
)


def get_config(arg=None):
    defaults = dict(
        base="scenes", arms=("vadapter", "perceiver", "mlp"), lr=(0.5, 1.0, 2.0), baseline=""
    )
    own, rest = split_arg(arg, **defaults)
    arg = parse_arg(own, **defaults)
    choose("base", arg.base, MEASURED)
    ablations = runpy.run_path(str(config.find_recipe("configs/ablations.py")))
    for row in arg.arms:
        ablations["named"]("arms", row)
    if split_arg(rest, row="")[0]:
        raise ConfigError("config argument 'row': a comparison has several, arms=ROW,ROW")
    if repeated := {row for row in arg.arms if arg.arms.count(row) > 1}:
        raise ConfigError(f"config argument arms: {', '.join(sorted(repeated))} twice")
    if not arg.arms or not arg.lr:
        raise ConfigError("config arguments arms and lr: at least one value each")
    baseline = arg.baseline or ("perceiver" if "perceiver" in arg.arms else arg.arms[0])
    choose("baseline", baseline, arg.arms)

    def recipe(row):
        recipe = ablations["get_config"](f"base={arg.base},row={row},{rest}").to_dict()
        last = recipe["stages"][recipe["chain"][-1]]
        # A score depends on the items it is measured on. Always on all of them, so that the curve
        # has its last step, which is often the best.
        # The curve's evaluation alone: the others are those of the test set, at the end.
        score = MEASURED[arg.base]["score"].split("/")[0]
        last["evals"] = tuple(name for name in last.get("evals", ()) if name == score)
        last |= dict(eval_limit=0, eval_every=max(1, min(last["eval_every"], last["steps"] // 6)))
        return recipe

    arms = {row.replace(".", "_"): recipe(row) for row in arg.arms}
    first = next(iter(arms.values()))
    rate = first["stages"][first["chain"][-1]]["optim"]["lr"]
    return ConfigDict(
        dict(
            name=f"compare {arg.base}",
            arms=arms,
            order=tuple(arms),  # as shown
            baseline=baseline.replace(".", "_"),
            lr=tuple(float(f"{rate * factor:.6g}") for factor in arg.lr),
            **MEASURED[arg.base],
        )
    )
