"""Every named size, by shapes alone: parameter counts against a table, and the errors of a spec."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vadapter.errors import ConfigError
from vadapter.models.registry import KINDS, SIZES, expand, load_kind, make_module

# Parameters without embedding and head. ViT-B/L: arXiv 2010.11929, Table 1 (86M, 307M with the
# patches of 16); the others: the block's formula, worked out by hand.
COUNTS = {
    "coca_b": 86_000_000,
    "coca_l": 304_000_000,
    "coca_g": 1_011_000_000,
    "tlm_108m": 108_000_000,
    "llm_1b": 1_080_000_000,
    "llm_8b": 8_590_000_000,
    "resampler_x1": 8_070_000,
    "resampler_x6": 43_490_000,
    "qformer_blip2": 101_600_000,
    "linear": 2_100_000,  # these at widths 1024 and 2048
    "mlp_2": 6_296_000,
    "shuffle_4_linear": 33_554_000,
    "shuffle_2_mlp": 12_595_000,
    "mean_2_mlp": 6_296_000,
    "mlp_mean_2": 6_296_000,
}


def shapes(name):
    module = make_module(name, {"size": name}, width=2048, grid=(16, 16))
    kind = expand(name, {"size": name})["kind"]
    if kind == "lm":
        x = jnp.zeros((1, 2), jnp.int32)
    elif kind in ("resampler", "qformer", "mlp"):
        x = jnp.zeros((1, 8, 256, 1024))
    else:
        x = jnp.zeros((1, 1, module.view.size, module.view.size, 3))
    return jax.eval_shape(module.init, jax.random.key(0), x)["params"]


def test_the_table_names_every_size():
    assert set(COUNTS) == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_a_named_size_has_its_number_of_parameters(name):
    params = shapes(name)
    params.pop("embedding", None)
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
    assert count == pytest.approx(COUNTS[name], rel=0.02)


@pytest.mark.parametrize("name", ["coca_b", "coca_l", "coca_g"])
def test_an_encoder_gives_256_tokens_at_288_pixels_with_patches_of_18(name):
    module = make_module("encoder", {"size": name})
    frames = jax.ShapeDtypeStruct((1, 1, 288, 288, 3), jnp.uint8)
    tokens, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), frames)
    assert tokens.shape == (1, 1, 256, module.width)
    assert module.tokens_per_frame() == 256


def test_a_spec_overrides_fields_of_its_size_and_derived_values_fill_zeros_only():
    spec = {"size": "tlm_108m", "depth": 2, "vocab_size": 0, "weights": {"path": "x"}}
    module = make_module("tlm", spec, vocab_size=500, depth=7)
    assert (module.config.depth, module.config.width) == (2, 768)
    assert module.config.vocab_size == 500
    assert spec["weights"] == {"path": "x"}, "the spec itself is left as it was"


def test_a_computation_dtype_reaches_the_module():
    assert make_module("fc", {"kind": "fc", "width": 4}, dtype=jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"size": "tlm_108"}, r"components\.x\.size='tlm_108': unknown; did you mean 'tlm_108m'"),
        ({"kind": "resampeler"}, r"components\.x\.kind='resampeler': unknown; did you mean"),
        ({}, r"components\.x\.kind='': unknown; known: .*resampler"),
        (
            {"size": "tlm_108m", "dept": 3},
            r"components\.x\.dept: unknown key; did you mean 'depth'",
        ),
        ({"kind": "lm", "width": 8}, r"components\.x\.\w+: missing"),
        ({"size": "coca_b", "depth": "3"}, r"components\.x\.depth: expected int"),
    ],
)
def test_a_spec_that_cannot_be_built_says_where_and_what(spec, message):
    with pytest.raises(ConfigError, match=message):
        make_module("x", spec)


def test_every_kind_pairs_a_config_with_a_module_that_takes_it():
    for kind in KINDS:
        config, module = load_kind(kind)
        assert module.__annotations__["config"] is config, kind


def test_only_the_kinds_in_use_are_imported():
    code = (
        "import sys\n"
        "from vadapter.models.registry import make_module\n"
        "make_module('x', {'size': 'coca_b'})\n"
        "print(*(name for name in sys.modules if name.startswith('vadapter.models')))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.rpartition(".")[2] for name in run.stdout.split()}
    assert "vit" in loaded
    assert not loaded & {"mobilenet", "coca", "lm", "resampler", "mlp", "projection"}
