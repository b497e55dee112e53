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
from benches.peer.decoding import LLAMA, NEW, OurDecoding
from benches.peer.llama import llama
from benches.peer.measure import Options, alternate, summary
from benches.peer.torch_layers import tensor
from benches.peer.torch_model import Model

# Share of tokens in float32. Rounding may turn a close choice, and with it all tokens after it.
LEAST_EQUAL = 0.97
# In bfloat16 the sides round differently in every layer. What each chooses must then be this close
# in nats, on average, to the best token of the same weights in float32; a random one is at 4.
LARGEST_GAP = 0.05


def measure(
    options: Options, *, recipe: str, stage: str, batch: int, dtype: str = "float32",
    features: tuple[int, int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the times of `batch` rows, and the share of equal tokens.

    Raises:
      ValueError: fewer tokens are equal than rounding explains.
    """
    ours = OurDecoding(Case(recipe, stage, features), batch, [*LLAMA, f"dtype={dtype}"])
    theirs = Generate(ours)
    same = compare(ours(), theirs(), None if dtype == "float32" else theirs.gap)
    both: dict[str, Callable[[], Any]] = {"ours": ours, "transformers": theirs}
    return {
        "what": f"{NEW} tokens of {batch} rows, {dtype}",
        "same": same,
        "sides": summary(alternate(both, options.rounds)),
        "compile_seconds": {"ours": ours.compile_seconds},
    }


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


class Generate:
    """Greedy decoding by transformers; a call returns the new tokens i64[B, NEW].

    Args:
      ours: whose weights and rows it takes.
      device: of torch.
      static: with a cache of fixed size, whose step transformers compiles.
    """

    def __init__(self, ours: OurDecoding, device: str = "cpu", *, static: bool = False):
        model, dtype = ours.stage.adapter_model, getattr(torch, ours.stage.recipe.dtype)
        params = jax.tree.map(jax.device_get, ours.params)
        visual = {name: tree for name, tree in params.items() if name != model.lm}
        config = model.modules[model.lm].config  # type: ignore[attr-defined]
        self.visual = Model(model, visual, ()).to(device, dtype)
        self.lm = llama(config, params[model.lm], dtype).to(device)
        self.rows = {key: tensor(value).to(device) for key, value in ours.rows.items()}
        self.how = {
            "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "use_cache": True,
            **({"cache_implementation": "static"} if static else {}),
        }  # fmt: skip

    def context(self) -> torch.Tensor:
        """Return the embeddings of prompt, visual tokens and text."""
        embed, rows = self.lm.get_input_embeddings(), self.rows
        parts = [embed(rows["prompt"]), embed(rows["tokens"])]
        if (encoded := self.visual.encode(rows)) is not None:
            parts.insert(1, self.visual.prefix(encoded.to(parts[0].dtype)))
        return torch.cat(parts, 1)

    @torch.inference_mode()
    def __call__(self) -> np.ndarray:
        if not self.visual.encoder:  # as a user would
            tokens = self.rows["tokens"]
            mask = torch.ones_like(tokens)
            out = self.lm.generate(input_ids=tokens, attention_mask=mask, **self.how)
            return out[:, tokens.shape[1] :].cpu().numpy()
        x = self.context()
        mask = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
        return self.lm.generate(inputs_embeds=x, attention_mask=mask, **self.how).cpu().numpy()

    @torch.inference_mode()
    def gap(self, tokens: np.ndarray) -> float:
        """Return how far tokens are from the most probable ones in float32, in nats on average."""
        lm = copy.deepcopy(self.lm).float()
        new = tensor(tokens).long().to(lm.device)
        x = torch.cat([self.context().float(), lm.get_input_embeddings()(new[:, :-1])], 1)
        logits = lm(inputs_embeds=x, logits_to_keep=NEW).logits
        return float((logits.amax(-1) - logits.gather(-1, new[..., None])[..., 0]).mean())
