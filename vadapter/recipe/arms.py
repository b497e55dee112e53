"""Arms of a recipe: its adapter stages, each with the earlier stages that belong to it alone."""

import dataclasses

from vadapter.recipe.schema import Recipe, components, used_data

PART_KINDS = ("lm", "vision")  # stages that train what all arms share


def earlier_stages(recipe: Recipe, name: str) -> tuple[str, ...]:
    """Return the stages of the run that a stage starts from, directly or not, in their order.

    Those of `PART_KINDS` are left out: of the paper's stage 2, it is stage 1.
    """
    found, pending = set[str](), [name]
    while pending:
        sources = set(recipe.stages[pending.pop()].start.values()) & set(recipe.chain)
        new = {s for s in sources - found if recipe.stages[s].kind not in PART_KINDS}
        found |= new
        pending += new
    return tuple(stage for stage in recipe.chain if stage in found)


def only(recipe: Recipe, chain: tuple[str, ...]) -> Recipe:
    """Return the recipe of some stages, with the components, data and evaluations that they use."""
    stages = {name: recipe.stages[name] for name in chain}
    parts = {part for stage in stages.values() for part in components(stage)}
    data = {name for stage in stages.values() for name in used_data(recipe, stage)}
    data |= set(recipe.tokenizer.data)
    evals = {name for stage in stages.values() for name in stage.evals}
    return dataclasses.replace(
        recipe, chain=chain, stages=stages,
        components={n: spec for n, spec in recipe.components.items() if n in parts},
        data={n: rows for n, rows in recipe.data.items() if n in data},
        evals={n: spec for n, spec in recipe.evals.items() if n in evals},
    )  # fmt: skip
