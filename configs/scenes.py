"""Generated scenes as the base of comparisons: the stages of the quickstart and a test set.

    vadapter compare --config=configs/compare.py:base=scenes,arms=vadapter,mlp --workdir=DIR
    vadapter train --config=configs/scenes.py --workdir=RUN

Arguments:
    scale      factor on the steps of every stage
    pretrain   factor on the steps of the parts that stay frozen later: both language models and
               the encoder
    queries    of the resamplers
    test       number of test images; half of them with questions

Training, validation (`captions`, `clips`, `answers`) and test (`test_captions`, `test_answers`)
share no scene. configs/quickstart.py explains every key. Not run as it is.
"""

from ml_collections import ConfigDict

from vadapter import config
from vadapter.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, scale=1.0, pretrain=1.0, queries=8, test=400)
    recipe = config.load(f"configs/quickstart.py:scale={arg.scale},queries={arg.queries}").to_dict()
    for stage in recipe["stages"].values():
        if stage["kind"] in ("lm", "vision"):
            stage["steps"] = max(2, int(stage["steps"] * arg.pretrain))

    data, evals = recipe["data"], recipe["evals"]
    for rows in data.values():  # the quickstart has one held-out split
        if rows["source"]["split"] == "test":
            rows["source"]["split"] = "val"
    for name, like, test, count in (
        ("captions", "held_images", "test_images", arg.test),
        ("answers", "questions", "test_questions", max(1, arg.test // 2)),
    ):
        source = data[like]["source"] | dict(split="test", count=count)
        data[test] = data[like] | dict(source=source)
        evals[f"test_{name}"] = evals[name] | dict(data=test)
    return ConfigDict(recipe | dict(name="scenes"))
