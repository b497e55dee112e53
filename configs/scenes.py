"""Generated scenes as the base of comparisons: the stages of the quickstart and a test set.

    vadapter compare --config=configs/compare.py:base=scenes,arms=vadapter,mlp --workdir=DIR
    vadapter train --config=configs/scenes.py --workdir=RUN

Arguments:
    scale      factor on the steps of both stages
    pretrain   factor on the steps of the pretraining
    queries    of the resamplers
    steps      of both stages, before `scale`
    test       number of test images; half of them with questions, and a quarter as many clips
    weights    folder of the pretrained encoder, tlm and llm; by default those of the package.
               `weights=` pretrains them: 3,000 steps of the tiny language model, 4,000 of the large
               one, 3,000 of the encoder, about an hour on one CPU core

Run 2026-11-30: an arm takes 2 to 3 minutes on one core. Training, validation (`captions`, `clips`,
`answers`) and test (`test_captions`, `test_clips`, `test_answers`) share no scene, and no image is
seen twice within a stage. configs/quickstart.py explains every key.
"""

from ml_collections import ConfigDict

from vadapter import config
from vadapter.config import parse_arg

PRETRAINING = dict(tlm=3_000, llm=4_000, vision=3_000)  # steps


def get_config(arg=None):
    arg = parse_arg(
        arg, scale=1.0, pretrain=1.0, queries=64, steps=300, test=400, weights="packaged:scenes"
    )
    base = f"scale={arg.scale},queries={arg.queries},steps={arg.steps},weights={arg.weights}"
    recipe = config.load(f"configs/quickstart.py:{base}").to_dict()
    stages = recipe["stages"]
    for name, count in PRETRAINING.items():
        steps = max(2, int(count * arg.pretrain))
        optim = dict(warmup=min(100, steps // 2), schedule="cosine")
        stages[name] |= dict(steps=steps, save_every=500, log_every=50)
        stages[name]["optim"] |= optim
    stages["llm"] |= dict(eval_every=500)
    stages["vision"] |= dict(batch=64)

    data, evals = recipe["data"], recipe["evals"]
    for rows in data.values():  # the quickstart has one held-out split
        if rows["source"]["split"] == "test":
            rows["source"]["split"] = "val"
    for name, like, test, count in (
        ("captions", "held_images", "test_images", arg.test),
        ("clips", "held_clips", "test_clips", max(1, arg.test // 4)),
        ("answers", "questions", "test_questions", max(1, arg.test // 2)),
    ):
        source = data[like]["source"] | dict(split="test", count=count)
        data[test] = data[like] | dict(source=source)
        evals[f"test_{name}"] = evals[name] | dict(data=test)
    return ConfigDict(recipe | dict(name="scenes"))
