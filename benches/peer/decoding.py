"""Greedy decoding of a stage with random parameters: our side of every row that decodes.

As an evaluation of 5,000 images does it: that decides whether layers are unrolled on a CPU.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benches.peer.case import Case
from benches.peer.measure import timed
from vadapter.data.batch import EOS
from vadapter.distributed.compile import jit
from vadapter.models import layered
from vadapter.models.decoding import Decode
from vadapter.models.generate import decode
from vadapter.recipe.schema import DTYPES
from vadapter.stages.abstract_state import in_compute_dtype
from vadapter.stages.stage import Stage

NEW = 32  # tokens of each row
IMAGES = 5000  # that an evaluation is assumed to have
# What makes a language model of a recipe one that transformers has a class for.
LLAMA = ("components.llm.parallel=false", "components.llm.embed_scale=false")
_READ = ("frames", "features", "prompt", "tokens", "segments", "positions")


class OurDecoding:
    """Compiled decoding; a call returns the new tokens i32[B, NEW], never ended before.

    Attributes:
      rows: what is continued, on the host.
      params: of all components, frozen and trained alike in the dtype of the computation.
      compile_seconds: of CPU.
    """

    def __init__(self, case: Case, batch: int, overrides: Sequence[str] = ()):
        self.stage: Stage = case.open(overrides)
        self.rows = _rows(case, self.stage, batch)
        shapes = in_compute_dtype(self.stage.abstract, DTYPES[self.stage.recipe.dtype])
        self.params = case.decoding_parameters(self.stage, shapes)
        self._arrays = jax.device_put(self.rows)
        cpu, model = jax.default_backend() == "cpu", self.stage.adapter_model
        self._params = _for_cpu(self.params, model.lm, -(-IMAGES // batch)) if cpu else self.params
        run = functools.partial(
            decode, model, how=Decode(NEW, min_new=NEW + 1), stop=(EOS,), float32=cpu
        )
        unrolled = layered.is_layered(self._params[model.lm])
        lowered = jit(run, "layered" if unrolled else "").lower(self._params, self._arrays)
        self._run, self.compile_seconds = timed(lowered.compile)

    def __call__(self) -> np.ndarray:
        return np.asarray(self._run(self._params, self._arrays)["tokens"])


def _for_cpu(params: dict[str, Any], lm: str, batches: int) -> dict[str, Any]:
    """Return the parameters as `evaluate.runner` decodes so many batches on a CPU."""
    params = layered.in_float32(params)
    if layered.pays(params[lm], batches * NEW):
        params[lm] = layered.layered(params[lm])
    return params


def _rows(case: Case, stage: Stage, batch: int) -> dict[str, np.ndarray]:
    """Return what is continued: an image and one token, or as much text as the recipe's rows."""
    made: Any = case.batch(stage, batch)
    count = 1 if stage.model.encoder else made["tokens"].shape[1]
    random = np.random.default_rng(0)
    made["tokens"] = random.integers(3, stage.vocab_size, (batch, count)).astype(np.int32)
    made["segments"] = np.ones((batch, count), np.int32)
    made["positions"] = np.tile(np.arange(count, dtype=np.int32), (batch, 1))
    return {key: made[key] for key in _READ if key in made}
