"""The nearest setting that fits, where the one asked for does not."""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator

from vadapter.distributed.topology import Topology, larger
from vadapter.errors import ConfigError
from vadapter.plan.plan import Plan, Setting, with_field
from vadapter.recipe.schema import Recipe, trained

Try = Callable[[Setting], Plan]
MORE = 3  # larger topologies that are tried
SPLITS = (4, 8)  # chips that weights are split over where whole ones do not fit
SURELY = 2  # a guess of so many times the memory is not tried


def search(
    recipe: Recipe, name: str, setting: Setting, planned: Plan, attempt: Try,
    say: Callable[[str], object] = lambda line: None,
) -> tuple[Setting, Plan] | None:  # fmt: skip
    """The first setting that fits: rematerialization, weights that are split, more chips, int8 with
    all these chips or those asked for, and last a smaller batch.

    Args:
      planned: at `setting`; attempt: plans another one.
      say: is told what is tried.

    Returns:
      The setting and its plan; None if nothing fits.
    """
    for change in easier(recipe, name, setting, planned):
        say(f"does not fit; trying {described(recipe, name, setting, change)}")
        try:
            found = attempt(change)
        except ConfigError as error:  # the batch does not divide over these chips, say
            say(str(error))
            continue
        if found.fits:
            return change, found
    return None


def smallest(
    recipe: Recipe, name: str, setting: Setting, attempt: Try, guess: Callable[[Setting], int],
    say: Callable[[str], object] = lambda line: None, most: int | None = None,
) -> tuple[Setting, Plan]:  # fmt: skip
    """The smallest slice that the stage fits as it is, its weights whole or else split.

    Args:
      setting: with the smallest slice there is.
      attempt: plans a setting; guess: about its peak, at once.
      say: is told what is tried.
      most: chips that are tried; None: as many as a step has rows.

    Raises:
      ConfigError: there is none.
    """
    stage, own = recipe.stages[name], recipe.mesh
    rows = (setting.batch or stage.batch) // stage.accumulate
    topology: Topology | None = setting.topology
    while topology is not None and topology.chips <= min(rows, most or rows):
        for fsdp in (0, *(n for n in SPLITS if n > own.fsdp)):
            change = dataclasses.replace(setting, topology=topology, fsdp=fsdp)
            whole = topology.chips % ((fsdp or own.fsdp) * own.tensor) == 0 == rows % topology.chips
            if not whole or guess(change) > SURELY * topology.row.hbm:
                continue
            say(f"trying {topology}" + (f", weights split over {fsdp} chips" if fsdp else ""))
            found = attempt(change)
            if found.fits:
                return change, found
        topology = larger(topology)
    raise ConfigError(f"stage {name} fits no {setting.topology.chip}, with whole weights or split")


def easier(recipe: Recipe, name: str, setting: Setting, planned: Plan) -> Iterator[Setting]:
    """Settings that need less and less memory a chip."""
    now, parts = setting, recipe.stages[name].accumulate
    kinds = set(planned.remat.values()) if planned.train.arguments < planned.train.limit else set()
    for remat, more in (("names", {"none"}), ("full", {"none", "dots", "names"})):
        if kinds & more:  # and what stays leaves room
            now = dataclasses.replace(now, remat=remat)
            yield now
    able = planned.chips // setting.topology.slices // planned.mesh["tensor"]
    for fsdp in sorted({min(8, able), able}):
        if fsdp > planned.mesh["fsdp"]:
            now = dataclasses.replace(now, fsdp=fsdp)
            yield now
    topology = larger(setting.topology)
    for _ in range(MORE):
        if topology is None or planned.batch % (topology.chips * parts):
            break
        yield dataclasses.replace(now, topology=topology)
        topology = larger(topology)
    lm = recipe.stages[name].lm
    if (
        lm in with_field(recipe, name, "int8")
        and lm not in trained(recipe.stages[name])
        and lm not in planned.int8
        and importlib.util.find_spec("qwix")
    ):
        now = dataclasses.replace(now, int8=True)
        yield now
    batch = planned.batch // 2
    while batch and batch % (planned.chips * parts) == 0:
        yield dataclasses.replace(now, batch=batch)
        batch //= 2


def described(recipe: Recipe, name: str, old: Setting, new: Setting) -> str:
    """What differs, as one writes it on the command line, for `vadapter train` as well."""
    changed = lambda key: getattr(old, key) != getattr(new, key)  # noqa: E731
    words = [f"--topology={new.topology}"] * changed("topology")
    values = {}
    if changed("remat"):
        values |= {f"components.{n}.remat": new.remat for n in with_field(recipe, name, "remat")}
    if changed("fsdp"):
        values |= {"mesh.fsdp": new.fsdp, "mesh.data": -1}
    if changed("int8"):
        values[f"components.{recipe.stages[name].lm}.int8"] = True
    if changed("batch"):
        values[f"stages.{name}.batch"] = new.batch
    return " ".join([*words, *(f"--config.{key}={value}" for key, value in values.items())])
