"""ViTs of timm: the table of architectures, and the tokens of small random models of each kind."""

import functools
import json
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from support import encoders
from support.encoders import load
from support.original import draw, imported, their_warnings
from support.processors import image

from vadapter.data.media.images import resize
from vadapter.errors import CheckpointError
from vadapter.models.registry import make_module
from vadapter.weights import hub
from vadapter.weights.families import openclip
from vadapter.weights.families.timm import FAMILIES, arguments, models
from vadapter.weights.hf_checkpoint import FAMILIES as HF_FAMILIES
from vadapter.weights.hf_checkpoint import describe

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 33, "patch_size": 7}
WHOLE = SMALL | {"img_size": 35}  # timm's models of any size refuse a border
# One of each kind of the table.
ARCHITECTURES = {
    "vit_so400m_patch14_siglip_384": SMALL | {"mlp_ratio": 3.7362},
    "vit_so400m_patch14_siglip_gap_384": SMALL,
    "vit_base_patch16_clip_quickgelu_224": SMALL,
    "vit_base_patch14_dinov2": SMALL,
    "vit_giant_patch14_reg4_dinov2": SMALL,
    "aimv2_large_patch14_224": SMALL,
    "vit_intern300m_patch14_448": WHOLE,
    "vit_base_patch16_224": SMALL,
    "eva02_base_patch14_224": SMALL,
    "eva02_small_patch14_224": SMALL,
    "eva02_base_patch16_clip_224": SMALL | {"ref_feat_shape": [5, 5]},
    "eva_giant_patch14_224": SMALL,
    "vit_pe_core_base_patch16_224": SMALL | {"ref_feat_shape": [6, 6]},
    "vit_pe_core_gigantic_patch14_448": SMALL,
    "vit_pe_lang_large_patch14_448": SMALL,
    "vit_base_patch16_dinov3": WHOLE,
    "vit_small_plus_patch16_dinov3_qkvb": WHOLE,
    "vit_base_patch16_rope_reg1_gap_256": SMALL,
    "vit_small_patch16_rope_ape_224": SMALL,
}
FAST = (
    "vit_so400m_patch14_siglip_384", "vit_giant_patch14_reg4_dinov2", "eva02_base_patch16_clip_224",
    "vit_pe_core_base_patch16_224", "vit_small_plus_patch16_dinov3_qkvb",
)  # fmt: skip
CASES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
         for name in ARCHITECTURES]  # fmt: skip
MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
PIXELS = {"input_size": [3, 33, 33], "interpolation": "bicubic", "crop_pct": 0.9,
          "crop_mode": "center", "mean": list(MEAN), "std": list(STD)}  # fmt: skip
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def timm():
    imported("torch").set_num_threads(1)
    return imported("timm")


@pytest.fixture(scope="module")
def original(timm, tmp_path_factory):
    """name -> (random model, its folder as timm saves it), made once."""
    torch = imported("torch")

    @functools.cache
    def make(name):
        with their_warnings(), torch.no_grad():
            torch.manual_seed(0)
            args = ARCHITECTURES[name]
            own = {k: tuple(v) if isinstance(v, list) else v for k, v in args.items()}
            model = timm.create_model(name, num_classes=0, **own).eval()
            for key, p in model.named_parameters():
                scale = "gamma" in key or key.endswith("norm.weight")
                p.copy_(draw("norm.weight" if scale else key, p))
        folder = tmp_path_factory.mktemp("timm")
        save_file(
            {k: v.contiguous().numpy() for k, v in model.state_dict().items()},
            folder / "model.safetensors",
        )
        config = {"architecture": name, "num_classes": 0, "model_args": args,
                  "pretrained_cfg": PIXELS}  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        return model, folder

    return make


def theirs(model, pixels, penultimate=False):
    torch = imported("torch")
    x = (pixels.reshape(-1, *pixels.shape[2:]) / 255 - np.array(MEAN)) / np.array(STD)
    with torch.no_grad():
        x = torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float32)
        if penultimate:
            only = {"intermediates_only": True, "output_fmt": "NLC", "norm": False}
            before = len(model.blocks) - 2
            return model.forward_intermediates(x, indices=[before], **only)[0].numpy()
        return model.forward_features(x)[:, model.num_prefix_tokens :].numpy()


def frames(size):
    return np.random.default_rng(0).integers(0, 256, (1, 2, size, size, 3), np.uint8)


def run(module, params, pixels):
    return encoders.run(module, params, pixels)[0]


@pytest.mark.parametrize("name", CASES)
def test_tokens_equal_the_originals(name, original):
    model, folder = original(name)
    module, params, report = load(folder)
    pixels = frames(module.config.image_size)
    expected, ours = theirs(model, pixels), run(module, params, pixels)
    assert ours.shape == expected.shape == (2, module.tokens_per_frame(), 48)
    assert np.abs(expected).max() > 1
    assert np.abs(ours - expected).max() < TOLERANCE
    left = [n for n in report.unused if not n.startswith(("attn_pool.", "fc_norm.", "head."))]
    assert not left


@pytest.mark.parametrize("name", CASES)
def test_the_penultimate_layer_is_that_of_the_original(name, original):
    model, folder = original(name)
    module, params, _ = load(folder, tap="penultimate")
    pixels = frames(module.config.image_size)
    expected = theirs(model, pixels, penultimate=True)
    assert np.abs(run(module, params, pixels) - expected).max() < TOLERANCE


@pytest.mark.parametrize("name", ["eva02_base_patch16_clip_224", "vit_so400m_patch14_siglip_384"])
def test_another_resolution_is_that_of_the_original(name, original, timm):
    torch = imported("torch")
    model, folder = original(name)
    module, params, _ = load(folder, image_size=45)
    own = {k: tuple(v) if isinstance(v, list) else v for k, v in ARCHITECTURES[name].items()}
    with their_warnings(), torch.no_grad():
        other = timm.create_model(name, num_classes=0, **own | {"img_size": 45}).eval()
        state = timm.models._helpers.clean_state_dict(model.state_dict())
        filtered = timm.models.eva if "eva" in name else timm.models.vision_transformer
        other.load_state_dict(filtered.checkpoint_filter_fn(state, other))
    assert np.abs(run(module, params, frames(45)) - theirs(other, frames(45))).max() < TOLERANCE


# -- towers of open_clip ---------------------------------------------------------------------------

TOWERS = {
    "vit_pe_core_tiny_patch16_384": ("map", None),  # of PE-Core-T-16-384
    "eva02_tiny_patch14_224": ("token", None),
    "vit_tiny_patch16_224": ("", "linear"),
}


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_of_open_clip_gives_the_originals_tokens(name, tmp_path):
    torch, open_clip = imported("torch"), imported("open_clip")
    pool, proj = TOWERS[name]
    with their_warnings(), torch.no_grad():
        torch.manual_seed(0)
        tower = open_clip.timm_model.TimmModel(name, 24, pool=pool, proj=proj).eval()
    size = tower.trunk.patch_embed.img_size[0]
    tensors = {f"visual.{k}": v.contiguous().numpy() for k, v in tower.state_dict().items()}
    tensors |= {"logit_scale": np.zeros(1), "text.token_embedding.weight": np.zeros((5, 24))}
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": size,
              "timm_model_pretrained": False, "timm_drop_path": 0.1}  # fmt: skip
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": {}},
              "preprocess_cfg": {"mean": MEAN, "std": STD}}  # fmt: skip
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    module, params, _ = load(tmp_path)
    pixels = frames(size)
    expected = theirs(tower.trunk, pixels)
    assert np.abs(run(module, params, pixels) - expected).max() < TOLERANCE


def test_the_towers_of_open_clips_own_configurations_are_read_where_they_are_vits():
    """All of its timm towers but ConvNeXt, FastViT, Swin, ViTamin and three of other blocks."""
    open_clip = imported("open_clip")
    read, left = 0, set()
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        if not (tower := config["vision_cfg"].get("timm_model_name")):
            continue
        try:
            own = openclip.read_config({"model_cfg": config})
            make_module("encoder", HF_FAMILIES[own["model_type"]].spec(own))
            read += 1
        except CheckpointError:
            left.add(tower)
    others = ("convnext", "fastvit", "swin", "vitamin")
    assert {tower for tower in left if not tower.startswith(others)} == {
        "eva02_enormous_patch14_clip_224", "vit_base_mci_224", "vit_relpos_medium_patch16_cls_224",
    }  # fmt: skip
    assert read > 35


# -- the table -----------------------------------------------------------------------------------


def shapes_of(spec, family):
    """Our tensors under their names, with their shapes, of the table that fits best."""
    module = make_module("encoder", spec)
    size = module.config.image_size
    ours = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1, size, size, 3))))
    leaves = jax.tree_util.tree_flatten_with_path(ours["params"])[0]

    def named(table):
        found = {}
        for path, leaf in leaves:
            source = table.source("/".join(k.key for k in path), leaf.shape)
            found |= dict.fromkeys(source.names if source else [str(path)], source)
        return found

    return [named(table) for table in family.names({})]


def every():
    return [name for table in models().values() for name in table]


@pytest.mark.parametrize(
    "name",
    [n if i % 40 == 0 else pytest.param(n, marks=pytest.mark.slow) for i, n in enumerate(every())],
)
def test_an_architecture_of_the_table_has_the_originals_tensors_heads_and_epsilons(name, timm):
    """At full size, without memory for it: every name, shape and constant that timm would build."""
    torch = imported("torch")
    with their_warnings(), torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    theirs = {k: tuple(v.shape) for k, v in model.named_parameters()}
    theirs = {k: v for k, v in theirs.items() if not k.startswith(("attn_pool.", "fc_norm."))}
    args = arguments(name, {})
    family = FAMILIES[args["model_type"]]
    spec = family.spec(args)
    found = min(shapes_of(spec, family), key=lambda names: len(names.keys() ^ theirs.keys()))
    assert found.keys() == theirs.keys()
    for key, source in found.items():
        assert source.fits(theirs[key]), key
    block = model.blocks[-1]
    assert spec["heads"] == block.attn.num_heads
    assert spec["norm_eps"] == block.norm1.eps
    assert (spec["norm"] == "rms") == ("Rms" in type(block.norm1).__name__)
    assert spec["image_size"] == model.patch_embed.img_size[0]
    acts = {"GELU": "gelu_erf", "GELUTanh": "gelu", "QuickGELU": "quick_gelu", "SiLU": "swiglu"}
    assert spec["mlp"] == acts[type(block.mlp.act).__name__]
    assert spec["final_norm"] == (type(model.norm).__name__ != "Identity")
    rope = getattr(model, "rope", None)
    assert ("rope" in spec) == (rope is not None)
    if rope is not None:
        own = spec["rope"]
        reference = getattr(rope, "ref_feat_shape", None)
        assert own["theta"] == rope.temperature
        assert own["offset"] == rope.grid_offset
        assert own["column_first"] == (rope.grid_indexing == "xy")
        assert own["reference"] == (reference[0] if reference else 0)
        assert args["model_type"].endswith("half") == block.attn.rotate_half


def test_the_readme_says_how_many_architectures_the_table_has():
    readme = Path(hub.__file__).with_name("README.md").read_text(encoding="utf-8")
    assert f"| {len(every())} ViTs of timm" in readme


def test_the_table_has_the_published_number_of_parameters():
    """Published with the models' cards; in millions, without pooling heads where they have one."""
    for name, count in {"vit_so400m_patch14_siglip_384": 412.99, "eva02_large_patch14_224": 303.27,
                        "vit_pe_core_large_patch14_336": 303.51}.items():  # fmt: skip
        args = arguments(name, {})
        spec = FAMILIES[args["model_type"]].spec(args)
        module = make_module("encoder", spec)
        size = spec["image_size"]
        shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1, size, size, 3)))
        total = sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(shapes)))
        assert round(total / 1e6, 2) == count, name


# -- config.json ---------------------------------------------------------------------------------


def write(folder, architecture="vit_base_patch16_siglip_224", pixels=PIXELS, **config):
    config = {"architecture": architecture, "pretrained_cfg": pixels, **config}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


REFUSED = {
    "another model": ({"architecture": "resnet50"}, "timm's 'resnet50' is not one of its"),
    "a misspelt one": ({"architecture": "vit_base_patch16_siglip_225"}, "_225' is not one"),
    "another block": ({"model_args": {"block_fn": "x"}}, "model_args.block_fn='x': it is not read"),
    "registers": ({"model_args": {"reg_tokens": 2}}, "reg_tokens=2: it is read with no_embed_cl"),
    "gray": ({"model_args": {"in_chans": 1}}, "in_chans=1: only 3 is read"),
    "a border": ({"pixels": PIXELS | {"crop_mode": "border"}}, "crop_mode='border'"),
    "squashed, cut": ({"pixels": PIXELS | {"crop_mode": "squash"}}, "with crop_pct=1 alone"),
    "oblong": ({"pixels": PIXELS | {"input_size": [3, 32, 48]}}, "not the side of a square"),
    "no pixels": ({"pixels": None}, "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_by_name(case, tmp_path):
    config, message = REFUSED[case]
    with pytest.raises(CheckpointError) as caught:
        describe(write(tmp_path, **config))
    assert message in str(caught.value)


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("shape", [(375, 501), (331, 257), (97, 641)])
def test_pixels_are_those_of_the_originals_transform(mode, shape, timm, tmp_path):
    pixels = PIXELS | {"input_size": [3, 56, 56], "crop_mode": mode, "interpolation": "bilinear"}
    pixels |= {"crop_pct": 1.0} if mode == "squash" else {}
    spec = describe(write(tmp_path, pixels=pixels))[1]
    view = make_module("encoder", spec).view
    with their_warnings():
        data = timm.data.resolve_data_config({}, pretrained_cfg=pixels)
        transform = timm.data.create_transform(**data, is_training=False)
        expected = transform(Image.fromarray(image(*shape))).numpy().transpose(1, 2, 0)
    ours = (resize(image(*shape)[None], view)[0] / 255 - np.array(MEAN)) / np.array(STD)
    assert np.abs(ours - expected).max() < 1e-5
