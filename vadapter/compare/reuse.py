"""Stages that runs of an arm have in common: trained once per seed, then copied.

The runs of an arm with one seed differ in the learning rate of their last stage alone. The stages
before it (the paper's stage 1) would end in the same bits in each of them.
"""

from collections.abc import Sequence
from pathlib import Path

from vadapter.checkpoints.component_store import ComponentStore
from vadapter.compare.plan import PlannedRun
from vadapter.io import storage
from vadapter.stages.initialization import DONE, STORE, finished
from vadapter.stages.run import tokenizer_path


def reuse_stages(run: PlannedRun, others: Sequence[PlannedRun]) -> None:
    """Copy stages before the last from another run of the arm with the same seed.

    A stage that has begun here is left alone. Does nothing in a bucket, where a copy may be torn.
    """
    if storage.remote(run.workdir):
        return
    for stage in run.trained.prior:
        if (run.workdir / stage).exists():
            continue
        for other in others:
            if (other.workdir / stage / DONE).is_file():
                _copy_tokenizer(run, other, stage)
                _copy(other.workdir, run.workdir, stage)
                break


def _copy_tokenizer(run: PlannedRun, other: PlannedRun, stage: str) -> None:
    """Copy that of the stage's language model, which the last stage need not have."""
    one, own = (tokenizer_path(r.recipe, r.recipe.stages[stage], r.workdir) for r in (other, run))
    if one.is_file() and not own.exists():
        storage.write_bytes(own, one.read_bytes())


def _copy(source: Path, target: Path, stage: str) -> None:
    """Copy a finished stage; its directory comes last, at once, when what it needs is there."""
    for name, digest in finished(source / stage)["components"].items():
        one, other = (ComponentStore(root / STORE).path(name, digest) for root in (source, target))
        if not storage.committed(other):
            storage.copy_tree(one, other)
    storage.copy_tree(source / stage, target / stage)
