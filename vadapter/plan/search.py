"""Search for a setting that fits: the closest to a requested one, or the smallest slice."""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator

from vadapter.distributed.topology import Topology, larger
from vadapter.errors import ConfigError
from vadapter.plan.estimate import Plan, Setting, with_field
from vadapter.recipe.schema import Recipe, trained

Attempt = Callable[[Setting], Plan]
Report = Callable[[str], object]
LARGER = 3  # larger topologies to try
SHARDS = (4, 8)  # chips to shard the parameters over if they do not fit replicated
HOPELESS = 2  # a setting is skipped if its estimated peak is this many times the memory


def search(
    recipe: Recipe,
    name: str,
    setting: Setting,
    planned: Plan,
    attempt: Attempt,
    report: Report = lambda line: None,
) -> tuple[Setting, Plan] | None:
    """Return the first setting that is `easier` than one that does not fit, and its plan.

    Args:
      setting, planned: the setting that does not fit, and its plan.
      attempt: plans a setting.
      report: called with a line for each attempt.

    Returns:
      None if no setting fits.
    """
    for change in easier(recipe, name, setting, planned):
        report(f"does not fit; trying {overrides(recipe, name, setting, change)}")
        try:
            plan = attempt(change)
        except ConfigError as error:  # the batch is not divisible by this number of chips
            report(str(error))
            continue
        if plan.fits:
            return change, plan
    return None


def smallest(
    recipe: Recipe,
    name: str,
    setting: Setting,
    attempt: Attempt,
    estimate: Callable[[Setting], int],
    report: Report = lambda line: None,
    limit: int | None = None,
) -> tuple[Setting, Plan]:
    """Return the smallest slice on which the stage fits, with replicated or sharded parameters.

    Args:
      setting: the setting with the generation's smallest slice.
      attempt: plans a setting.
      estimate: estimates the peak of a setting, in less time.
      report: called with a line for each attempt.
      limit: largest number of chips to try; None: the rows of a micro-batch.

    Raises:
      ConfigError: the stage fits no slice.
    """
    stage, mesh = recipe.stages[name], recipe.mesh
    rows = (setting.batch or stage.batch) // stage.accumulate
    topology: Topology | None = setting.topology
    while topology is not None and topology.chips <= min(rows, limit or rows):
        chips = topology.chips
        for fsdp in (0, *(n for n in SHARDS if n > mesh.fsdp)):
            change = dataclasses.replace(setting, topology=topology, fsdp=fsdp)
            if chips % ((fsdp or mesh.fsdp) * mesh.tensor) or rows % chips:
                continue
            if estimate(change) > HOPELESS * topology.row.hbm:
                continue
            sharded = f", parameters sharded over {fsdp} chips" if fsdp else ""
            report(f"trying {topology}{sharded}")
            plan = attempt(change)
            if plan.fits:
                return change, plan
        topology = larger(topology)
    raise ConfigError(
        f"stage {name} fits no {setting.topology.chip} slice, with replicated or sharded parameters"
    )


def easier(recipe: Recipe, name: str, setting: Setting, planned: Plan) -> Iterator[Setting]:
    """Yield settings that need less and less memory per chip, those with the least cost first.

    Rematerialization, sharded parameters, more chips, int8, and last a smaller batch.
    """
    stage, topology = recipe.stages[name], setting.topology
    kinds = set(planned.remat.values())
    for remat, lighter in (("names", {"none"}), ("full", {"none", "dots", "names"})):
        # Rematerialization helps only if the arguments leave room.
        if kinds & lighter and planned.train.arguments < planned.train.limit:
            setting = dataclasses.replace(setting, remat=remat)
            yield setting
    shards = planned.chips // topology.slices // planned.mesh["tensor"]
    for fsdp in sorted({min(8, shards), shards}):
        if fsdp > planned.mesh["fsdp"]:
            setting = dataclasses.replace(setting, fsdp=fsdp)
            yield setting
    for _ in range(LARGER):
        topology = larger(topology)
        if topology is None or planned.batch % (topology.chips * stage.accumulate):
            break
        yield dataclasses.replace(setting, topology=topology)
    if (
        stage.lm in with_field(recipe, name, "int8")
        and stage.lm not in (*trained(stage), *planned.int8)
        and importlib.util.find_spec("qwix")
    ):
        setting = dataclasses.replace(setting, int8=True)
        yield setting
    batch = planned.batch // 2
    while batch and batch % (planned.chips * stage.accumulate) == 0:
        yield dataclasses.replace(setting, batch=batch)
        batch //= 2


def overrides(recipe: Recipe, name: str, old: Setting, new: Setting) -> str:
    """Return the command-line options that change one setting into another."""
    values = {}
    if new.remat != old.remat:
        values |= {f"components.{n}.remat": new.remat for n in with_field(recipe, name, "remat")}
    if new.fsdp != old.fsdp:
        values |= {"mesh.fsdp": new.fsdp, "mesh.data": -1}
    if new.int8 != old.int8:
        values[f"components.{recipe.stages[name].lm}.int8"] = True
    if new.batch != old.batch:
        values[f"stages.{name}.batch"] = new.batch
    options = [f"--topology={new.topology}"] if new.topology != old.topology else []
    return " ".join(options + [f"--config.{key}={value}" for key, value in values.items()])
