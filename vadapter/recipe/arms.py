"""Arms of a recipe: its adapter stages, each with the earlier stages that belong to it alone."""

from vadapter.recipe.schema import Recipe

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
