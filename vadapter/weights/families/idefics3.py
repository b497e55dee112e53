"""The vision encoders of Idefics 3 and SmolVLM: a SigLIP that numbers positions by share of a side.

Source: configuration_*.py and modeling_*.py of transformers' idefics3 and smolvlm.
"""

from vadapter.weights.families import clip
from vadapter.weights.families.family import COUNT, Config, Family, Key, Keys, Spec
from vadapter.weights.name_mapping import Table, Tokens

_TABLE = Table(
    layers="encoder.layers.{}.",
    modules={
        **clip.FAMILIES["siglip_vision_model"].names({})[0].modules,
        "positions": Tokens(
            "embeddings.position_embedding.weight", grid=0, kernel="nearest"
        ),
    },
)  # fmt: skip
_KEYS: Keys = {
    **clip.vit_keys(224, 32, "gelu_pytorch_tanh", 1e-6),
    "hidden_size": Key(1152, COUNT), "num_attention_heads": Key(16, COUNT),
    "intermediate_size": Key(3072, COUNT),
}  # fmt: skip


def _vision(c: Config) -> Spec:
    return clip.vit(c) | {
        "mlp_dim": c["intermediate_size"], "fit": "stretch", "interpolation": "lanczos"
    }  # fmt: skip


FAMILIES: dict[str, Family] = {
    "idefics3_vision": Family(_vision, (_TABLE,), _KEYS),
    "smolvlm_vision": Family(_vision, (_TABLE,), _KEYS),
}
