"""What must be equal in the arms of a comparison, and the difference where it is not.

What may differ: the components between encoder and LLM, their starts, the optimizer, the steps, the
stages before (the paper's stage 1), the seed, and whether images are blank (blind controls).
"""

import json
from collections.abc import Collection, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from vadapter.config import differences, digest, plain
from vadapter.console import difference_table
from vadapter.data.config import DataConfig
from vadapter.errors import ConfigError
from vadapter.recipe.schema import Recipe, StageConfig, measured_data
from vadapter.stages.initialization import finished
from vadapter.stages.stage import Stage

Facts = dict[str, Any]  # sections `data`, `protocol` and `frozen`
FREE = ("cache_dir", "blank")  # keys of a data set that may differ


def planned_facts(recipe: Recipe, name: str) -> Facts:
    """Return what must be equal in all arms, from the recipe of one that may not be trained yet."""
    stage = recipe.stages[name]
    weights = recipe.components[stage.lm].get("weights")
    return {
        "data": _batches(stage)
        | {
            "sets": {n: _data(recipe.data[n]) for n in stage.data},
            "seed": recipe.seed,
        },
        "protocol": protocol(recipe, name, source=True),
        "frozen": {
            "dtype": recipe.dtype,
            "tokenizer": {} if weights else plain(recipe.tokenizer),
            **{
                n: {"component": _component(recipe.components[n]), "start": stage.start.get(n, "")}
                for n in (stage.encoder, stage.lm)
            },
        },
    }


def trained_facts(recipe: Recipe, workdir: Path, name: str, test: Collection[str]) -> Facts:
    """Return what must be equal in all arms, from a finished stage; data and weights by content.

    `test` are the evaluations that were run on it.

    Raises:
      CheckpointError: the stage is not finished.
    """
    stage = recipe.stages[name]
    record = finished(workdir / name)
    identity = Stage.upgrade_identity(record["identity"])
    config = {key: identity["config"][key] for key in ("data", "batch")}
    sets = {n: _without(data, *FREE, "source") for n, data in identity["data"].items()}
    scored = {n: facts for n in test if (facts := _scored(workdir / name, n))}
    content = measured_content(recipe, workdir / name, record)
    return {
        "data": config | {"sets": sets, "content": identity["fingerprints"]},
        "protocol": protocol(recipe, name) | {"content": content, "scored": scored},
        "frozen": {
            "dtype": identity["dtype"],
            "tokenizer": identity["tokenizer"],
            **{
                n: {
                    "component": _component(identity["components"][n]),
                    "content": identity["start"][n],
                }
                for n in (stage.encoder, stage.lm)
            },
        },
    }


def protocol(recipe: Recipe, name: str, *, source: bool = False) -> dict[str, Any]:
    """Return what the losses and evaluations of a stage depend on; `source`: also the sources."""
    stage = recipe.stages[name]
    drop = FREE if source else (*FREE, "source")
    evals = {n: _without(plain(recipe.evals[n]), "batch") for n in stage.evals}
    names = measured_data(recipe, stage)
    return {
        "losses": sorted(stage.loss),
        "loss_batches": stage.loss_batches,
        "eval_limit": stage.eval_limit,
        "evals": evals,
        "sets": {n: _without(plain(recipe.data[n]), *drop) for n in names},
    }


def measured_content(recipe: Recipe, directory: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """Return fingerprints of the data sets that a stage measured losses and scores on.

    Args:
      directory: of the stage.
      record: what done.json or a checkpoint says of it. Earlier versions recorded what evaluations
        were run on alone, in their score files.
    """
    if "measured" in record:
        return dict(record["measured"])
    evals = recipe.stages[directory.name].evals
    scored = {recipe.evals[n].data: _scored(directory, n) or {} for n in evals}
    return {name: facts["data"] for name, facts in scored.items() if "data" in facts}


def digests(facts: Facts) -> dict[str, str]:
    """Return the SHA-256 of each section."""
    return {section: digest(values) for section, values in facts.items()}


def require_equal(arms: Mapping[str, Facts]) -> None:
    """Raise ConfigError, with a table of the differences, unless all arms have the same facts.

    What was measured on which content counts as far as both of two arms have recorded it.
    """
    for (first, facts), (name, other) in combinations(arms.items(), 2):
        if rows := differences(_recorded_in(other, facts), _recorded_in(facts, other)):
            raise ConfigError(
                f"{first} and {name} cannot be compared: they differ in more than the connector\n"
                + difference_table(rows, ("key", first, name))
                + "\nTrain both with the same data, evaluations and frozen components."
            )


def _recorded_in(other: Facts, facts: Facts) -> Facts:
    """Return facts without the recorded measurements that `other` has no record of."""
    known, measured = other["protocol"], dict(facts["protocol"])
    for key in ("content", "scored"):
        if key in measured:
            measured[key] = {n: x for n, x in measured[key].items() if n in known.get(key, {})}
    return facts | {"protocol": measured}


def _batches(stage: StageConfig) -> dict[str, Any]:
    return {"data": plain(stage.data), "batch": stage.batch}


def _data(data: DataConfig) -> dict[str, Any]:
    return _without(plain(data), *FREE)


def _component(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a component without what changes memory and time alone."""
    return _without(plain(spec), "remat")


def _without(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def _scored(directory: Path, name: str) -> dict[str, Any] | None:
    """Return the protocol that an evaluation of a stage was run with; None if it records none."""
    path = directory / "eval" / name / "score.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("protocol")
    except (ValueError, AttributeError):  # a torn copy; the evaluation is run again
        return None
