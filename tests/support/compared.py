"""Run directories of a comparison, written without training: what their files say is chosen."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from support.recipes import tiny_recipe

from vadapter.compare.comparison import Arm, Comparison, Trained
from vadapter.config import plain
from vadapter.data.tokenizers.bpe import BPETokenizer
from vadapter.recipe.schema import components, read
from vadapter.stages.initialization import DONE

LOSS, SCORE = "held/loss", "captions/cider"
Evaluated = Mapping[int, Mapping[str, float]]  # step -> what was measured there


def points(
    steps: Sequence[int], losses: Sequence[float], scores: Sequence[float] = ()
) -> Evaluated:
    """Evaluations at some steps; without `scores` of the loss alone."""
    found = {step: {LOSS: loss} for step, loss in zip(steps, losses, strict=True)}
    for step, score in zip(steps, scores, strict=False):
        found[step] |= {SCORE: score, "captions/n": 8.0}
    return found


def write_run(
    workdir: Path, stage: str, evaluated: Evaluated, *, seed: int = 0, lr: float = 1e-2,
    steps: int = 40, step_ms: float = 100.0, prior: Mapping[str, int] = {},
    finals: Mapping[str, Sequence[tuple[str, float]]] = {}, finished: bool = True,
    blank: bool = False,
) -> Trained:  # fmt: skip
    """Write a run of the tiny recipe as training leaves it, and return the stage to compare.

    Args:
      stage: of the tiny recipe.
      evaluated: held-out losses and scores by step.
      steps, step_ms: the steps that are logged, every second and the first, and what each took.
      prior: steps of the stages before it, which belong to the arm.
      finals: (image, score) of each item of an evaluation.
      blank: the images it is trained on are blank.
    """
    config = tiny_recipe(workdir / "shapes", steps=max(steps, 4))  # more than its warm-up
    config.seed = seed
    config.stages[stage].optim.lr = lr
    for name, data in config.data.items():
        data.media = "clip" if "clips" in name else "image"
    config.data.images.blank = blank
    recipe = read(config)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(plain(recipe)))
    (workdir / "env.json").write_text(json.dumps({"jax": "0.10.2", "devices": ["cpu:0"]}))
    tokenizer = BPETokenizer.train(["a"], 259)
    tokenizer.save(workdir / "tokenizer.json")
    for name, count in prior.items():
        _write_metrics(workdir / name, count, step_ms, {})
    _write_metrics(workdir / stage, steps, step_ms, evaluated)
    for name, items in finals.items():
        _write_final(workdir / stage / "eval" / name, items)
    if finished:
        (workdir / stage / DONE).write_text(json.dumps(_done(recipe, stage, tokenizer.digest)))
    return Trained(workdir, stage, seed, lr, tuple(prior))


def _write_metrics(directory: Path, steps: int, step_ms: float, evaluated: Evaluated) -> None:
    directory.mkdir(exist_ok=True)
    logged = [{"step": s, "loss": 3.0 - s / steps, "step_ms": step_ms}
              for s in range(1, steps + 1) if s == 1 or s % 2 == 0]  # fmt: skip
    rows = logged + [{"step": step, **values} for step, values in evaluated.items()]
    rows = [{"attempt": 1, "time": 1000.0 + row["step"], **row} for row in rows]
    append_rows(directory, rows)


def append_rows(directory: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to a metrics.jsonl, as another attempt does."""
    with (directory / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _write_final(directory: Path, items: Sequence[tuple[str, float]]) -> None:
    directory.mkdir(parents=True)
    rows = [{"id": image, "index": i, "score": x} for i, (image, x) in enumerate(items)]
    (directory / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = {"cider": sum(x for _, x in items) / len(items), "n": len(items)}
    (directory / "score.json").write_text(json.dumps({"scores": scores}))


def _done(recipe: Any, name: str, tokenizer: str) -> dict[str, Any]:
    stage = recipe.stages[name]
    return {
        "components": dict.fromkeys(stage.chain, "0" * 64),
        "identity": {
            "stage": name,
            "config": plain(stage),
            "components": {part: plain(recipe.components[part]) for part in components(stage)},
            "data": {data: plain(recipe.data[data]) for data in stage.data},
            "fingerprints": dict.fromkeys(stage.data, "ab" * 32),
            "tokenizer": tokenizer,
            "start": dict.fromkeys((stage.encoder, stage.lm), "cd" * 32),
            "seed": recipe.seed,
            "dtype": recipe.dtype,
        },
        "steps": stage.steps,
        "seconds": 10.0,
    }


def compare(
    folder: Path, *arms: tuple[str, str, Mapping[str, int], Mapping[int, Evaluated]],
    score: str = SCORE,
) -> Comparison:  # fmt: skip
    """Write the runs of arms (name, stage, steps of stages before, evaluations by seed).

    The first arm is the baseline.
    """
    made = []
    for number, (name, stage, prior, curves) in enumerate(arms):
        runs = tuple(
            write_run(folder / f"{number}-{seed}", stage, evaluated, seed=seed, prior=prior)
            for seed, evaluated in curves.items()
        )
        made.append(Arm(name, runs, {}))
    return Comparison("test", tuple(made), made[0].name, LOSS, score, ())
