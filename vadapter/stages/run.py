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
from vadapter.console import difference_table
from vadapter.data.open import train_tokenizer
from vadapter.data.tokenizers import Tokenizer
from vadapter.distributed import hosts, memory
from vadapter.distributed.mesh import make_mesh
from vadapter.distributed.preemption import Stop
from vadapter.errors import CheckpointError, Problems, UserError
from vadapter.io import storage
from vadapter.io.json_files import write_json
from vadapter.recipe.schema import Recipe, StageConfig
from vadapter.stages import initialization
from vadapter.stages.stage import Sources, Stage

CONFIG = "config.json"
TOKENIZER = (
    "tokenizer.json"  # trained on the run's texts; those of public models lie in tokenizers/
)


class Run:
    """A recipe in a run directory."""

    def __init__(self, recipe: Recipe, workdir: Path, stop: Stop | None = None):
        self.recipe, self.workdir = recipe, storage.as_path(workdir)
        self.mesh = make_mesh(recipe.mesh)
        self.source = Sources(recipe)
        self.stop = stop or Stop()
        self._stages: dict[str, Stage] = {}
        self._tokenizers: dict[Path, Any] = {}  # or what is wrong with one

    def stage(self, name: str) -> Stage:
        """Return a stage of the run; its model is built and its init traced once per run."""
        if name not in self._stages:
            self._stages[name] = Stage(
                self.recipe, name, self.mesh, workdir=self.workdir, source=self.source,
                tokenizer=self.tokenizer(self.recipe.stages[name]), stop=self.stop,
            )  # fmt: skip
        return self._stages[name]

    def tokenizer(self, stage: StageConfig) -> Tokenizer:
        """The tokenizer of the stage's language model: its own if that is public, else the run's.

        The run's is trained once, by the first host, and from then on read from the run directory.
        """
        path = tokenizer_path(self.recipe, stage, self.workdir)
        if path not in self._tokenizers:
            make = lambda: self._tokenizer(stage, path)  # noqa: E731
            try:
                self._tokenizers[path] = hosts.in_turn(make, f"tokenizer {path.name}")
            except UserError as error:
                self._tokenizers[path] = error
        if isinstance(found := self._tokenizers[path], UserError):
            raise found
        return found

    def _tokenizer(self, stage: StageConfig, path: Path) -> Tokenizer:
        tokenizer = read_tokenizer(self.recipe, stage, self.workdir)
        return self._trained(path) if tokenizer is None else tokenizer

    def _trained(self, path: Path) -> Tokenizer:
        write_json(made_how(path), plain(self.recipe.tokenizer))  # first
        sources = {n: self.source(n) for n in dict.fromkeys(self.recipe.tokenizer.data)}
        return train_tokenizer(self.recipe.tokenizer, sources, path)

    def check(self) -> None:
        """Finds what a later stage would stumble over before the first one is paid for.

        Raises:
          UserError: models that do not fit together, data that cannot be read, starts that are not
            there; all of them at once. What several hosts do not have in common.
        """
        problems, earlier = Problems(), {}
        checked, limit = [], memory.limit(self.mesh)
        for name in self.recipe.chain:
            if (self.workdir / name / initialization.DONE).is_file():
                continue
            with problems.gather(name):
                stage = self.stage(name)
                stage.check(earlier, problems, limit)
                checked.append(stage)
        problems.settle()
        self._agree(checked)
        if hosts.first():
            for path, tokenizer in self._tokenizers.items():
                if not path.exists():
                    tokenizer.save(path)

    def _agree(self, stages: list[Stage]) -> None:
        """Refuses hosts whose data sets or tokenizers differ, in whatever stage they are used.

        Public weights are left to each stage's identity: their digest is that of all their bytes.
        """
        if hosts.count() == 1:
            return  # fingerprints take their time
        names = dict.fromkeys(name for stage in stages for name in stage.data())
        facts = {
            "fingerprints": {name: self.source(name).fingerprint() for name in names},
            "tokenizers": {stage.name: stage.tokenizer.digest for stage in stages},
        }
        hosts.require_same(facts, "data or tokenizers")


def record(recipe: Recipe, workdir: Path) -> None:
    """Write what is about to run; call it once that is known to fit what ran before."""
    if hosts.first():
        write_json(workdir / CONFIG, plain(recipe))
        write_json(workdir / "env.json", environment())


def read_tokenizer(recipe: Recipe, stage: StageConfig, workdir: Path) -> Tokenizer | None:
    """The tokenizer of the stage's language model; None: it is yet to be trained on texts.

    Raises:
      CheckpointError: the run directory holds one of another model or another configuration.
      DataError: it cannot be read.
    """
    path = tokenizer_path(recipe, stage, workdir)
    if path != workdir / TOKENIZER:
        from vadapter.data.tokenizers.pretrained import PretrainedTokenizer, load_tokenizer
        from vadapter.weights.hf_checkpoint import locate

        where, weights = f"components.{stage.lm}.weights", recipe.components[stage.lm]["weights"]
        tokenizer = PretrainedTokenizer.load(locate(weights, where).path)
        if path.exists() and load_tokenizer(path).digest != tokenizer.digest:
            raise CheckpointError(
                f"{path} is not the tokenizer of {where}={weights}: this run was made with another "
                "model. Use another --workdir."
            )
        return tokenizer
    if not path.exists():
        return None
    how, now = made_how(path), plain(recipe.tokenizer)
    if diff := differences(json.loads(how.read_text()) if how.is_file() else now, now, "tokenizer"):
        raise CheckpointError(
            f"{path} was made with another configuration:\n"
            + difference_table(diff)
            + "\nUse another --workdir, or the configuration of before."
        )
    from vadapter.data.tokenizers.bpe import BPETokenizer

    return BPETokenizer.load(path)


def made_how(path: Path) -> Path:
    """Where the configuration of a trained tokenizer lies."""
    return path.with_suffix(".config.json")


def tokenizer_path(recipe: Recipe, stage: StageConfig, workdir: Path) -> Path:
    """Where the tokenizer of the stage's language model lies in the run directory."""
    public = recipe.components.get(stage.lm, {}).get("weights")
    return workdir / "tokenizers" / f"{stage.lm}.json" if public else workdir / TOKENIZER


def made_with(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """What the last bits of a result depend on, beside the recipe, its data and its start."""
    return {
        "mesh": dict(mesh.shape),
        "hosts": hosts.count(),
        "device": mesh.devices.flat[0].device_kind,
        "jax": jax.__version__,
    }


def environment() -> dict[str, Any]:
    """Versions, devices and command line, for the record."""
    return {
        "vadapter": __version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "devices": [str(d) for d in jax.devices()],
        "hosts": hosts.count(),
        "command": sys.argv,
    }
