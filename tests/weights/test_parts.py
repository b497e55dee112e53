"""Parts of vision-language checkpoints: small random ones give what the original gives inside."""

import json
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import encoders, runs
from support.cases import some_slow
from support.hub_server import NEW
from support.language_models import greedy
from support.original import their_warnings
from support.patches import use_devices
from support.processors import CLIP, write_processor
from support.public_models import read_checkpoint, write_model
from support.public_tokenizers import llama2

from vadapter.errors import CheckpointError
from vadapter.models.registry import make_module
from vadapter.models.transformer import text_mask
from vadapter.recipe.schema import read
from vadapter.stages.restore import open_run
from vadapter.train.loop import train
from vadapter.weights.hf_checkpoint import FAMILIES, Checkpoint, complete
from vadapter.weights.name_mapping import Tokens
from vadapter.weights.parts import MODELS
from vadapter.weights.reference import Reference

V, T, TOLERANCE = 120, 11, 1e-4
TEXT = {"vocab_size": V, "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 2,
        "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 64,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
GEMMA = {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 24}
EYES = {"hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 3, "patch_size": 7,
        "num_attention_heads": 3, "image_size": 28}  # fmt: skip
QWEN_EYES = {"hidden_size": 36, "intermediate_size": 50, "depth": 3, "num_heads": 3,
             "out_hidden_size": 36, "patch_size": 4}  # fmt: skip
IDS = {"image_token_index": V - 1, "image_token_id": V - 1}
UNUSED = r"merger|head\.|post_layernorm|layers\.2\."  # of a part: behind its tokens
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}


def model(kind, text, vision, **keys):
    return kind, {"text_config": {**TEXT, **text}, "vision_config": {**EYES, **vision}, **keys}


# name: (class, its config, pixels a side)
CASES = {
    "paligemma": (*model("PaliGemma", {"model_type": "gemma", "head_dim": 16},
                         {"model_type": "siglip_vision_model"}, projection_dim=36), 28),
    "paligemma 2": (*model("PaliGemma", {"model_type": "gemma2", **GEMMA},
                           {"model_type": "siglip_vision_model"}, projection_dim=36), 28),
    "gemma3": (*model("Gemma3", {"model_type": "gemma3_text", **GEMMA},
                      {"model_type": "siglip_vision_model", "vision_use_head": False},
                      mm_tokens_per_image=4), 28),
    "llava": (*model("Llava", {"model_type": "llama"}, {"model_type": "clip_vision_model"}), 28),
    "llava, class token": (*model(
        "Llava", {"model_type": "mistral", "tie_word_embeddings": True},
        {"model_type": "clip_vision_model"}, vision_feature_layer=-1,
        vision_feature_select_strategy="full"), 28),
    "llava_onevision": (*model("LlavaOnevision", {"model_type": "qwen2"},
                               {"model_type": "siglip_vision_model"},
                               image_grid_pinpoints=[[28, 28]]), 28),
    "idefics3": (*model("Idefics3", {"model_type": "llama"}, {}, scale_factor=2), 28),
    "smolvlm": (*model("SmolVLM", {"model_type": "llama"}, {}, scale_factor=2,
                       tie_word_embeddings=True), 28),
    "smolvlm, another grid": (*model("SmolVLM", {"model_type": "llama"}, {"image_size": 35},
                                     scale_factor=2), 28),
    "qwen2_5_vl": ("Qwen2_5_VL", {
        "text_config": {**TEXT, "rope_parameters": SECTIONS},
        "vision_config": {**QWEN_EYES, "window_size": 16, "fullatt_block_indexes": [1]}}, 40),
    "qwen3_vl": ("Qwen3VL", {
        "text_config": {**TEXT, "head_dim": 12, "rope_parameters": SECTIONS},
        "vision_config": {**QWEN_EYES, "num_position_embeddings": 16,
                          "deepstack_visual_indexes": [1]}}, 24),
    "qwen3_5": ("Qwen3_5", {
        "text_config": {**TEXT, "head_dim": 16, "linear_num_key_heads": 2, "linear_key_head_dim": 6,
                        "linear_num_value_heads": 4, "linear_value_head_dim": 10,
                        "full_attention_interval": 2, "tie_word_embeddings": True},
        "vision_config": {**QWEN_EYES, "num_position_embeddings": 16},
        "tie_word_embeddings": True}, 24),
}  # fmt: skip
FAST = ["llava", "qwen2_5_vl", "smolvlm, another grid"]


@pytest.fixture(scope="module")
def pair(original_of):
    """case -> (the original model, its folder), made once."""

    def build(transformers, case):
        kind, keys, _ = CASES[case]
        config = getattr(transformers, f"{kind}Config")(**keys, **IDS)
        config._attn_implementation = "eager"
        for part in (config.text_config, config.vision_config):
            part._attn_implementation = "eager"
        return getattr(transformers, f"{kind}ForConditionalGeneration")(config)

    return original_of(build)


# Names in memory, newer ones -> those of the first releases' files.
FIRST = {
    "llava": {
        "model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.vision_model.", "model.image_newline": "image_newline",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },
    "qwen2_5_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
}  # fmt: skip
FIRST |= dict.fromkeys(("llava_onevision", "paligemma", "gemma3"), FIRST["llava"])


@pytest.fixture(scope="module")
def renamed(pair, tmp_path_factory):
    """case -> folders of the same model, under the names in memory and under those of old files."""

    def make(case):
        original, folder = pair(case)
        tied = original.config.tie_word_embeddings
        tensors = {name: tensor.numpy().copy() for name, tensor in original.state_dict().items()
                   if not (tied and name == "lm_head.weight")}  # fmt: skip
        for names in ({}, FIRST.get(original.config.model_type, {})):
            new = tmp_path_factory.mktemp("names")
            (new / "config.json").write_text((folder / "config.json").read_text())
            rename = lambda n, names=names: next(  # noqa: E731
                (b + n.removeprefix(a) for a, b in names.items() if n.startswith(a)), n
            )
            save_file({rename(n): t for n, t in tensors.items()}, new / "model.safetensors")
            yield new

    return make


def load(folder, part, **overrides):
    checkpoint = Checkpoint.open(folder, part)
    module = make_module("part", dict(checkpoint.spec) | overrides)
    size = getattr(module.config, "image_size", 0)
    example = np.zeros((1, 1, size, size, 3)) if size else jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), example)
    params, report = read_checkpoint(checkpoint, nn.unbox(shapes)["params"])
    assert all(re.search(UNUSED, name) for name in report.unused), report.unused
    return module, params


def theirs_seen(torch, original, module, pixels):
    """What their connector reads of images, [n, N, D], row by row."""
    c, inner = module.config, original.model
    x = (pixels[:, 0] / 255 - np.array(c.mean)) / np.array(c.std)
    x = torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float32)
    kind, seen = original.config.model_type, []
    m, side = 2, c.image_size // c.patch
    grid = torch.tensor([[1, side, side]] * len(x))
    connector = next(m for name, m in inner.named_modules() if name.rpartition(".")[2] in (
        "multi_modal_projector", "connector", "merger"))  # fmt: skip
    handle = connector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad(), their_warnings():
        if kind.startswith("qwen"):
            shape = (len(x), 3, side // m, m, c.patch, side // m, m, c.patch)
            flat = x.reshape(shape).permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]
            flat = flat.repeat(1, 1, 1, 1, 1, 1, 2, 1, 1).reshape(len(x) * side**2, -1)
            inner.get_image_features(flat, grid)
        elif kind == "llava_onevision":
            for image in x:  # the first of its pieces is the whole image
                sizes = torch.tensor([[c.image_size] * 2])
                inner.get_image_features(image[None, None].expand(1, 2, -1, -1, -1), sizes)
            seen[:] = [torch.stack([pieces[0] for pieces in seen])]
        else:
            inner.get_image_features(x[None] if kind in ("idefics3", "smolvlm") else x)
    handle.remove()
    tokens = seen[-1].reshape(len(x), -1, c.width).numpy()
    if not kind.startswith("qwen"):
        return tokens
    units = np.arange((side // m) ** 2)
    if kind == "qwen2_5_vl":
        from transformers.vision_utils import get_vision_window_index

        units = get_vision_window_index(grid[:1], m, 16, c.patch)[0].numpy()
    blocks = np.zeros((len(x), len(units), m, m, c.width), np.float32)
    blocks[:, units] = tokens.reshape(len(x), -1, m, m, c.width)
    blocks = blocks.reshape(len(x), side // m, side // m, m, m, -1).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(len(x), side**2, -1)


@pytest.mark.parametrize("case", some_slow(list(CASES), fast=FAST))
def test_the_vision_part_gives_what_the_originals_connector_reads(case, pair, renamed, originals):
    torch, _ = originals
    original, folder = pair(case)
    size = CASES[case][2]
    module, params = load(folder, "vision", image_size=size)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 1, size, size, 3), np.uint8)
    expected = theirs_seen(torch, original, module, pixels)
    ours = encoders.run(module, params, pixels)[:, 0]
    assert ours.shape == expected.shape
    assert np.abs(expected).max() > 1
    assert np.abs(ours - expected).max() < TOLERANCE
    for other in renamed(case):
        same = load(other, "vision", image_size=size)[1]
        jax.tree.map(np.testing.assert_array_equal, params, same)


def logits_of_text(torch, original, tokens, real):
    """Their logits of rows that are text alone, padded where not `real`."""
    options = {"attention_mask": torch.tensor(real.astype(np.int64))}
    if original.config.model_type == "paligemma":  # otherwise a prefix, which attends both ways
        options["token_type_ids"] = torch.ones(tokens.shape, dtype=torch.int64)
    if original.config.model_type == "gemma3":
        options["token_type_ids"] = torch.zeros(tokens.shape, dtype=torch.int64)
    with torch.no_grad(), their_warnings():
        return original(torch.tensor(tokens), use_cache=False, **options).logits.numpy()


@pytest.mark.parametrize("case", some_slow(list(CASES), fast=FAST))
def test_the_text_part_gives_the_originals_logits_of_text(case, pair, renamed, originals):
    torch, _ = originals
    original, folder = pair(case)
    module, params = load(folder, "text")
    tokens, lengths = np.random.default_rng(0).integers(3, V - 1, (3, T)), np.array([T, 7, 3])
    real = np.arange(T)[None, :] < lengths[:, None]
    expected = logits_of_text(torch, original, tokens, real)[real]

    @jax.jit
    def run(params, tokens, segments):
        positions = jnp.broadcast_to(jnp.arange(T), tokens.shape)
        apply = lambda *a, **kw: module.apply({"params": params}, *a, **kw)  # noqa: E731
        states, _ = apply(apply(tokens, method="embed"), positions=positions,
                          mask=text_mask(segments), method="hidden")  # fmt: skip
        return apply(states, method="logits")

    ours = np.asarray(run(params, tokens, real.astype(np.int32)))[real]
    assert np.abs(expected).max() > 1
    assert np.abs(ours - expected).max() < TOLERANCE
    for other in renamed(case):
        jax.tree.map(np.testing.assert_array_equal, params, load(other, "text")[1])


@pytest.mark.parametrize("case", some_slow(list(CASES), fast=["paligemma 2", "qwen3_vl"]))
def test_cached_greedy_decoding_of_the_text_part_is_the_originals_to_its_end(case, pair, originals):
    """Theirs is the likeliest word after the whole text so far, without a cache; windows move."""
    torch, _ = originals
    original, folder = pair(case)
    module, params = load(folder, "text")
    tokens, new = np.random.default_rng(1).integers(3, V - 1, (2, 6)), 12
    text = tokens
    for _ in range(new):
        words = logits_of_text(torch, original, text, np.ones(text.shape, bool))[:, -1].argmax(-1)
        text = np.concatenate([text, words[:, None]], 1)
    theirs = text[:, 6:]
    stop = int(theirs[0, 5])
    ended = np.cumsum(theirs == stop, 1) - (theirs == stop) > 0
    assert ended.any()
    ours = greedy(module, params, tokens, new, stop=(stop,))
    np.testing.assert_array_equal(ours, np.where(ended, 0, theirs))


@pytest.mark.parametrize(("old", "new"), [(26, 26), (27, 27), (32, 32), (26, 20), (32, 48)])
def test_positions_by_share_of_a_side_are_the_originals(old, new, originals):
    """As `Idefics3VisionEmbeddings` computes them, for the grids of published models."""
    torch, _ = originals
    begins = torch.clamp(torch.arange(new, dtype=torch.float32) * (1.0 / torch.tensor([new])),
                         max=1 - 1e-6)  # fmt: skip
    buckets = torch.bucketize(begins, torch.arange(1 / old, 1.0, 1 / old), right=True)
    weights = Tokens("positions", grid=0, kernel="nearest").weights(old, new)
    np.testing.assert_array_equal(weights.argmax(1), buckets.numpy())
    np.testing.assert_array_equal(weights.sum(1), 1)


# -- what is read and fetched ------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(pair, tmp_path_factory):
    """The LLaVA in two shards, one of each part, beside its single file's folder."""
    _, folder = pair("llava")
    tensors = load_file(folder / "model.safetensors")
    new = tmp_path_factory.mktemp("sharded")
    (new / "config.json").write_text((folder / "config.json").read_text())
    shard = {n: "eyes" if n.startswith(("vision_tower", "multi_modal")) else "words"
             for n in tensors}  # fmt: skip
    for name in ("eyes", "words"):
        own = {n: t for n, t in tensors.items() if shard[n] == name}
        save_file(own, new / f"{name}.safetensors")
    index = {"weight_map": {n: f"{s}.safetensors" for n, s in shard.items()}}
    (new / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder, new


def test_shards_of_other_parts_need_not_be_there_and_the_digest_is_the_parts(sharded, tmp_path):
    folder, shards = sharded
    for part, own in (("vision", "eyes"), ("text", "words")):
        alone = tmp_path / part
        alone.mkdir()
        for name in ("config.json", "model.safetensors.index.json", f"{own}.safetensors"):
            (alone / name).write_bytes((shards / name).read_bytes())
        one, other = Checkpoint.open(alone, part), Checkpoint.open(folder, part)
        assert [file.name for file in one.stamps()] == [f"{own}.safetensors"]
        assert one.digest() == other.digest()
        jax.tree.map(np.testing.assert_array_equal, load(alone, part)[1], load(folder, part)[1])
    with pytest.raises(CheckpointError, match=r"1 of its 1 shards are not in the folder"):
        Checkpoint.open(tmp_path / "text", "vision")


def test_the_digest_of_a_part_depends_on_its_own_bytes_alone(sharded, tmp_path):
    folder, _ = sharded
    before = {part: Checkpoint.open(folder, part).digest() for part in ("vision", "text")}
    tensors = load_file(folder / "model.safetensors")
    tensors[next(name for name in tensors if "vision" in name)] += 1
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    after = {part: Checkpoint.open(tmp_path, part).digest() for part in ("vision", "text")}
    assert after["text"] == before["text"]
    assert after["vision"] != before["vision"]


FETCH = """
import sys
from vadapter.weights.reference import Reference
from vadapter.weights.hf_checkpoint import complete
spec = complete({"weights": "owner/model", "part": sys.argv[1]}, "components.x.weights")
print(spec["kind"], spec["weights"], Reference.of("x", spec).digest(__import__("pathlib").Path(sys.argv[2])))
"""  # noqa: E501


def test_of_a_repository_no_shard_without_the_part_is_fetched(sharded, hub, env, tmp_path):
    _, shards = sharded
    hub.files = {file.name: file.read_bytes() for file in shards.iterdir()}

    def fetch(**more):
        command = [sys.executable, "-c", FETCH, "text", str(tmp_path)]
        done = subprocess.run(command, env={**env, "HF_ENDPOINT": hub.endpoint, **more},
                              capture_output=True, text=True, timeout=120)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    said = fetch()
    assert said[:2] == ["lm", f"owner/model@{NEW}"]
    assert said[2] == f"sha256:{Checkpoint.open(shards, 'text').digest()}"
    assert any("words.safetensors" in path for _, path in hub.asked)
    assert not any("eyes.safetensors" in path for _, path in hub.asked)
    assert fetch(HF_HUB_OFFLINE="1") == said


# -- which part --------------------------------------------------------------------------------


def test_a_part_must_be_named_where_there_is_a_choice_and_gemma3_means_its_text(pair):
    _, folder = pair("llava")
    both = r"llava has a vision encoder and a language model: .*: part='vision' or part='text'"
    with pytest.raises(CheckpointError, match=both):
        Checkpoint.open(folder)
    with pytest.raises(
        CheckpointError, match=r"part='audio': a llava has only 'vision' and 'text'"
    ):
        Checkpoint.open(folder, "audio")
    _, folder = pair("gemma3")
    assert Checkpoint.open(folder).model_type == "gemma3_text"
    one, named = Checkpoint.open(folder), Checkpoint.open(folder, "text")
    assert one.spec == named.spec
    assert one.files.tensors.keys() == named.files.tensors.keys()


@pytest.mark.parametrize("kind", ["Gemma4", "Gemma4Unified"])
def test_the_text_of_a_gemma4_is_read_named_or_not(kind, original_of, originals):
    torch, _ = originals
    text = {**TEXT, "head_dim": 10, "global_head_dim": 14, "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"], "attention_k_eq_v": True,
            "num_global_key_value_heads": 3, "hidden_size_per_layer_input": 0}  # fmt: skip

    def build(transformers, kind):
        config = getattr(transformers, f"{kind}Config")(text_config=text, **IDS)
        return getattr(transformers, f"{kind}ForConditionalGeneration")(config)

    original, folder = original_of(build)(kind)
    tokens = np.random.default_rng(0).integers(3, V - 1, (2, T))
    with torch.no_grad(), their_warnings():
        expected = original(torch.tensor(tokens)).logits.numpy()
    for part in ("", "text"):
        module, params = load(folder, part)
        ours = jax.jit(module.apply)({"params": params}, tokens)
        assert np.abs(expected).max() > 1
        assert np.abs(ours - expected).max() < TOLERANCE
    with pytest.raises(CheckpointError, match=r"part='vision': a gemma4\w* has only 'text'"):
        Checkpoint.open(folder, "vision")


def test_a_checkpoint_without_parts_has_none_to_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match=r"part='text': a llama has no parts; leave it out"):
        complete({"weights": str(tmp_path), "part": "text"}, "components.llm.weights")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(CheckpointError, match=r"part='text': a clip has only 'vision'"):
        complete({"weights": str(tmp_path), "part": "text"}, "components.llm.weights")


@pytest.mark.parametrize("layer", [-3, [-2, -5], "last", None])
def test_another_feature_layer_is_refused_by_name(layer, tmp_path):
    config = {"model_type": "llava", "vision_feature_layer": layer}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="vision_feature_layer"):
        Checkpoint.open(tmp_path, "vision")


def test_a_component_of_a_recipe_names_its_part_and_keeps_it(pair, tmp_path):
    _, folder = pair("paligemma")
    for part, kind in (("vision", "vit"), ("text", "lm")):
        spec = complete({"weights": str(folder), "part": part}, "components.x.weights")
        assert (spec["kind"], spec["part"]) == (kind, part)
        assert complete(spec, "components.x.weights") == spec
        reference = Reference.of("x", spec)
        assert reference.digest(tmp_path) == f"sha256:{Checkpoint.open(folder, part).digest()}"
        (tmp_path / "x.json").unlink()


# -- published sizes ---------------------------------------------------------------------------

# name: (part, keys of its config.json that set shapes, published parameters of that part: of
# transformers' model built from them, without pooling heads, mergers and norms that are not used)
PUBLISHED = {
    # copies of its config.json in other projects
    "google/paligemma-3b-pt-224, vision": ("paligemma", "vision", {"vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14}}, 412_442_352),
    # copies of its config.json in other projects
    "google/paligemma-3b-pt-224, text": ("paligemma", "text", {"text_config": {
        "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16_384,
        "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1,
        "vocab_size": 257_216}}, 2_508_662_784),
    # width: config.json of a copy; the rest: defaults of transformers
    "Qwen/Qwen2.5-VL-3B-Instruct, vision": ("qwen2_5_vl", "vision", {"vision_config": {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420,
        "num_heads": 16, "out_hidden_size": 2048, "patch_size": 14, "window_size": 112}},
        # the two frames of a patch are one matrix here
        631_975_680 - 2 * 3 * 14**2 * 1280 // 2),
    # config.json of a copy
    "Qwen/Qwen2.5-VL-3B-Instruct, text": ("qwen2_5_vl", "text", {
        "hidden_size": 2048, "intermediate_size": 11_008, "num_attention_heads": 16,
        "num_hidden_layers": 36, "num_key_value_heads": 2, "vocab_size": 151_936,
        "tie_word_embeddings": True, "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, 3_085_938_688),
    # not confirmed
    "Qwen/Qwen3-VL-4B-Instruct, vision": ("qwen3_vl", "vision", {"vision_config": {
        "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
        "out_hidden_size": 2560, "patch_size": 16, "num_position_embeddings": 2304}},
        306_242_560 - 2 * 3 * 16**2 * 1024 // 2),
    # not confirmed
    "HuggingFaceTB/SmolVLM-256M-Instruct, vision": ("smolvlm", "vision", {"vision_config": {
        "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
        "num_hidden_layers": 12, "patch_size": 16, "image_size": 512}}, 86_433_024),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_part_has_its_published_number_of_parameters(name):
    kind, part, whole, published = PUBLISHED[name]
    config = MODELS[kind][part].config(whole)
    family = FAMILIES[config["model_type"]]
    spec = family.spec(config) | MODELS[kind][part].spec(whole)
    if kind == "qwen3_vl":
        spec["image_size"] = 768  # the grid of its positions
    module = make_module(part, spec)
    size = spec.get("image_size", 0)
    example = np.zeros((1, 1, size, size, 3)) if size else jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), example)
    leaves = jax.tree_util.tree_flatten_with_path(nn.unbox(shapes)["params"])[0]
    assert sum(int(np.prod(leaf.shape)) for _, leaf in leaves) == published
    for path, leaf in leaves:
        source = family.names({})[0].source("/".join(k.key for k in path), leaf.shape)
        assert source is not None, path


# -- a run -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_recipe_takes_encoder_and_language_model_of_one_checkpoint(tmp_path, monkeypatch):
    """And the tokenizer with its end, and the preprocessing of the images."""
    use_devices(monkeypatch, 1)
    world = runs.prepare(tmp_path)
    sizes = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = json.loads((llama2(tmp_path / "vlm") / "config.json").read_text())
    text |= {**sizes, "model_type": "llama", "hidden_size": 24, "max_position_embeddings": 512}
    vision = {**sizes, "model_type": "clip_vision_model", "hidden_size": 16, "image_size": 32}
    vision["patch_size"] = 8
    write_model(tmp_path / "text", text)
    write_model(tmp_path / "vision", vision, "vision_model.")
    tensors = {}
    for front, part in (("language_model.", "text"), ("vision_tower.", "vision")):
        own = load_file(tmp_path / part / "model.safetensors")
        tensors |= {f"{front}{name}": tensor for name, tensor in own.items()}
    vlm = tmp_path / "vlm"
    save_file(tensors, vlm / "model.safetensors")
    whole = {"model_type": "llava", "text_config": text, "vision_config": vision}
    (vlm / "config.json").write_text(json.dumps(whole))
    write_processor(vlm, {**CLIP, "size": {"shortest_edge": 32}, "crop_size": 32})
    config = runs.small(world)
    with config.unlocked():
        config.components.encoder = {"weights": str(vlm), "part": "vision"}
        config.components.llm = {"weights": str(vlm), "part": "text"}
        config.chain, config.evals = ("vadapter",), {}
        stage = config.stages.vadapter
        stage.update(chain=("front", "fc_out"), steps=2, evals=(), eval_every=0, exit_layer=0)
        stage.start = {}
        stage.optim.lr_mults = {}
        config.stages = {"vadapter": stage}
        config.tokenizer.data = ()
        config.data.images.update(text_len=80, target_len=78)
    train(read(config), tmp_path / "run")
    loaded = open_run(tmp_path / "run")
    assert loaded.view is not None
    assert (loaded.view.size, loaded.tokenizer.eos_id) == (32, 2)
    kernel = loaded.params["llm"]["stack"]["blocks"]["mlp"]["down"]["kernel"]
    theirs = tensors["language_model.model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(kernel[1], theirs.T)
    assert kernel.shape[0] == 2
    eyes = loaded.params["encoder"]["stack"]["blocks"]["mlp"]["up"]["kernel"]
    assert eyes.shape[0] == 1, "LLaVA reads the layer before the last"
