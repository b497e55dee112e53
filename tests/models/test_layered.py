"""Decoding with each layer's own parameters against decoding with their stack."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny
from support.cases import some_slow

from vadapter.distributed.compile import OPTIONS
from vadapter.models import layered
from vadapter.models.adapter_model import AdapterModel
from vadapter.models.adapters.cross_attention import CrossAttention, CrossAttentionConfig
from vadapter.models.adapters.projection import Projection, ProjectionConfig
from vadapter.models.adapters.resampler import Resampler
from vadapter.models.adapters.words import Words, WordsConfig
from vadapter.models.generate import Decode, decode
from vadapter.models.lm import LM
from vadapter.models.vit import ViT

NEW, LENGTHS = 6, (1, 4, 2)
LANGUAGES = {
    "multi-query, tied": {"kv_heads": 1},
    "serial, learned positions": {"parallel": False, "positions": "learned", "tied": False},
    "windows, norms after blocks": {"windows": (3, 0), "parallel": False, "post_norms": True},
    "caps, norms of queries": {"attn_softcap": 5.0, "final_softcap": 9.0, "qk_norm": True},
    "gated delta networks": {"delta": tiny.DELTA, "recurrent": (1, 1, 0, 0), "depth": 4},
}
PREFIXES = ("none", "soft", "words", "cross")
SEARCHES = {"greedy": 1, "beams": 2}
CASES = [
    (lm, prefix, search) for lm in LANGUAGES for prefix in PREFIXES for search in SEARCHES
    if (lm, prefix) != ("gated delta networks", "cross")
]  # fmt: skip
FAST = [
    ("multi-query, tied", "soft", "greedy"), ("serial, learned positions", "words", "beams"),
    ("windows, norms after blocks", "cross", "beams"), ("caps, norms of queries", "none", "greedy"),
    ("gated delta networks", "soft", "beams"),
]  # fmt: skip


def make(lm="multi-query, tied", prefix="soft", dtype=jnp.float32, **changes):
    config = dataclasses.replace(tiny.LLM, **{**LANGUAGES[lm], **changes})
    modules = {"encoder": ViT(tiny.VIT, dtype), "resampler": Resampler(tiny.RESAMPLER, dtype)}
    if prefix == "none":
        model = AdapterModel({"llm": LM(config, dtype)}, "llm")
        shapes = jax.eval_shape(lambda k: model.init(k, None), jax.random.key(0))
        return model, tiny.filled(shapes, seed=3)
    cross = CrossAttentionConfig(2, heads=2, head_dim=4, width=config.width, depth=config.depth)
    project = Projection(ProjectionConfig(config.width), dtype)
    last = {
        "soft": {"fc": project},
        "words": {"fc": project, "words": Words(WordsConfig(0, config.vocab_size), dtype)},
        "cross": {"cross": CrossAttention(cross, dtype)},
    }[prefix]
    modules |= {**last, "llm": LM(config, dtype)}
    model = AdapterModel(modules, "llm", ("resampler", *last), "encoder", frozen_lm=True)
    return model, tiny.filled(tiny.boxed(model), seed=3)


def make_batch(model):
    rng, B, T = np.random.default_rng(0), len(LENGTHS), max(LENGTHS) + 1
    valid = np.arange(T)[None] < np.array(LENGTHS)[:, None]
    batch = {
        "prompt": np.array([[-1, -1], [4, 5], [-1, 6]], np.int32),
        "tokens": np.where(valid, rng.integers(3, tiny.V, (B, T)), 0).astype(np.int32),
        "segments": valid.astype(np.int32),
        "positions": np.where(valid, np.arange(T), 0).astype(np.int32),
    }
    if model.encoder:
        batch["frames"] = rng.integers(0, 256, (B, 1, tiny.IMAGE, tiny.IMAGE, 3), np.uint8)
    return batch


GREEDY = Decode(NEW)


def generate(model, params, how=GREEDY, **options):
    run = jax.jit(lambda p, b: decode(model, p, b, how, **options))
    return jax.device_get(run(params, make_batch(model)))


def separate(model, params):
    arrays = jax.device_put(params, jax.devices()[0])
    return arrays | {model.lm: layered.layered(arrays[model.lm])}


@pytest.mark.parametrize(("lm", "prefix", "search"), some_slow(CASES, FAST))
def test_separate_layers_generate_what_their_stack_generates(lm, prefix, search):
    model, params = make(lm, prefix)
    how = Decode(NEW, min_new=2, beams=SEARCHES[search])
    stacked = generate(model, params, how)
    unrolled = generate(model, separate(model, params), how)
    assert stacked.keys() == unrolled.keys()
    for name, array in stacked.items():
        np.testing.assert_allclose(unrolled[name], array, atol=2e-5, err_msg=name)
    assert len({tuple(row) for row in stacked["tokens"].tolist()}) > 1, "the rows are all alike"


def test_parameters_in_bfloat16_are_computed_with_in_float32():
    model, params = make(dtype=jnp.bfloat16)
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    same, _ = make()
    expected = generate(same, jax.tree.map(lambda x: np.asarray(x, np.float32), half))
    wide = layered.in_float32(half)
    for form in (wide, separate(model, wide)):
        out = generate(model, form, float32=True)
        np.testing.assert_array_equal(out["tokens"], expected["tokens"])
        np.testing.assert_allclose(out["logprob"], expected["logprob"], atol=2e-5)
    native = generate(model, half)
    assert np.abs(native["logprob"] - expected["logprob"]).max() > 1e-3, "bfloat16 is as exact"


def test_separate_layers_take_no_memory_but_for_the_head():
    _, params = make(width=64, mlp_dim=128)
    arrays = jax.device_put(params["llm"], jax.devices()[0])
    stack = arrays["stack"]["blocks"]["mlp"]["up"]["kernel"]
    new = layered.layered(arrays)
    for i, layer in enumerate(new["stack"]["blocks"]):
        own = layer["mlp"]["up"]["kernel"]
        at = stack.unsafe_buffer_pointer() + i * own.nbytes
        assert own.unsafe_buffer_pointer() == at
    np.testing.assert_array_equal(new["head"]["kernel"], params["llm"]["embedding"]["embedding"].T)
    assert set(new) == {*params["llm"], "head"}


def loop_of(model, params):
    """The instructions of the loop over tokens in compiled decoding, (name, shape, operation)."""
    run = lambda p, b: decode(model, p, b, Decode(NEW))  # noqa: E731
    lowered = jax.jit(run, compiler_options=OPTIONS["cpu", "layered"]).lower(
        params, make_batch(model)
    )
    text = lowered.compile().as_text()
    bodies = set(re.findall(r"body=(%[\w.\-]+)", text))
    parts = [p for p in re.split(r"\n(?=%|ENTRY)", text) if p.split(" ")[0] in bodies]
    largest = max(parts, key=len)
    return re.findall(r"(%[\w.\-]+) = (\w+\[[\d,]*\])\S* ([\w\-]+)\(", largest)


def test_a_token_copies_neither_the_cache_nor_weights():
    slots = 2 + 4 + max(LENGTHS) + 1 + NEW
    cache = re.compile(rf"f32\[(3,6,)?{len(LENGTHS) * 2},(6,{slots}|{slots},6)\]")
    heavy = {"f32[24,48]", "f32[48,24]", "f32[24,24]", "f32[24,12]", "f32[24,32]"}

    model, params = make("serial, learned positions", kv_heads=2, tied=True)
    found = loop_of(model, separate(model, params))
    made = [(n, s) for n, s, kind in found if kind not in ("parameter", "get-tuple-element")]
    caches = [name for name, shape in made if cache.fullmatch(shape)]
    assert caches, "the loop has no cache"
    assert [name for name in caches if "update" not in name] == []
    assert [name for name, shape in made if shape in heavy] == []


def test_many_tokens_of_large_layers_are_worth_unrolling():
    def pays(width, depth, tokens):
        shape = jax.ShapeDtypeStruct((depth, width, 12 * width), jnp.bfloat16)
        return layered.pays({"stack": {"blocks": {"kernel": shape}}}, tokens)

    assert not pays(64, 4, 32), "a caption by a tiny model"
    assert not pays(576, 30, 32), "a caption by a model of 135 million parameters"
    assert pays(576, 30, 32 * 100), "an evaluation by it"
    assert pays(64, 4, 32 * 10_000), "a long evaluation by a tiny model"
    for size in (64, 576, 2048):
        paying = [pays(size, depth, 2**n) for depth in (4, 32) for n in range(5, 20)]
        assert paying[:15] == sorted(paying[:15])
        assert paying[:15] == paying[15:], "more layers cost and save as much, each"


def test_the_first_of_equally_probable_words_is_chosen():
    model, params = make("serial, learned positions", "none")
    kernel = np.zeros_like(params["llm"]["head"]["kernel"])
    out = generate(model, {"llm": params["llm"] | {"head": {"kernel": kernel}}}, stop=())
    assert (out["tokens"] == 0).all()
    np.testing.assert_allclose(out["logprob"], -NEW * np.log(tiny.V), rtol=1e-6)
