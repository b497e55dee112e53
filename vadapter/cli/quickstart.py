"""Trains a recipe's chain and says in plain words what is going on."""

import time
from pathlib import Path

from vadapter.distributed import hosts
from vadapter.models.registry import expand
from vadapter.recipe.schema import Recipe
from vadapter.report.report import Report, write_report
from vadapter.train.loop import train

SENTENCES = {
    "lm": "{lm} learns to write, from text alone",
    "vision": "{encoder} learns to see, from images with captions",
    "decoder": "{chain} and {lm} learn to caption what the frozen {encoder} sees (stage 1)",
    "adapter": "{chain} learn to tell the frozen {lm} what the frozen {encoder} sees ({role})",
}


def sentence(recipe: Recipe, name: str) -> str:
    """What a stage does, for people who meet it for the first time."""
    stage = recipe.stages[name]
    kinds = {expand(part, recipe.components[part])["kind"] for part in stage.chain}
    role = "stage 2" if "lm" in kinds else "a baseline, with no language model in between"
    words = SENTENCES[stage.kind].format(
        lm=stage.lm, encoder=stage.encoder, chain=", ".join(stage.chain), role=role
    )
    return f"{words}; {stage.steps} steps"


def quickstart(recipe: Recipe, workdir: Path) -> Report | None:
    """Trains what is not trained yet, writes the report and prints it; that the first host does.

    Raises:
      UserError, Preempted, NonFiniteError: as `loop.train`.
    """
    began = time.monotonic()
    chain = recipe.chain
    say = print if hosts.first() else lambda *_, **__: None
    say(f"{recipe.name}: {len(chain)} stages, one after the other, in {workdir}.")
    say("What is done is not done again: stop with Ctrl-C, go on with the same command.")

    def announce(name: str) -> None:
        number = f"[{chain.index(name) + 1}/{len(chain)}]"
        say(f"\n{number} {name}: {sentence(recipe, name)}.", flush=True)

    train(recipe, workdir, before=announce)
    if not hosts.first():
        return None
    report = write_report(workdir, recipe)
    show(report)
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    print(f"\nTook {minutes} min {seconds} s. Now try: vadapter caption {workdir} IMAGE")
    return report


def show(report: Report) -> None:
    """Prints the table and where the files are."""
    print(f"\n{report.text}\n")
    for path in report.files():
        print(path)
