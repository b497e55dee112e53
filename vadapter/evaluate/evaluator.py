"""Held-out losses and evaluations of a stage, while it trains and at its end."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from vadapter.data.pipeline import eval_batches
from vadapter.distributed import hosts
from vadapter.distributed.compile import jit
from vadapter.distributed.mesh import to_mesh, with_mesh
from vadapter.evaluate.image_ablation import image_ablation_scores, make_image_ablation
from vadapter.evaluate.runner import Decoder, evaluate, limited, record_of, save_result
from vadapter.models.coca import CoCa
from vadapter.stages.stage import Stage


class Evaluator:
    """The losses and evaluations of a stage with its frozen parameters, compiled once."""

    def __init__(self, stage: Stage, frozen: dict[str, Any]):
        self.stage, self.frozen = stage, frozen

    @functools.cached_property
    def _decoder(self) -> Decoder:
        return Decoder(self.stage, self._watch)

    @functools.cached_property
    def _ablation(self) -> Callable[..., Any]:
        return jit(with_mesh(self.stage.mesh, make_image_ablation(self.stage.adapter_model)))

    def _batch(self, rows: int) -> int:
        """Return the rows of a batch, so that all evaluations of the stage share one program.

        While it trains, batches have no more rows than items. Where those are at least half of a
        batch, the evaluation at the end takes as many.
        """
        limit = self.stage.config.eval_every and self.stage.config.eval_limit
        return limit if rows / 2 <= limit < rows else rows

    def _watch(self, batches: Iterator[Any]) -> Iterator[Any]:
        return self.stage.stop.watch(batches, self.stage.name, "evaluate")

    def __call__(
        self, trainable: Any, limit: int, directory: Path | None = None
    ) -> dict[str, float]:
        """Return scores by name, `DATA/METRIC` for losses and `EVAL/METRIC` for evaluations.

        Args:
          trainable: the parameters that are trained.
          limit: number of items per evaluation; 0: as the recipe says.
          directory: receives predictions and scores; None: nothing is written.
        """
        stage, config = self.stage, self.stage.config
        if isinstance(stage.model, CoCa):  # contrastive pretraining has no generations to score
            return {}
        params = {**self.frozen, **trainable}
        scores: dict[str, float] = {}
        for name in config.loss:
            items, transform = stage.stream(name, self.frozen)
            batches = eval_batches(
                items, transform, config.batch, host_index=hosts.index(), host_count=hosts.count()
            )
            sums = [
                jax.device_get(self._ablation(params, to_mesh(batch, stage.mesh)))
                for batch, _ in zip(self._watch(batches), range(config.loss_batches), strict=False)
            ]
            scores |= {f"{name}/{k}": v for k, v in image_ablation_scores(sums).items()}
        for name in config.evals:
            spec = limited(stage.recipe.evals[name], limit)
            data = stage.recipe.data[spec.data]
            source = stage.features(spec.data, self.frozen)
            run = dataclasses.replace(spec, batch=self._batch(spec.batch))
            result = evaluate(self._decoder, params, source, data, run, stage.view)
            scores |= {f"{name}/{k}": v for k, v in result.scores.items()}
            if directory is not None and hosts.first():
                record = record_of(source, data, spec, result)
                save_result(directory / name, result, **record)
        return scores
