"""Rows of greedy decoding beside transformers' `generate` with its cache.

The visual tokens, if any, pass through the encoder and the chain in torch, too; the language model
is transformers' Llama.
"""

import copy
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

from benches.peer.case import Case
from benches.peer.llama import llama
from benches.peer.measure import Options, alternate, summary, timed
from benches.peer.torch_layers import tensor
from benches.peer.torch_model import Model
from vadapter.distributed.compile import jit
from vadapter.models.generate import Decode
from vadapter.recipe.schema import DTYPES
from vadapter.stages.abstract_state import in_compute_dtype
from vadapter.stages.stage import Stage

LLAMA = ("components.llm.parallel=false", "components.llm.embed_scale=false")
NEW = 32  # tokens of each row
# Share of tokens in float32. Rounding may turn a close choice, and with it all tokens after it.
LEAST_EQUAL = 0.97
# In bfloat16 the sides round differently in every layer. What each chooses must then be this close
# in nats, on average, to the best token of the same weights in float32; a random one is at 4.
LARGEST_GAP = 0.05
READ = ("frames", "features", "prompt", "tokens", "segments", "positions")


def measure(
    options: Options, *, recipe: str, stage: str, batch: int, dtype: str = "float32",
    features: tuple[int, int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the times of `batch` rows, and the share of equal tokens.

    Raises:
      ValueError: fewer tokens are equal than rounding explains.
    """
    case = Case(recipe, stage, features)
    ours, theirs, compile_seconds = sides(case, case.open([*LLAMA, f"dtype={dtype}"]), batch)
    both: dict[str, Callable[[], Any]] = {"ours": ours, "transformers": theirs}
    same = compare(ours(), theirs(), None if dtype == "float32" else theirs.gap)
    return {
        "what": f"{NEW} tokens of {batch} rows, {dtype}",
        "same": same,
        "sides": summary(alternate(both, options.rounds)),
        "compile_seconds": {"ours": compile_seconds},
    }


def sides(
    case: Case, stage: Stage, batch: int
) -> tuple[Callable[[], np.ndarray], "Generate", float]:
    """Return both sides, which return new tokens i64[B, NEW], and our CPU seconds of compiling."""
    rows, dtype = _rows(case, stage, batch), stage.recipe.dtype
    shapes = in_compute_dtype(stage.abstract, DTYPES[dtype])
    params, arrays = case.decoding_parameters(stage, shapes), jax.device_put(rows)
    decode = jit(stage.decode(Decode(NEW, min_new=NEW + 1)))  # never ends before
    run, seconds = timed(decode.lower(params, arrays).compile)
    theirs = Generate(stage, jax.tree.map(jax.device_get, params), rows, dtype)
    return lambda: np.asarray(run(params, arrays)["tokens"]), theirs, seconds


def compare(ours: np.ndarray, theirs: np.ndarray, gap: Callable[[np.ndarray], float] | None) -> str:
    """Return how close the tokens of both sides are.

    Args:
      ours, theirs: i64[B, NEW].
      gap: tokens -> how far they are from the best ones; None: they must be equal.

    Raises:
      ValueError: the difference is more than rounding explains.
    """
    same, text = float((ours == theirs).mean()), ""
    right = same >= LEAST_EQUAL
    if gap is not None:
        gaps = gap(ours), gap(theirs)
        right, text = max(gaps) <= LARGEST_GAP, "; {:.2f} and {:.2f} nats off".format(*gaps)
    if not right:
        raise ValueError(f"{same:.1%} of tokens{text}: the sides do different things")
    return f"{same:.1%} of tokens{text}"


def _rows(case: Case, stage: Stage, batch: int) -> dict[str, np.ndarray]:
    """Return what is continued: an image and one token, or as much text as the recipe's rows."""
    made: Any = case.batch(stage, batch)
    count = 1 if stage.model.encoder else made["tokens"].shape[1]
    random = np.random.default_rng(0)
    made["tokens"] = random.integers(3, stage.vocab_size, (batch, count)).astype(np.int32)
    made["segments"] = np.ones((batch, count), np.int32)
    made["positions"] = np.tile(np.arange(count, dtype=np.int32), (batch, 1))
    return {key: made[key] for key in READ if key in made}


class Generate:
    """Greedy decoding by transformers; a call returns the new tokens i64[B, NEW]."""

    def __init__(self, stage: Stage, params: Any, rows: Any, dtype: str):
        model, self.dtype = stage.adapter_model, getattr(torch, dtype)
        visual = {name: tree for name, tree in params.items() if name != model.lm}
        self.visual = Model(model, visual, ()).to(self.dtype)
        config = model.modules[model.lm].config  # type: ignore[attr-defined]
        self.lm = llama(config, params[model.lm], self.dtype)
        self.rows = {key: tensor(value) for key, value in rows.items()}

    def context(self) -> torch.Tensor:
        """Return the embeddings of prompt, visual tokens and text."""
        embed, rows = self.lm.get_input_embeddings(), self.rows
        parts = [embed(rows["prompt"]), embed(rows["tokens"])]
        if (encoded := self.visual.encode(rows)) is not None:
            parts.insert(1, self.visual.prefix(encoded.to(self.dtype)))
        return torch.cat(parts, 1)

    @torch.inference_mode()
    def __call__(self) -> np.ndarray:
        how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "use_cache": True}
        if not self.visual.encoder:  # as a user would
            tokens = self.rows["tokens"]
            out = self.lm.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **how)
            return out[:, tokens.shape[1] :].numpy()
        x = self.context()
        mask = torch.ones(x.shape[:2], dtype=torch.long)
        return self.lm.generate(inputs_embeds=x, attention_mask=mask, **how).numpy()

    @torch.inference_mode()
    def gap(self, tokens: np.ndarray) -> float:
        """Return how far tokens are from the most probable ones in float32, in nats on average."""
        lm, new = copy.deepcopy(self.lm).float(), tensor(tokens).long()
        x = torch.cat([self.context().float(), lm.get_input_embeddings()(new[:, :-1])], 1)
        logits = lm(inputs_embeds=x, logits_to_keep=NEW).logits
        return float((logits.amax(-1) - logits.gather(-1, new[..., None])[..., 0]).mean())
