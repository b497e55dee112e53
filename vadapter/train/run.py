"""What the stages of a run share: mesh, data sources, tokenizer, and the record of what runs."""

import json
import platform
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vadapter import __version__
from vadapter.config import differences, plain
from vadapter.data.tokenizer import Tokenizer
from vadapter.errors import CheckpointError, ConfigError
from vadapter.parallel.mesh import make_mesh
from vadapter.train import handover
from vadapter.train.inputs import make_source, train_tokenizer
from vadapter.train.recipe import Recipe, StageConfig, make_model
from vadapter.train.writer import write_json

CONFIG = "config.json"


class Run:
    """A recipe in a run directory."""

    def __init__(self, recipe: Recipe, workdir: Path):
        self.recipe, self.workdir = recipe, Path(workdir)
        self.mesh = make_mesh(recipe.mesh)
        self._sources: dict[str, Any] = {}
        self._check_tokenizer()
        names = dict.fromkeys(recipe.tokenizer.data)
        sources = {n: self.source(n) for n in names} if not self._tokenizer_path.exists() else {}
        self.tokenizer: Tokenizer = train_tokenizer(recipe.tokenizer, sources, self._tokenizer_path)

    @property
    def _tokenizer_path(self) -> Path:
        return self.workdir / "tokenizer.json"

    def _check_tokenizer(self) -> None:
        """A tokenizer that is there already was made as the recipe says."""
        config = self.workdir / CONFIG
        if not (config.is_file() and self._tokenizer_path.is_file()):
            return
        before = json.loads(config.read_text()).get("tokenizer")
        if diff := differences(before, plain(self.recipe.tokenizer), "tokenizer"):
            raise CheckpointError(
                f"{self._tokenizer_path} was made with another configuration:\n"
                + diff_table(diff)
                + "\nUse another --workdir, or the configuration of before."
            )

    def check(self) -> None:
        """Finds what a later stage would stumble over before the first one is paid for.

        Raises:
          UserError: models that do not fit together, data that cannot be read, starts that are not
            there.
        """
        for name in self.recipe.chain:
            stage = self.recipe.stages[name]
            if (self.workdir / name / handover.DONE).is_file():
                continue
            make_model(self.recipe, stage, self.tokenizer.vocab_size)
            check_batch_size(name, stage, self.mesh.size)
            evaluated = [self.recipe.evals[e].data for e in stage.evals]
            for data in (*stage.data, *stage.loss, *evaluated):
                self.source(data)
            handover.check_sources(self.recipe, name, self.workdir)

    def record(self) -> None:
        """Writes what is about to run; not before it is known to fit what ran before."""
        write_json(self.workdir / CONFIG, plain(self.recipe))
        write_json(self.workdir / "env.json", environment())

    def source(self, name: str) -> Any:
        """The data set's source, made once."""
        if name not in self._sources:
            self._sources[name] = make_source(name, self.recipe.data[name])
        return self._sources[name]


def check_batch_size(name: str, stage: StageConfig, devices: int) -> None:
    """The rows of every micro-batch divide over the devices.

    Raises:
      ConfigError: they do not.
    """
    if stage.batch % (stage.accumulate * devices):
        raise ConfigError(
            f"stages.{name}.batch={stage.batch} does not divide over {devices} devices times "
            f"accumulate={stage.accumulate}; make it a multiple of {stage.accumulate * devices}"
        )


def diff_table(rows: list[tuple[str, Any, Any]], limit: int = 12) -> str:
    """Differences as lines `key | there | here`."""
    lines = [f"  {'key':<40} | there | here"]
    lines += [f"  {key:<40} | {there} | {here}" for key, there, here in rows[:limit]]
    return "\n".join(lines + ([f"  … {len(rows) - limit} more"] if len(rows) > limit else []))


def environment() -> dict[str, Any]:
    """Versions, devices and command line, for the record."""
    return {
        "vadapter": __version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "devices": [str(d) for d in jax.devices()],
        "command": sys.argv,
    }
