"""The losses and evaluations of a stage, while it trains, at its end, and once it is restored."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from vadapter.config import plain
from vadapter.data.config import DataConfig
from vadapter.data.example import Source
from vadapter.data.media.images import ImageTransform
from vadapter.data.pipeline import eval_batches
from vadapter.data.tokenizers import Tokenizer
from vadapter.distributed import hosts
from vadapter.distributed.compile import jit
from vadapter.distributed.mesh import to_mesh, with_mesh
from vadapter.evaluate.image_ablation import image_ablation_scores, make_image_ablation
from vadapter.evaluate.partial_results import PartialResults
from vadapter.evaluate.runner import Decoder, evaluate
from vadapter.io import storage
from vadapter.io.json_files import write_json
from vadapter.metrics.scoring import Result
from vadapter.models.coca import CoCa
from vadapter.recipe.schema import EvalConfig
from vadapter.stages.stage import Stage


class Evaluator:
    """The stage's losses and evaluations, compiled once."""

    def __init__(self, stage: Stage, frozen: dict[str, Any]):
        self.stage, self.frozen = stage, frozen
        if not isinstance(stage.model, CoCa):
            self.decoder = _Watched(stage.model, stage.tokenizer, stage.mesh, self._watch)
            self.control = jit(with_mesh(stage.mesh, make_image_ablation(stage.model)))

    def _watch(self, batches: Iterator[Any]) -> Iterator[Any]:
        return self.stage.stop.watch(batches, self.stage.name, "evaluate")

    def __call__(
        self, trainable: Any, limit: int, directory: Path | None = None
    ) -> dict[str, float]:
        """Scores by name, `<data set>/<metric>`; predictions go to `directory` if given."""
        stage, c = self.stage, self.stage.config
        if isinstance(stage.model, CoCa):
            return {}
        params = {**self.frozen, **trainable}
        scores: dict[str, float] = {}
        for name in c.loss:
            items, transform = stage.stream(name, self.frozen)
            batches = self._watch(
                eval_batches(
                    items, transform, c.batch, host_index=hosts.index(), host_count=hosts.count()
                )
            )
            sums = [
                jax.device_get(self.control(params, to_mesh(b, stage.mesh)))
                for b, _ in zip(batches, range(c.loss_batches), strict=False)
            ]
            scores |= {f"{name}/{k}": v for k, v in image_ablation_scores(sums).items()}
        for name in c.evals:
            spec = stage.recipe.evals[name]
            spec = dataclasses.replace(spec, limit=_least(limit, spec.limit))
            config = stage.recipe.data[spec.data]
            source = stage.run.source(spec.data)
            if config.cache:
                source = stage.features(spec.data, self.frozen)
            result = score(self.decoder, params, source, config, spec, stage.view)
            scores |= {f"{name}/{k}": v for k, v in result.scores.items()}
            if directory is not None and hosts.first():
                save_result(directory / name, result, eval=plain(spec))
        return scores


class _Watched(Decoder):
    """A decoder that a signal stops between two batches."""

    def __init__(self, model: Any, tokenizer: Tokenizer, mesh: Any, watch: Callable[[Any], Any]):
        super().__init__(model, tokenizer, mesh)
        self._watch = watch

    def batches(self, params: Any, batches: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """As in `Decoder`."""
        return super().batches(params, self._watch(batches), *args, **kwargs)


def score(
    decoder: Decoder,
    params: Any,
    source: Source,
    data: DataConfig,
    spec: EvalConfig,
    view: ImageTransform | None,
    part: PartialResults | None = None,
    title: str = "",
) -> Result:
    """Runs one evaluation over a source, `spec.limit` examples of it.

    Args:
      data: how the source's examples become rows.
      view: the encoder's.
      part, title: see `runner.predict`.
    """
    return evaluate(
        decoder, params, source, task=data.task, how=spec.decode, batch=spec.batch,
        limit=spec.limit, view=data.view(view), part=part, title=title,
        frames=data.frames if source.kind == "clip" else 1,
    )  # fmt: skip


def _least(*limits: int) -> int:
    return min((n for n in limits if n), default=0)


def save_result(directory: Path, result: Result, **record: Any) -> None:
    """Writes predictions.jsonl, and score.json with the scores and a record of what they are of."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result.rows)
    storage.write_bytes(directory / "predictions.jsonl", text.encode())
    write_json(directory / "score.json", {"scores": result.scores, **record})
