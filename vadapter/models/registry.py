"""Component kinds and named sizes, and how a component's configuration becomes a module.

A component is written as `{size: NAME, …}` or `{kind: KIND, …}`; other keys override fields.
"""

import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from vadapter.config import build, require_one_of

if TYPE_CHECKING:
    import flax.linen as nn

    from vadapter.models.layers import Dtype

# kind -> its module class, beside which is a dataclass of the same name and `Config`. Imported when
# a recipe uses it.
KINDS: dict[str, str] = {
    "vit": "vadapter.models.vit:ViT",
    "video_vit": "vadapter.models.video_vit:VideoViT",
    "mobilenet": "vadapter.models.mobilenet:MobileNet",
    "resampler": "vadapter.models.adapters.resampler:Resampler",
    "pooler": "vadapter.models.adapters.pooler:Pooler",
    "qformer": "vadapter.models.adapters.qformer:QFormer",
    "mlp": "vadapter.models.adapters.mlp:MlpAdapter",
    "c_abstractor": "vadapter.models.adapters.c_abstractor:CAbstractor",
    "cross_attention": "vadapter.models.adapters.cross_attention:CrossAttention",
    "words": "vadapter.models.adapters.words:Words",
    "fc": "vadapter.models.adapters.projection:Projection",
    "lm": "vadapter.models.lm:LM",
    "fusion": "vadapter.models.coca:Fusion",
}

# Kinds that turn frames into visual tokens: a stage's encoder is one of them.
ENCODERS = ("vit", "video_vit", "mobilenet")

_coca = {"kind": "vit", "image_size": 288, "patch": 18}
_mlp = {"kind": "mlp", "frames": 8}
_palm = {"kind": "lm", "vocab_size": 256_000, "kv_heads": 1}

# CoCa's encoders at the paper's 288 px and patch 18: 256 tokens a frame (paper, section 4.1; widths
# from arXiv 2205.01917, Table 1). PaLM 2's sizes are not public: these have PaLM's published block
# and, without embeddings, 107M, 1.08B and 8.59B parameters.
SIZES: dict[str, dict[str, Any]] = {
    "coca_b": _coca | {"width": 768, "depth": 12, "heads": 12, "mlp_dim": 3072},
    "coca_l": _coca | {"width": 1024, "depth": 24, "heads": 16, "mlp_dim": 4096},
    "coca_g": _coca | {"width": 1408, "depth": 40, "heads": 16, "mlp_dim": 6144},
    "tlm_108m": _palm | {"width": 768, "depth": 12, "heads": 12, "head_dim": 64, "mlp_dim": 3328},
    "llm_1b": _palm | {"width": 2048, "depth": 18, "heads": 8, "head_dim": 256, "mlp_dim": 8192},
    "llm_8b": _palm | {"width": 4096, "depth": 32, "heads": 16, "head_dim": 256, "mlp_dim": 18944},
    "resampler_x1": {"kind": "resampler", "layers": 1},
    "resampler_x6": {"kind": "resampler", "layers": 6},
    "qformer_blip2": {"kind": "qformer"},  # BLIP-2 (arXiv 2301.12597)
    "linear": _mlp | {"layers": 1},  # LLaVA (arXiv 2304.08485)
    "mlp_2": _mlp | {"layers": 2},  # LLaVA 1.5 (arXiv 2310.03744)
    # nanoVLM (models/modality_projector.py)
    "shuffle_4_linear": _mlp
    | {"pool": "shuffle", "factor": 4, "layers": 1, "bias": False, "kernel_std": 0.02},
    # InternVL 1.5 (arXiv 2404.16821); VILA's mlp_downsample (arXiv 2412.04468)
    "shuffle_2_mlp": _mlp | {"pool": "shuffle", "factor": 2, "layers": 2, "norm": True},
    "mean_2_mlp": _mlp | {"pool": "mean", "factor": 2, "layers": 2},  # DeCo (arXiv 2405.20985)
    # Perception-LM (arXiv 2504.13180)
    "mlp_mean_2": _mlp | {"pool": "mean_after", "factor": 2, "layers": 2},
}


def load_kind(kind: str) -> "tuple[type, type[nn.Module]]":
    """Import a kind; return its config dataclass and its module class."""
    return pkgutil.resolve_name(f"{KINDS[kind]}Config"), pkgutil.resolve_name(KINDS[kind])


def expand(name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the component's spec with its named size filled in; keeps `kind`, drops `size`."""
    spec = dict(spec)
    size = spec.pop("size", "")
    if size:
        require_one_of(f"components.{name}.size={size!r}", size, SIZES)
    spec = SIZES.get(size, {}) | spec
    kind = spec.get("kind", "")
    require_one_of(f"components.{name}.kind={kind!r}", kind, KINDS)
    return spec


def make_module(
    name: str, spec: Mapping[str, Any], *, dtype: "Dtype" = jnp.float32, **derived: Any
) -> "nn.Module":
    """Return the module of a component.

    Args:
      spec: `kind` or `size`, and fields of the kind's config; `weights` and `part` are ignored.
      **derived: values for the fields in the config's `DERIVED` that are empty in the spec, such as
        `width`, `vocab_size`, `grid`.

    Raises:
      ConfigError: unknown kind, size or field, or an invalid value.
    """
    spec = expand(name, spec)
    for key in ("weights", "part"):
        spec.pop(key, None)
    config_type, module_type = load_kind(spec.pop("kind"))
    for key in getattr(config_type, "DERIVED", ()):
        if key in derived and not spec.get(key):
            spec[key] = derived[key]
    return module_type(build(config_type, spec, f"components.{name}"), dtype=dtype)  # type: ignore[call-arg]
