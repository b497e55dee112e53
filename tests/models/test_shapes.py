"""The shapes in the types of `vadapter.models` are checked while its programs are traced."""

import subprocess
import sys

from support.paths import TESTS

SCRIPT = """
import jaxtyping
with jaxtyping.install_import_hook("vadapter.models", "beartype.beartype"):
    import vadapter.models.losses, vadapter.models.generate
    from vadapter.models.registry import KINDS, load_kind, make_module
    for kind in KINDS:
        load_kind(kind)
import dataclasses, functools, jax, jax.numpy as jnp, sys
sys.path.append("..")  # where benches are
from benches.fake_batch import fake_batch
from support import tiny
from vadapter.models.adapter_model import AdapterModel
from vadapter.models.generate import Decode, decode
from vadapter.models.losses import chunked_xent

ADAPTERS = {
    "resampler": {}, "pooler": {"kind": "pooler", "queries": 3, "width": 16, "heads": 2},
    "mlp": {"kind": "mlp", "hidden_dim": 8, "width": 16},
    "qformer": {"kind": "qformer", "width": 16, "depth": 2, "heads": 2, "mlp_dim": 8},
}
ON_GRID = {  # they give a prefix, which the rest of the model reads like any other
    "c_abstractor": {"kind": "c_abstractor", "queries": 4, "width": 16, "hidden_dim": 8},
    **{pool: {"kind": "mlp", "width": 16, "pool": pool, "norm": True}
       for pool in ("shuffle", "mean", "mean_after")},
}
ENCODERS = {
    "vit": tiny.VIT, "mobilenet": load_kind("mobilenet")[0](image_size=tiny.IMAGE, width_mult=0.35),
    "video_vit": load_kind("video_vit")[0](
        image_size=tiny.IMAGE, patch=8, tubelet=2, width=12, depth=1, heads=2, mlp_dim=16
    ),
}
batch = jax.tree.map(jnp.asarray, dict(fake_batch(2, frames=4, size=tiny.IMAGE, vocab_size=tiny.V)))

def trace(model, params, batch):
    visual = model.encode(params, batch)
    states = model.hidden(params, visual, batch)
    head = lambda x: model.logits(params, x)
    loss = chunked_xent(head, states, batch["targets"], batch["weights"], 24)
    return loss, [decode(model, params, batch, Decode(max_new=3, beams=k)) for k in (1, 2)]

# Every adapter behind the ViT, and one behind the other encoders.
PAIRS = [(adapter, "vit") for adapter in ADAPTERS]
PAIRS += [("resampler", "mobilenet"), ("resampler", "video_vit")]
for adapter, encoder in PAIRS:
    spec, config = ADAPTERS[adapter], ENCODERS[encoder]
    stage2 = tiny.stage2(frozen_lm=True)
    modules = dict(stage2.modules) | {"encoder": load_kind(encoder)[1](config)}
    if spec:
        modules["resampler"] = make_module("adapter", spec)
    model = dataclasses.replace(stage2, modules=modules)
    params = jax.tree.map(jnp.asarray, tiny.filled(tiny.boxed(model, 4)))
    jax.eval_shape(functools.partial(trace, model), params, batch)
for name, config in ENCODERS.items():
    encoder = load_kind(name)[1](config)
    tokens = jnp.zeros((2, 4, encoder.tokens_per_frame(), encoder.width), jnp.float32)
    for adapter, spec in ON_GRID.items():
        module = make_module(adapter, spec, grid=encoder.grid())
        jax.eval_shape(module.init, jax.random.key(0), tokens)
try:
    gray = jnp.zeros((2, 1, 32, 32, 1))
    jax.eval_shape(modules["encoder"].init, jax.random.key(0), gray)
except (jaxtyping.TypeCheckError, ValueError):
    print("checked")
"""


def test_traced_programs_have_the_shapes_in_their_types():
    command = [sys.executable, "-c", SCRIPT]
    run = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "checked\n"), run.stderr[-3000:]
