"""Every key of every family's config.json: read or ignored as by the original, or refused.

Each case edits one key of a small configuration, or a key of its group of rotary positions. Where
the original builds a model of it, the edited file must give the same outputs here, or an error for
users; where the original does not, anything but another exception. The keys are those of the
original's configuration, those that its code mentions, and those of all families' tables.
"""

import dataclasses
import importlib
import inspect
import json
import math
import re
import zlib
from pathlib import Path
from typing import ClassVar

import flax.linen as nn
import jax
import numpy as np
import pytest
from support.cases import some_slow
from support.original import draw, imported, their_warnings
from support.public_models import read_checkpoint

from vadapter.errors import UserError
from vadapter.models.registry import make_module
from vadapter.weights.hf_checkpoint import FAMILIES, LANGUAGE_MODELS, Checkpoint, describe

V, T, SIDE = 61, 14, 32
TOLERANCE = 2e-4
LM = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
      "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
      "pad_token_id": 0}  # fmt: skip
GROUPED = LM | {"num_key_value_heads": 2}
WIDE = GROUPED | {"head_dim": 16}
QUERIES = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8,
           "llama_4_scaling_beta": 0.3}  # fmt: skip
FAR = {"sliding_window": 5, "global_head_dim": 24, "num_hidden_layers": 2,
       "num_global_key_value_heads": 1,
       "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6,
         "linear_value_head_dim": 10}  # fmt: skip
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIDE,
       "patch_size": 8}  # fmt: skip
MLP = VIT | {"intermediate_size": 48}
EYES = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 4,
        "out_hidden_size": 16, "patch_size": 4}  # fmt: skip
CLIP = {"decoder_hidden_size": 12, "decoder_num_attention_heads": 1, "decoder_num_hidden_layers": 1,
        "decoder_intermediate_size": 16}  # fmt: skip
VJEPA2 = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "crop_size": SIDE,
          "patch_size": 8, "mlp_ratio": 1.5, "frames_per_clip": 4, "pred_hidden_size": 12,
          "pred_num_attention_heads": 1, "pred_num_hidden_layers": 1,
          "num_pooler_layers": 1}  # fmt: skip
TIMM = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
# model_type -> a small configuration. Every family of the library has one.
SMALL = {
    "llama": GROUPED,
    "mistral": WIDE | {"sliding_window": 5},
    "qwen2": GROUPED | {"sliding_window": 5, "max_window_layers": 1},
    "qwen3": WIDE | {"sliding_window": 5, "max_window_layers": 1},
    "gemma": WIDE,
    "gemma2": WIDE | {"sliding_window": 5, "query_pre_attn_scalar": 24},
    "gemma3_text": WIDE | {"sliding_window": 5, "sliding_window_pattern": 2},
    "gpt2": {"vocab_size": V, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gpt_neox": LM,
    "phi3": GROUPED | {"partial_rotary_factor": 0.5, "sliding_window": 5},
    "smollm3": GROUPED | {"no_rope_layer_interval": 2, "sliding_window": 5},
    "olmo2": GROUPED,
    "olmo3": GROUPED | {"sliding_window": 5},
    "granite": GROUPED | {"attention_multiplier": 0.3, "logits_scaling": 2.0},
    "granitemoehybrid": GROUPED
    | {
        "num_local_experts": 0,
        "shared_intermediate_size": 48,
        "mamba_expand": 1,
        "mamba_n_heads": 4,
        "layer_types": ["full_attention"] * 3,
        "logits_scaling": 2.0,
        "position_embedding_type": "rope",
    },
    "ministral": WIDE | {"sliding_window": 5},
    "ministral3": WIDE | {"rope_parameters": QUERIES},
    "stablelm": GROUPED,
    "qwen3_5_text": WIDE | {"full_attention_interval": 2, "num_hidden_layers": 4, **DELTA},
    "gemma4_text": WIDE | {"hidden_size_per_layer_input": 0, **FAR},
    "gemma4_unified_text": WIDE | FAR | {"attention_k_eq_v": True},
    "clip_vision_model": MLP,
    "metaclip_2_vision_model": MLP,
    "siglip_vision_model": MLP,
    "dinov2": VIT | {"mlp_ratio": 2},
    "dinov2_with_registers": VIT | {"mlp_ratio": 2},
    "dinov3_vit": MLP | {"num_register_tokens": 4},
    "aimv2_vision_model": MLP,
    "internvl_vision": MLP,
    "idefics3_vision": MLP,
    "smolvlm_vision": MLP,
    "siglip2_vision_model": MLP | {"num_patches": 16},
    "qwen2_5_vl_vision": EYES | {"window_size": 16, "fullatt_block_indexes": [1]},
    "qwen3_vl_vision": EYES | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    "qwen3_5_vision": EYES | {"num_position_embeddings": 16},
    "videomae": MLP | CLIP | {"num_frames": 4, "use_mean_pooling": False},
    "vjepa2": VJEPA2,
    "blip_2_qformer": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "encoder_hidden_size": 20,
    },
    "timm_vit": TIMM,
    "timm_eva": TIMM,
    "open_clip": {"layers": 2, "width": 32, "head_width": 8, "image_size": SIDE, "patch_size": 8},
}
# Families of no class of the libraries, or whose keys are those of another one's.
OTHERS = {"llama2c", "vadapter", "blip-2", "aimv2", "intern_vit_6b", "qwen2_5_vl_text",
          "qwen3_vl_text"}  # fmt: skip
# Group of rotary positions -> what a file has of it.
GROUPS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip

# Not about the computation: what is returned and how, in which dtype, by which kernel.
RUNTIME = {"model_type", "architectures", "dtype", "torch_dtype", "return_dict", "use_return_dict",
           "output_attentions", "output_hidden_states", "attn_implementation"}  # fmt: skip


def mentioned(transformers, config):
    """The names that the original's code reads from its configuration."""
    package = Path(transformers.__file__).parent
    files = [*Path(importlib.import_module(type(config).__module__).__file__).parent.glob("*.py")]
    files += [package / "masking_utils.py", package / "modeling_rope_utils.py"]
    files = [f for f in files if not f.name.startswith(("modular", "convert", "tokenization"))]
    pattern = (
        r"""config\.(\w+)|getattr\((?:self\.)?config, ["'](\w+)["']|kwargs\.\w+\(["'](\w+)["']"""
    )
    return {a or b or c for f in files for a, b, c in re.findall(pattern, f.read_text())}


def keys(transformers, config):
    """The keys that are edited, with the value that each has in the original."""
    config.allow_global_per_layer_attribute_access = True  # where layers have their own
    ours = {key for family in FAMILIES.values() for key in family.keys or ()}
    fields = {f.name for f in dataclasses.fields(config)}
    names = fields | mentioned(transformers, config) | ours | {*type(config).attribute_map}
    names = {n for n in names if not n.startswith("_") and not callable(getattr(config, n, None))}
    return {name: getattr(config, name, None) for name in sorted(names - RUNTIME)}


def values(value, depth):
    """The values that a key is given whose value is this one."""
    odd = [None, True, False, 0, 1, 2, 3, 0.5, "x", "1.5", [], [1], {}, {"rope_theta": 100.0}]
    if isinstance(value, bool):
        return [not value, *odd]
    if isinstance(value, int):
        return [2 * value, value + 1, value - 1, -value, float(value), *odd]
    if isinstance(value, float):
        return [2 * value, value / 2, -value, float("nan"), *odd]
    if isinstance(value, str):
        return ["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu",
                "swish", "tanh", *odd]  # fmt: skip
    kinds = ("full_attention", "sliding_attention", "chunked_attention")
    lists = [[kind] * depth for kind in kinds] + [[kinds[i % 2] for i in range(depth)]]
    return [*lists, lists[0][1:], *odd]


def edits(transformers, model_type):
    """(what was edited, config.json) of every case of a family."""
    base = {"model_type": model_type, **SMALL[model_type]}
    if model_type in LIBRARIES:
        depth, edited = 2, LIBRARIES[model_type].keys(base)
    else:
        config = transformers.CONFIG_MAPPING[model_type].from_dict(base)
        depth, edited = config.num_hidden_layers, keys(transformers, config)
    for name, value in edited.items():
        yield f"without {name}", {k: v for k, v in base.items() if k != name}
        for new in values(value, depth):
            yield f"{name}={new!r}", base | {name: new}
    if "rope_parameters" not in (FAMILIES[model_type].keys or ()):
        return
    inside = {**GROUPS["llama3"], **GROUPS["yarn"], "beta_fast": 16.0, "beta_slow": 2.0,
              "mscale": 0.7, "mscale_all_dim": 0.5, "attention_factor": 1.5, "truncate": True,
              "partial_rotary_factor": 0.5, "rope_theta": 100.0, "type": "linear",
              "rope_type": "yarn"}  # fmt: skip
    for key in ("rope_scaling", "rope_parameters"):
        for kind, group in GROUPS.items():
            beside = {} if key == "rope_parameters" else {"rope_parameters": GROUPS["linear"]}
            nested = {key: {"full_attention": group, "sliding_attention": group}}
            for groups in ({key: group}, beside | {key: group}, nested):
                yield f"{groups}", base | groups
            yield f"{kind}, longer", base | {key: group, "original_max_position_embeddings": 8}
            for name, value in inside.items():
                yield (
                    f"{key}: {kind} without {name}",
                    base | {key: {k: v for k, v in group.items() if k != name}},
                )
                for new in (value, *values(value, depth)):
                    yield f"{key}: {kind}, {name}={new!r}", base | {key: {**group, name: new}}


class Timm:
    """ViTs of timm: the keys are arguments of their class, in `model_args` of config.json."""

    architectures: ClassVar = {"timm_vit": "vit_base_patch16_224",
                               "timm_eva": "eva02_base_patch14_224"}  # fmt: skip
    pixels: ClassVar = {"input_size": [3, SIDE, SIDE], "interpolation": "bicubic", "crop_pct": 1.0,
                        "mean": [0.0] * 3, "std": [1.0] * 3}  # fmt: skip

    def keys(self, base):
        cls = {"timm_vit": "VisionTransformer", "timm_eva": "Eva"}[base["model_type"]]
        parameters = inspect.signature(getattr(imported("timm").models, cls)).parameters
        table = FAMILIES[base["model_type"]].keys or {}
        defaults = {name: p.default for name, p in parameters.items()}
        defaults |= {name: key.default for name, key in table.items()} | base
        return {k: v for k, v in defaults.items() if k not in ("model_type", "preprocess")}

    def files(self, config):
        args = {k: v for k, v in config.items() if k != "model_type"}
        name = self.architectures[config["model_type"]]
        whole = {"architecture": name, "model_args": args, "pretrained_cfg": self.pixels}
        return {"config.json": whole}

    def build(self, config):
        whole = self.files(config)["config.json"]
        # Some classes have a size of their own, but the file says what images the model takes.
        own = {k: v for k, v in whole["model_args"].items() if v is not None}
        return imported("timm").create_model(
            whole["architecture"], num_classes=0, **{"img_size": SIDE, **own}
        )

    def outputs(self, torch, model):
        x = images_of(model.patch_embed.img_size[0])[:, 0].transpose(0, 3, 1, 2) / 255
        x = torch.tensor(x).to(next(model.parameters()).dtype)
        return model.forward_features(x)[:, model.num_prefix_tokens :]


class OpenClip:
    """Towers of open_clip: the keys are those of `vision_cfg`."""

    text: ClassVar = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}

    def keys(self, base):
        config = imported("open_clip").CLIPVisionCfg()
        fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        return fields | {k: v for k, v in base.items() if k != "model_type"}

    def files(self, config):
        own = {k: v for k, v in config.items() if k != "model_type"}
        model = {"embed_dim": 16, "vision_cfg": own, "text_cfg": self.text}
        return {"open_clip_config.json": {"model_cfg": model, "preprocess_cfg": {}}}

    def build(self, config):
        return imported("open_clip").model.CLIP(
            **self.files(config)["open_clip_config.json"]["model_cfg"]
        )

    def outputs(self, torch, model):
        tower = model.visual
        x = images_of(int(np.max(tower.image_size)))[:, 0].transpose(0, 3, 1, 2) / 255
        x = torch.tensor(x).to(next(model.parameters()).dtype)
        return tower.transformer(tower._embeds(x))[:, 1:]


# Families of other libraries than transformers.
LIBRARIES = {"timm_vit": Timm(), "timm_eva": Timm(), "open_clip": OpenClip()}


def _pixels(torch, model, size):
    x = torch.tensor(images_of(size)[:, 0].transpose(0, 3, 1, 2) / 255)
    return x.to(model.dtype)


def _clip(torch, model):
    c = model.config
    size = c.crop_size if c.model_type == "vjepa2" else c.image_size
    frames = getattr(c, "num_frames", 2 * c.tubelet_size) // c.tubelet_size * c.tubelet_size
    x = torch.tensor(images_of(size, frames).transpose(0, 1, 4, 2, 3) / 255).to(model.dtype)
    options = {"skip_predictor": True} if c.model_type == "vjepa2" else {}
    return model(x, **options).last_hidden_state


def _naflex(torch, model):
    c = model.config
    side, p = math.isqrt(c.num_patches), c.patch_size
    x = _pixels(torch, model, side * p).reshape(2, 3, side, p, side, p)
    x = x.permute(0, 2, 4, 3, 5, 1).reshape(2, side**2, -1)
    mask, shapes = torch.ones(2, side**2, dtype=torch.int64), torch.tensor([[side, side]] * 2)
    return model(x, mask, shapes).last_hidden_state


def _qwen(torch, model):
    """What the merger reads, row by row of patches."""
    c, seen, side = model.config, [], GRID
    m, p, frames = c.spatial_merge_size, c.patch_size, c.temporal_patch_size
    x = _pixels(torch, model, side * p).reshape(2, 3, side // m, m, p, side // m, m, p)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]
    x = x.repeat(1, 1, 1, 1, 1, 1, frames, 1, 1).reshape(2 * side**2, -1)
    handle = model.merger.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    grid = torch.tensor([[1, side, side]] * 2)
    try:
        model(x, grid)
    finally:
        handle.remove()
    units = np.arange((side // m) ** 2)
    if c.model_type == "qwen2_5_vl_vision":
        from transformers.vision_utils import get_vision_window_index

        units = get_vision_window_index(grid[:1], m, c.window_size, p)[0].numpy()
    tokens = seen[-1].reshape(2, len(units), m, m, -1)
    blocks = torch.zeros_like(tokens)
    blocks[:, units] = tokens
    blocks = blocks.reshape(2, side // m, side // m, m, m, -1).permute(0, 1, 3, 2, 4, 5)
    return blocks.reshape(2, side**2, -1)


def _queries(torch, model):
    queries, seen = (torch.tensor(x).to(model.dtype) for x in (QUERY, SEEN))
    return model(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state


# Outputs that are not those of all encoders of images.
OUTPUTS = {"videomae": _clip, "vjepa2": _clip, "siglip2_vision_model": _naflex,
           "qwen2_5_vl_vision": _qwen, "qwen3_vl_vision": _qwen,
           "qwen3_5_vision": _qwen,
           "blip_2_qformer": _queries}  # fmt: skip
GRID = 8  # patches a side of an encoder of images of any shape


class Sweep:
    """Builds models of edited files, there and here, and says how they differ."""

    def __init__(self, torch, transformers, folder):
        self.torch, self.transformers, self.folder = torch, transformers, folder
        self.ours = {}  # of a spec

    def original(self, config):
        """(model, outputs) of the original; raises where it refuses the file."""
        torch = self.torch
        build = self.builder(config)
        with torch.device("meta"):
            count = sum(p.numel() for p in build().parameters())
        if count > 3e6:
            raise ValueError("defaults of full size")
        model = build().eval()
        for name, p in model.named_parameters():
            torch.manual_seed(zlib.crc32(name.encode()))
            p.copy_(draw(name, p))
        out = self.outputs(model, config)
        assert np.isfinite(out).all()
        return model, out

    def builder(self, config):
        """A function that builds the original's model of a file, as the original reads it."""
        config = json.loads(json.dumps(config))
        if (model_type := config["model_type"]) in LIBRARIES:
            return lambda: LIBRARIES[model_type].build(config)
        text = is_text(model_type)
        auto = self.transformers.AutoModelForCausalLM if text else self.transformers.AutoModel
        edited = self.transformers.CONFIG_MAPPING[model_type].from_dict(config)
        edited._attn_implementation = "eager"
        return lambda: auto.from_config(edited)

    def outputs(self, model, config):
        """Its logits, its tokens of patches, or its queries."""
        if (model_type := config["model_type"]) in LIBRARIES:
            return LIBRARIES[model_type].outputs(self.torch, model).numpy()
        if is_text(model_type):
            return model(self.torch.tensor(TOKENS)).logits.numpy()
        if model_type in OUTPUTS:
            return OUTPUTS[model_type](self.torch, model).numpy()
        size, patch = (int(np.max(v)) for v in (model.config.image_size, model.config.patch_size))
        side = size // patch
        # Class token and registers are in front.
        out = model(_pixels(self.torch, model, size)).last_hidden_state
        return out[:, -side * side :].numpy()

    def spec(self, config):
        """The spec of a file here."""
        if (model_type := config["model_type"]) not in LIBRARIES:
            return FAMILIES[model_type].spec(config)
        self.write(config)
        return describe(self.folder / model_type)[1]

    def write(self, config):
        """Write what describes a model to the folder of its family."""
        folder = self.folder / (model_type := config["model_type"])
        folder.mkdir(exist_ok=True)
        library = LIBRARIES.get(model_type)
        for name, content in (
            library.files(config) if library else {"config.json": config}
        ).items():
            (folder / name).write_text(json.dumps(content))
        return folder

    def here(self, config, model):
        """The outputs of the file here, with the original's weights."""
        spec = json.dumps([config["model_type"], self.spec(config)], sort_keys=True)
        if spec not in self.ours:
            folder = self.folder / config["model_type"]
            folder.mkdir(exist_ok=True)
            tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
            self.save(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            self.write(config)
            self.ours[spec] = self.run(Checkpoint.open(folder), config["model_type"])
        return self.ours[spec]

    def save(self, tensors, file, **options):
        from safetensors.torch import save_file

        owners = {}  # of tensors that are tied, the first counts
        for name, tensor in tensors.items():
            owners.setdefault(tensor.data_ptr(), name)
        save_file({name: tensors[name] for name in owners.values()}, file, **options)

    def run(self, checkpoint, model_type):
        """The outputs of a checkpoint here, in the shape of the original's."""
        plain = {} if is_text(model_type) else {"mean": (0, 0, 0), "std": (1, 1, 1)}
        if OUTPUTS.get(model_type) is _qwen:
            plain["image_size"] = GRID * checkpoint.spec["patch"]
        queries = model_type == "blip_2_qformer"
        if queries:
            plain = {"queries": QUERY.shape[1], "norm_visual": False}
            checkpoint = dataclasses.replace(checkpoint, fresh=frozenset({"queries"}))
        module = make_module("model", {**checkpoint.spec, **plain})
        if queries:
            inputs = SEEN[:, None]
        elif is_text(model_type):
            inputs = TOKENS
        else:
            frames = 1
            if checkpoint.spec["kind"] == "video_vit":
                frames = checkpoint.spec.get("frames") or 2 * checkpoint.spec["tubelet"]
            inputs = images_of(module.config.image_size, frames)
        shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)
        params, _ = read_checkpoint(checkpoint, nn.unbox(shapes)["params"])
        if queries:
            params["queries"] = QUERY[:1]
        with jax.disable_jit():
            out = np.asarray(module.apply({"params": params}, inputs))
        return out if is_text(model_type) or queries else out.reshape(2, -1, out.shape[-1])

    def fault(self, config):
        """What is wrong with how a file is read; "" if nothing is."""
        try:
            with their_warnings(), self.torch.no_grad():
                model, theirs = self.original(config)
        except Exception:
            model = None
        try:
            if model is None:
                self.spec(config)
                return ""
            ours = self.here(config, model)
        except UserError:
            return ""
        except Exception as e:
            return f"{type(e).__name__}: {e}"
        if ours.shape != theirs.shape:
            return f"shape {ours.shape}, not {theirs.shape}"
        far = np.abs(ours - theirs).max()
        if far < TOLERANCE:
            return ""
        with their_warnings(), self.torch.no_grad():  # how far float32 takes the original itself
            rounding = np.abs(np.nan_to_num(self.outputs(model.double(), config)) - theirs).max()
        return f"differs by {far:.2g}" if far > TOLERANCE + 4 * min(rounding, 0.01) else ""


TOKENS = np.random.default_rng(0).integers(3, V, (2, T))
QUERY = np.repeat(np.random.default_rng(0).standard_normal((1, 3, 32), np.float32), 2, 0)
SEEN = np.random.default_rng(1).standard_normal((2, 5, 20), np.float32)


def is_text(model_type):
    """Whether a family is one of language models."""
    return model_type in LANGUAGE_MODELS


def images_of(size, frames=1):
    return np.random.default_rng(0).integers(0, 256, (2, frames, size, size, 3), np.uint8)


@pytest.fixture(scope="module")
def sweep(originals, tmp_path_factory):
    return Sweep(*originals, tmp_path_factory.mktemp("edited"))


def test_every_family_of_the_library_is_swept():
    towers = {name for name in FAMILIES if "timm" in name} - {*SMALL}  # of the same two classes
    assert {*SMALL, *OTHERS, *towers} == {*FAMILIES}


# The fast tests take one edit of so many, of one family of each kind of reader.
STEP = 499
QUICK = ("llama", "gemma3_text", "qwen3", "ministral3", "clip_vision_model", "dinov3_vit",
         "timm_eva", "videomae", "qwen2_5_vl_vision", "blip_2_qformer")  # fmt: skip
FAST = [(model_type, STEP) for model_type in QUICK]


@pytest.mark.parametrize(
    ("model_type", "step"), some_slow([*((m, 1) for m in SMALL), *FAST], fast=FAST)
)
def test_every_edited_key_is_read_as_by_the_original_or_refused(model_type, step, sweep):
    cases = list(edits(sweep.transformers, model_type))[::step]
    faults = [f"{what}: {fault}" for what, config in cases if (fault := sweep.fault(config))]
    assert not faults, f"{len(faults)} of {len(cases)}:\n" + "\n".join(faults)
