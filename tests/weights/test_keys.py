"""Every key of every family's config.json: read or ignored as by the original, or refused.

Each case edits one key of a small configuration, or a key of its group of rotary positions. Where
the original builds a model of it, the edited file must give the same outputs here, or an error for
users; where the original does not, anything but another exception. The keys are those of the
original's configuration, those that its code mentions, and those of all families' tables.
"""

import dataclasses
import importlib
import json
import re
import zlib
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from support.cases import some_slow
from support.original import draw, their_warnings
from support.public_models import read_checkpoint

from vadapter.errors import UserError
from vadapter.models.registry import make_module
from vadapter.weights.hf_checkpoint import FAMILIES, Checkpoint

V, T, SIDE = 61, 14, 32
TOLERANCE = 2e-4
LM = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
      "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
      "pad_token_id": 0}  # fmt: skip
GROUPED = LM | {"num_key_value_heads": 2}
WIDE = GROUPED | {"head_dim": 16}
QUERIES = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8,
           "llama_4_scaling_beta": 0.3}  # fmt: skip
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIDE,
       "patch_size": 8}  # fmt: skip
MLP = VIT | {"intermediate_size": 48}
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
    "ministral": WIDE | {"sliding_window": 5},
    "ministral3": WIDE | {"rope_parameters": QUERIES},
    "stablelm": GROUPED,
    "clip_vision_model": MLP,
    "metaclip_2_vision_model": MLP,
    "siglip_vision_model": MLP,
    "dinov2": VIT | {"mlp_ratio": 2},
    "dinov2_with_registers": VIT | {"mlp_ratio": 2},
    "dinov3_vit": MLP | {"num_register_tokens": 4},
    "aimv2_vision_model": MLP,
    "internvl_vision": MLP,
}
# Families of other libraries, of other inputs or parts, or of no class of transformers.
OTHERS = {"llama2c", "vadapter", "open_clip", "siglip2_vision_model", "blip-2", "blip_2_qformer",
          "aimv2", "intern_vit_6b", "videomae", "vjepa2", "smolvlm_vision",
          "idefics3_vision", "qwen2_5_vl_text", "qwen2_5_vl_vision", "qwen3_vl_text",
          "qwen3_vl_vision"}  # fmt: skip
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
    config = transformers.CONFIG_MAPPING[model_type].from_dict(base)
    depth = config.num_hidden_layers
    for name, value in keys(transformers, config).items():
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


class Sweep:
    """Builds models of edited files, there and here, and says how they differ."""

    def __init__(self, torch, transformers, folder):
        self.torch, self.transformers, self.folder = torch, transformers, folder
        self.ours = {}  # of a spec

    def original(self, config):
        """(model, outputs) of the original; raises where it refuses the file."""
        torch, text = self.torch, "vocab_size" in SMALL[config["model_type"]]
        kind = self.transformers.CONFIG_MAPPING[config["model_type"]]
        auto = self.transformers.AutoModelForCausalLM if text else self.transformers.AutoModel
        edited = kind.from_dict(json.loads(json.dumps(config)))
        edited._attn_implementation = "eager"
        with torch.device("meta"):
            count = sum(p.numel() for p in auto.from_config(edited).parameters())
        if count > 3e6:
            raise ValueError("defaults of full size")
        model = auto.from_config(edited).eval()
        for name, p in model.named_parameters():
            torch.manual_seed(zlib.crc32(name.encode()))
            p.copy_(draw(name, p))
        out = self.outputs(model, config)
        assert np.isfinite(out).all()
        return model, out

    def outputs(self, model, config):
        """Its logits, or its tokens of patches."""
        if "vocab_size" in SMALL[config["model_type"]]:
            return model(self.torch.tensor(TOKENS)).logits.numpy()
        size, patch = (int(np.max(v)) for v in (model.config.image_size, model.config.patch_size))
        side = size // patch
        images = self.torch.tensor(images_of(size)[:, 0].transpose(0, 3, 1, 2) / 255)
        # Class token and registers are in front.
        return model(images.to(model.dtype)).last_hidden_state[:, -side * side :].numpy()

    def here(self, config, model):
        """The outputs of the file here, with the original's weights."""
        spec = json.dumps(FAMILIES[config["model_type"]].spec(config), sort_keys=True)
        if spec not in self.ours:
            model.save_pretrained(self.folder)
            (self.folder / "config.json").write_text(json.dumps(config))
            checkpoint = Checkpoint.open(self.folder)
            plain = {"mean": (0, 0, 0), "std": (1, 1, 1)} if "image_size" in spec else {}
            module = make_module("model", {**checkpoint.spec, **plain})
            inputs = images_of(module.config.image_size) if plain else TOKENS
            shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)
            params, _ = read_checkpoint(checkpoint, nn.unbox(shapes)["params"])
            with jax.disable_jit():
                out = np.asarray(module.apply({"params": params}, inputs))
            self.ours[spec] = out[:, 0] if plain else out
        return self.ours[spec]

    def fault(self, config):
        """What is wrong with how a file is read; "" if nothing is."""
        try:
            with their_warnings(), self.torch.no_grad():
                model, theirs = self.original(config)
        except Exception:
            model = None
        try:
            if model is None:
                FAMILIES[config["model_type"]].spec(config)
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


def images_of(size):
    return np.random.default_rng(0).integers(0, 256, (2, 1, size, size, 3), np.uint8)


@pytest.fixture(scope="module")
def sweep(originals, tmp_path_factory):
    return Sweep(*originals, tmp_path_factory.mktemp("edited"))


def test_every_family_of_the_library_is_swept():
    assert {*SMALL, *OTHERS} == {name for name in FAMILIES if "timm" not in name}


# The fast tests take one edit of so many.
STEPS = some_slow([1, 499], fast=[499])


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("model_type", SMALL)
def test_every_edited_key_is_read_as_by_the_original_or_refused(model_type, step, sweep):
    cases = list(edits(sweep.transformers, model_type))[::step]
    faults = [f"{what}: {fault}" for what, config in cases if (fault := sweep.fault(config))]
    assert not faults, f"{len(faults)} of {len(cases)}:\n" + "\n".join(faults)
