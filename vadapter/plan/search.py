"""Search for a setting that fits: the closest to a requested one, or the smallest slice."""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator

from vadapter.distributed.topology import Topology, larger
from vadapter.errors import ConfigError
from vadapter.plan.estimate import Plan, Setting, with_field
from vadapter.recipe.schema import Recipe, trained

LARGER = 3  # larger topologies to try
SHARDS = (4, 8)  # chips to shard the parameters over if they do not fit replicated
HOPELESS = 2  # a setting is skipped if its estimated peak is this many times the memory


@dataclasses.dataclass(frozen=True)
class Search:
    """Search for a setting of the stage `name` that fits.

    `attempt` plans a setting, and `report` is called with a line for each attempt.
    """

    recipe: Recipe
    name: str
    attempt: Callable[[Setting], Plan]
    report: Callable[[str], object] = lambda line: None

    def closest(self, setting: Setting, planned: Plan) -> tuple[Setting, Plan] | None:
        """Return the first setting that is `easier` than one that does not fit, and its plan."""
        for change in self.easier(setting, planned):
            self.report(f"does not fit; trying {self.overrides(setting, change)}")
            try:
                plan = self.attempt(change)
            except ConfigError as error:  # the batch is not divisible by this number of chips
                self.report(str(error))
                continue
            if plan.fits:
                return change, plan
        return None

    def smallest(
        self, setting: Setting, estimate: Callable[[Setting], int], limit: int | None = None
    ) -> tuple[Setting, Plan]:
        """Return the smallest slice on which the stage fits, with replicated or sharded parameters.

        Args:
          setting: the setting with the generation's smallest slice.
          estimate: estimates the peak of a setting, in less time than `attempt`.
          limit: largest number of chips to try; None: the rows of a micro-batch.

        Raises:
          ConfigError: the stage fits no slice.
        """
        stage, mesh = self.recipe.stages[self.name], self.recipe.mesh
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
                self.report(f"trying {topology}{sharded}")
                if (plan := self.attempt(change)).fits:
                    return change, plan
            topology = larger(topology)
        raise ConfigError(
            f"stage {self.name} fits no {setting.topology.chip} slice, with replicated or sharded "
            "parameters"
        )

    def easier(self, setting: Setting, planned: Plan) -> Iterator[Setting]:
        """Yield settings that need less and less memory per chip, those with the least cost first.

        Rematerialization, sharded parameters, more chips, int8, and last a smaller batch.
        """
        stage, topology = self.recipe.stages[self.name], setting.topology
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
        quantizable = stage.lm in with_field(self.recipe, self.name, "int8")
        settled = stage.lm in (*trained(stage), *planned.integers)
        if quantizable and not settled and importlib.util.find_spec("qwix"):
            setting = dataclasses.replace(setting, int8=True)
            yield setting
        batch = planned.batch // 2
        while batch and batch % (planned.chips * stage.accumulate) == 0:
            yield dataclasses.replace(setting, batch=batch)
            batch //= 2

    def overrides(self, old: Setting, new: Setting) -> str:
        """Return the command-line options that change one setting into another."""
        values = {}
        if new.remat != old.remat:
            parts = with_field(self.recipe, self.name, "remat")
            values |= {f"components.{part}.remat": new.remat for part in parts}
        if new.fsdp != old.fsdp:
            values |= {"mesh.fsdp": new.fsdp, "mesh.data": -1}
        if new.int8 != old.int8:
            values[f"components.{self.recipe.stages[self.name].lm}.int8"] = True
        if new.batch != old.batch:
            values[f"stages.{self.name}.batch"] = new.batch
        options = [f"--topology={new.topology}"] if new.topology != old.topology else []
        return " ".join(options + [f"--config.{key}={value}" for key, value in values.items()])
