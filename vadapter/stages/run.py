"""A run: what its stages share, which is the mesh, the data sources and the tokenizers."""

import json
from pathlib import Path

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
from vadapter.stages.stage import Sources, Stage, once

TOKENIZER = "tokenizer.json"  # trained by the run; those of public models are in tokenizers/


class Run:
    """A recipe in a run directory."""

    def __init__(self, recipe: Recipe, workdir: Path, stop: Stop | None = None):
        self.recipe, self.workdir = recipe, storage.as_path(workdir)
        self.mesh = make_mesh(recipe.mesh)
        self.source = Sources(recipe)
        self.stop = stop or Stop()
        self._stages: dict[str, Stage] = {}
        self._tokenizers: dict[Path, Tokenizer | UserError] = {}  # an error is raised every time

    def stage(self, name: str) -> Stage:
        """Return a stage of the run; its model is built and its init traced once per run."""
        if name not in self._stages:
            self._stages[name] = Stage(
                self.recipe, name, self.mesh, workdir=self.workdir, source=self.source,
                tokenizer=self.tokenizer(self.recipe.stages[name]), stop=self.stop,
            )  # fmt: skip
        return self._stages[name]

    def tokenizer(self, stage: StageConfig) -> Tokenizer:
        """Return the tokenizer of the stage's language model: that of public weights, or the run's.

        The latter is trained once, by the first host, and then read from the run directory. If it
        cannot be read or trained, every call raises the same UserError.
        """
        path = tokenizer_path(self.recipe, stage, self.workdir)

        def read_or_train() -> Tokenizer:
            tokenizer = read_tokenizer(self.recipe, stage, self.workdir)
            return self._train_tokenizer(path) if tokenizer is None else tokenizer

        what = f"tokenizer {path.name}"
        return once(self._tokenizers, path, lambda: hosts.in_turn(read_or_train, what))

    def _train_tokenizer(self, path: Path) -> Tokenizer:
        # Its configuration first: a tokenizer in the run directory then always has one.
        write_json(_config_path(path), plain(self.recipe.tokenizer))
        sources = {n: self.source(n) for n in dict.fromkeys(self.recipe.tokenizer.data)}
        return train_tokenizer(self.recipe.tokenizer, sources, path)

    def check(self) -> None:
        """Check all stages that are not finished before the first one trains.

        Raises:
          UserError: models do not fit together, data cannot be read, starts are missing: all
            problems of all stages at once. Hosts have different data or tokenizers.
        """
        problems, earlier, checked = Problems(), {}, []
        limit = memory.limit(self.mesh)
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
        """Raise UserError if hosts differ in the data sets or tokenizers of any stage.

        Public weights are compared later, with each stage's identity: their digest takes longer.
        """
        if hosts.count() == 1:
            return  # fingerprints take time
        names = dict.fromkeys(name for stage in stages for name in stage.data())
        facts = {
            "fingerprints": {name: self.source(name).fingerprint() for name in names},
            "tokenizers": {stage.name: stage.tokenizer.digest for stage in stages},
        }
        hosts.require_same(facts, "data or tokenizers")


def read_tokenizer(recipe: Recipe, stage: StageConfig, workdir: Path) -> Tokenizer | None:
    """Return the tokenizer of the stage's language model; None if the run has yet to train it.

    Raises:
      CheckpointError: that of the run directory is of another model or configuration.
      DataError: it cannot be read.
    """
    path = tokenizer_path(recipe, stage, workdir)
    if path != workdir / TOKENIZER:
        from vadapter.data.tokenizers.pretrained import load_tokenizer
        from vadapter.weights.hf_checkpoint import locate

        key, spec = f"components.{stage.lm}.weights", recipe.components[stage.lm]
        weights = spec["weights"]
        tokenizer = load_tokenizer(locate(weights, key, spec.get("part", "")).path)
        if path.exists() and load_tokenizer(path).digest != tokenizer.digest:
            raise CheckpointError(
                f"{path} is not the tokenizer of {key}={weights}: this run was started with "
                "another model. Use another --workdir."
            )
        return tokenizer
    if not path.exists():
        return None
    config, now = _config_path(path), plain(recipe.tokenizer)
    before = json.loads(config.read_text()) if config.is_file() else now
    if diff := differences(before, now, "tokenizer"):
        raise CheckpointError(
            f"{path} was trained with another configuration:\n"
            + difference_table(diff)
            + "\nUse another --workdir, or the previous configuration."
        )
    from vadapter.data.tokenizers.bpe import BPETokenizer

    return BPETokenizer.load(path)


def _config_path(path: Path) -> Path:
    """Return the file with the configuration of a trained tokenizer."""
    return path.with_suffix(".config.json")


def tokenizer_path(recipe: Recipe, stage: StageConfig, workdir: Path) -> Path:
    """Return the file of the stage's tokenizer in the run directory."""
    public = recipe.components.get(stage.lm, {}).get("weights")
    return workdir / "tokenizers" / f"{stage.lm}.json" if public else workdir / TOKENIZER
