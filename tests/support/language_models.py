"""Public language models beside the original library's: their logits and generated tokens."""

import copy
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from support.original import their_warnings
from support.public_models import read_checkpoint

from vadapter.models.adapter_model import AdapterModel
from vadapter.models.generate import Decode, decode
from vadapter.models.registry import make_module
from vadapter.models.transformer import text_mask
from vadapter.weights.hf_checkpoint import Checkpoint


def build(transformers, kind, keys):
    """A random model of the original library, computed without fused attention."""
    config = transformers.AutoConfig.for_model(kind, **keys)
    config._attn_implementation = "eager"
    return transformers.AutoModelForCausalLM.from_config(config)


def load(folder):
    """(module, parameters, report) of a checkpoint."""
    checkpoint = Checkpoint.open(folder)
    module = make_module("llm", checkpoint.spec)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    params, report = read_checkpoint(checkpoint, nn.unbox(shapes)["params"])
    return module, params, report


@functools.partial(jax.jit, static_argnums=0)
def logits(module, params, tokens, real):
    """Ours of rows whose ends are padding, where not `real`."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    apply = lambda *a, **kw: module.apply({"params": params}, *a, **kw)  # noqa: E731
    states, _ = apply(apply(tokens, method="embed"), positions=positions,
                      mask=text_mask(real.astype(jnp.int32)), method="hidden")  # fmt: skip
    return apply(states, method="logits")


def their_logits(torch, model, tokens, real):
    """The original's in float32, and how far float32 is from float64 there.

    Its windows are NaN in float64.
    """
    with torch.no_grad(), their_warnings():
        theirs, exact = (
            original(torch.tensor(tokens), attention_mask=torch.tensor(real)).logits.numpy()[real]
            for original in (model, copy.deepcopy(model).double())
        )
    return theirs, np.nan_to_num(np.abs(theirs - exact)).max()


def greedy(module, params, tokens, new, stop=(2,)):
    """Our greedy continuation of texts without padding."""
    rows, length = tokens.shape
    batch = {
        "prompt": np.zeros((rows, 0), np.int32),
        "tokens": tokens.astype(np.int32),
        "segments": np.ones((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    }
    lm = AdapterModel({"llm": module}, lm="llm")
    run = jax.jit(lambda p, b: decode(lm, p, b, Decode(new), stop)["tokens"])
    return np.asarray(run({"llm": params}, batch))


def their_greedy(torch, model, tokens, new, stop=(2,)):
    """The original's, with zeros after its end."""
    with torch.no_grad(), their_warnings():
        theirs = model.generate(
            torch.tensor(tokens), attention_mask=torch.ones(tokens.shape), max_new_tokens=new,
            do_sample=False, eos_token_id=list(stop), pad_token_id=0,
        ).numpy()[:, tokens.shape[1] :]  # fmt: skip
    return np.pad(theirs, ((0, 0), (0, new - theirs.shape[1])))
