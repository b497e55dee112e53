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
from vadapter.data.pretrained_tokenizer import PretrainedTokenizer, load_tokenizer
from vadapter.data.tokenizer import Tokenizer
from vadapter.errors import CheckpointError, ConfigError, UserError
from vadapter.parallel.mesh import make_mesh
from vadapter.train import handover
from vadapter.train.inputs import make_source, train_tokenizer
from vadapter.train.recipe import Recipe, StageConfig, make_model
from vadapter.train.shapes import abstract_params
from vadapter.train.writer import write_json
from vadapter.weights.public import locate

CONFIG = "config.json"
TOKENIZER = (
    "tokenizer.json"  # trained on the run's texts; those of public models lie in tokenizers/
)


class Run:
    """A recipe in a run directory."""

    def __init__(self, recipe: Recipe, workdir: Path):
        self.recipe, self.workdir = recipe, Path(workdir)
        self.mesh = make_mesh(recipe.mesh)
        self._sources: dict[str, Any] = {}
        self._tokenizers: dict[Path, Any] = {}

    def tokenizer(self, stage: StageConfig) -> Any:
        """The tokenizer of the stage's language model: its own if that is public, else the run's.

        Either is made once, and from then on read from the run directory.
        """
        path = tokenizer_path(self.recipe, stage, self.workdir)
        if path not in self._tokenizers:
            own = path != self.workdir / TOKENIZER
            self._tokenizers[path] = self._public(path, stage.lm) if own else self._trained(path)
        return self._tokenizers[path]

    def _public(self, path: Path, component: str) -> PretrainedTokenizer:
        where = f"components.{component}.weights"
        weights = self.recipe.components[component]["weights"]
        tokenizer = PretrainedTokenizer.load(locate(weights, where).path)
        if not path.exists():
            tokenizer.save(path)
        elif load_tokenizer(path).digest != tokenizer.digest:
            raise CheckpointError(
                f"{path} is not the tokenizer of {where}={weights}: this run was made with another "
                "model. Use another --workdir."
            )
        return tokenizer

    def _trained(self, path: Path) -> Tokenizer:
        made = path.with_suffix(".config.json")  # how, written first
        if path.exists():
            self._check_tokenizer(path, made)
        else:
            write_json(made, plain(self.recipe.tokenizer))
        names = dict.fromkeys(self.recipe.tokenizer.data)
        sources = {} if path.exists() else {n: self.source(n) for n in names}
        return train_tokenizer(self.recipe.tokenizer, sources, path)

    def _check_tokenizer(self, path: Path, made: Path) -> None:
        """A tokenizer that is there already was made as the recipe says."""
        before = json.loads(made.read_text()) if made.is_file() else plain(self.recipe.tokenizer)
        if diff := differences(before, plain(self.recipe.tokenizer), "tokenizer"):
            raise CheckpointError(
                f"{path} was made with another configuration:\n"
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
            model = make_model(self.recipe, stage, self.tokenizer(stage).vocab_size)
            try:
                abstract_params(model, self.mesh)
            except UserError:
                raise
            except Exception as error:  # sizes that do not go together, wherever that shows
                reason = " ".join(str(error).split())
                raise ConfigError(f"stages.{name}: its model cannot be built: {reason}") from error
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


def tokenizer_path(recipe: Recipe, stage: StageConfig, workdir: Path) -> Path:
    """Where the tokenizer of the stage's language model lies in the run directory."""
    public = recipe.components.get(stage.lm, {}).get("weights")
    return workdir / "tokenizers" / f"{stage.lm}.json" if public else workdir / TOKENIZER


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
