"""CoCa's image towers: small random models of open_clip give the same tokens, at both taps."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.original import draw, imported, their_warnings
from support.public_models import read_checkpoint

from vadapter.errors import CheckpointError, ConfigError
from vadapter.models.paths import flatten
from vadapter.models.registry import make_module
from vadapter.weights.families.openclip import FAMILIES, read_config
from vadapter.weights.hf_checkpoint import Checkpoint, complete, describe

VISION = {"image_size": 32, "layers": 3, "width": 32, "head_width": 8, "patch_size": 8,
          "attentional_pool": True, "attn_pooler_queries": 6, "attn_pooler_heads": 4,
          "output_tokens": True}  # fmt: skip
TEXT = {"context_length": 8, "vocab_size": 50, "width": 24, "heads": 2, "layers": 1}
MODEL = {
    "embed_dim": 24,
    "vision_cfg": VISION,
    "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
    "multimodal_cfg": TEXT | {"attn_pooler_heads": 2},
}
CASES = {
    "coca": {},
    "coca, quick gelu": {"quick_gelu": True},
    "coca, one width": {"vision_cfg": VISION | {"width": 24}},
}
ODD = {"image_size": 33, "layers": 2, "width": 60, "head_width": 20, "patch_size": 7}
PLAIN = {  # as MetaCLIP's and LAION's towers; the last as EVA's of LAION, with other options
    "plain": {"vision_cfg": ODD},
    "plain, quick gelu": {"vision_cfg": ODD, "quick_gelu": True},
    "plain, options": {
        "vision_cfg": ODD | {
            "ls_init_value": 0.5, "no_ln_pre": True, "mlp_ratio": 2.5, "pool_type": "avg",
            "norm_kwargs": {"eps": 1e-3}, "act_kwargs": {"approximate": "tanh"},
        },
    },
}  # fmt: skip
PUBLISHED = {"coca_ViT-B-32": 512, "coca_ViT-L-14": 768}
MEAN, STD = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]


@pytest.fixture(scope="module")
def open_clip():
    return imported("open_clip")


@pytest.fixture(scope="module")
def original(open_clip, tmp_path_factory):
    """case -> (random model, its folder), made as open_clip saves it."""
    torch, made = imported("torch"), {}
    torch.set_num_threads(1)

    def make(case):
        if case not in made:
            torch.manual_seed(0)
            plain = {k: v for k, v in MODEL.items() if k != "multimodal_cfg"} | {"text_cfg": TEXT}
            config = MODEL | CASES[case] if case in CASES else plain | PLAIN[case]
            make_model = open_clip.coca_model.CoCa if case in CASES else open_clip.model.CLIP
            with their_warnings(), torch.no_grad():
                model = make_model(**config).eval()
                for name, p in model.named_parameters():
                    p.copy_(draw(name, p))
            folder = tmp_path_factory.mktemp("coca")
            tensors = {k: v.contiguous().numpy() for k, v in model.state_dict().items()}
            save_file(tensors, folder / "open_clip_model.safetensors")
            pixels = {"mean": MEAN, "std": STD, "interpolation": "bicubic",
                      "resize_mode": "shortest"}  # fmt: skip
            both = {"model_cfg": config, "preprocess_cfg": pixels}
            (folder / "open_clip_config.json").write_text(json.dumps(both))
            made[case] = model, folder
        return made[case]

    return make


def ours(folder, **keys):
    """Our encoder of a folder, and its parameters."""
    module = make_module("encoder", complete({"weights": str(folder), **keys}, "weights"))
    size = module.config.image_size
    example = np.zeros((1, 1, size, size, 3), np.uint8)
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), example))["params"]
    params, report = read_checkpoint(Checkpoint.open(folder), shapes)
    return module, params, report


def images(size, count=3):
    return np.random.default_rng(1).integers(0, 256, (count, 2, size, size, 3), np.uint8)


def theirs(model, frames, until):
    """[B,F,N,D] of their tower: patch tokens of the last or penultimate layer, or queries."""
    torch = imported("torch")
    x = (frames / 255 - np.array(MEAN)) / np.array(STD)
    x = torch.tensor(x.reshape(-1, *frames.shape[2:]).transpose(0, 3, 1, 2), dtype=torch.float32)
    tower = model.visual
    with torch.no_grad():
        if until == "queries":
            out = model._encode_image(x)[1]
        else:
            out = tower._embeds(x)
            blocks = list(tower.transformer.resblocks)
            for block in blocks[: len(blocks) - (until == "penultimate")]:
                out = block(out)
            out = out[:, 1:]
    return out.numpy().reshape(*frames.shape[:2], *out.shape[1:])


@pytest.mark.parametrize("tap", ["last", "penultimate", "queries"])
@pytest.mark.parametrize("case", CASES)
def test_tokens_equal_the_originals_at_every_tap(case, tap, original):
    model, folder = original(case)
    module, params, _ = ours(folder, tap=tap)
    frames = images(32)
    found = np.asarray(module.apply({"params": params}, frames))
    expected = theirs(model, frames, tap)
    assert found.shape == (3, 2, module.tokens_per_frame(), module.width)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("tap", ["last", "penultimate"])
@pytest.mark.parametrize("case", PLAIN)
def test_tokens_of_a_plain_tower_equal_the_originals(case, tap, original):
    model, folder = original(case)
    module, params, _ = ours(folder, tap=tap)
    frames = images(33, count=2)
    found, expected = (
        np.asarray(module.apply({"params": params}, frames)),
        theirs(model, frames, tap),
    )
    assert found.shape == expected.shape == (2, 2, 16, 60)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
def test_every_vit_that_open_clip_configures_has_the_originals_tensors(open_clip):
    """At full size, without memory for it."""
    torch, names = imported("torch"), []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision = config["vision_cfg"]
        if vision.get("timm_model_name") or not isinstance(vision.get("layers"), int):
            continue
        quick = config.get("quick_gelu", False)
        with their_warnings(), torch.device("meta"):
            model = open_clip.model._build_vision_tower(config["embed_dim"], vision, quick)
        expected = {f"visual.{k}": tuple(v.shape) for k, v in model.named_parameters()}
        spec = FAMILIES["open_clip"].spec(read_config({"model_cfg": config}))
        module = make_module("encoder", spec)
        size = module.config.image_size
        example = np.zeros((1, 1, size, size, 3), np.uint8)
        leaves = flatten(
            nn.unbox(jax.eval_shape(module.init, jax.random.key(0), example))["params"]
        )
        used = set()
        for path, leaf in leaves.items():
            source = FAMILIES["open_clip"].names({})[0].source(path, leaf.shape)
            assert source is not None, (name, path)
            assert all(source.fits(expected[own]) for own in source.names), (name, path)
            used |= set(source.names)
        left = ("visual.proj", "visual.ln_post", "visual.attn_pool")
        assert not [k for k in expected.keys() - used if not k.startswith(left)], name
        assert spec["heads"] == model.transformer.resblocks[0].attn.num_heads
        names.append(name)
    assert len(names) > 50


def test_the_queries_are_those_the_caption_decoder_reads_and_the_first_is_not_among_them(original):
    module, params, _ = ours(original("coca")[1], tap="queries")
    assert module.tokens_per_frame() == VISION["attn_pooler_queries"] - 1
    assert module.width == MODEL["embed_dim"]
    assert params["pooler"]["queries"].shape == (1, 6, 24)


@pytest.mark.parametrize("size", [48, 24])
def test_another_resolution_resamples_the_positions_as_open_clip_does(size, original, open_clip):
    _, folder = original("coca")
    torch = imported("torch")
    config = MODEL | {"vision_cfg": VISION | {"image_size": size}}
    state = {
        k: torch.tensor(v) for k, v in load_file(folder / "open_clip_model.safetensors").items()
    }
    with their_warnings():
        model = open_clip.coca_model.CoCa(**config).eval()
        open_clip.model.resize_pos_embed(state, model)
        model.load_state_dict(state)
    module, params, _ = ours(folder, image_size=size, tap="queries")
    frames = images(size)
    found = np.asarray(module.apply({"params": params}, frames))
    np.testing.assert_allclose(found, theirs(model, frames, "queries"), atol=1e-4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_tower_has_the_parameters_of_open_clips_own(name, open_clip):
    torch = imported("torch")
    config = open_clip.get_model_config(name)
    config.pop("custom_text")
    with their_warnings(), torch.device("meta"):
        tower = open_clip.coca_model.CoCa(**config).visual
    count = sum(p.numel() for n, p in tower.named_parameters() if n != "proj")
    spec = FAMILIES["open_clip"].spec(read_config({"model_cfg": config}))
    module = make_module("encoder", {**spec, "tap": "queries"})
    example = np.zeros((1, 1, 224, 224, 3), np.uint8)
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), example))["params"]
    assert sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes)) == count
    assert (module.width, module.tokens_per_frame()) == (PUBLISHED[name], 255)


def test_without_the_queries_the_pooler_is_left_out_and_with_them_all_of_it_is_used(original):
    _, folder = original("coca")
    left_out = ours(folder, tap="last")[2].unused
    assert {"visual.attn_pool.query", "visual.ln_post.weight", "visual.proj"} <= set(left_out)
    left_out = ours(folder, tap="queries")[2].unused
    assert not [name for name in left_out if name.startswith("visual.") and name != "visual.proj"]


def test_pixels_are_normalized_as_the_folder_says(original):
    spec = describe(original("coca")[1])[1]
    assert (list(spec["mean"]), list(spec["std"])) == (MEAN, STD)
    assert spec["fit"] == "crop"


def test_an_unknown_tensor_of_the_tower_stops_the_import(original, tmp_path):
    _, folder = original("coca")
    tensors = load_file(folder / "open_clip_model.safetensors")
    tensors["visual.attn_pool.extra"] = np.zeros(3, np.float32)
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    text = (folder / "open_clip_config.json").read_text()
    (tmp_path / "open_clip_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"unexpected: visual\.attn_pool\.extra"):
        ours(tmp_path, tap="queries")


@pytest.mark.parametrize(
    ("key", "value"),
    [("attentional_pool", "parallel"), ("layers", [3, 4, 6, 3]),
     ("patch_size", "16"), ("norm_kwargs", {"elementwise_affine": False}), ("new_trick", True)],
)  # fmt: skip
def test_a_tower_that_is_built_another_way_is_refused_by_its_key(key, value):
    config = read_config({"model_cfg": MODEL | {"vision_cfg": VISION | {key: value}}})
    with pytest.raises(CheckpointError, match=rf"vision_cfg\.{key}=.* is not supported"):
        FAMILIES["open_clip"].spec(config)


def test_another_tap_without_a_pooler_is_refused():
    config = read_config(
        {"model_cfg": MODEL | {"vision_cfg": VISION | {"attentional_pool": False}}}
    )
    with pytest.raises(ConfigError, match="this encoder has no pooler; set last or penultimate"):
        make_module("encoder", FAMILIES["open_clip"].spec(config) | {"tap": "queries"})
