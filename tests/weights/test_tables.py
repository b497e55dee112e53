"""What a table lets a checkpoint have unused, it never maps; and such tensors exist."""

import re

import pytest

from vadapter.io.json_files import COMPONENT_FORMAT
from vadapter.weights.hf_checkpoint import FAMILIES
from vadapter.weights.name_mapping import Patches, Tokens

# What tables depend on, of the smallest model of a family.
SPEC = {"heads": 1, "kv_heads": 1, "head_dim": 1, "windows": (1, 0)}
TABLES = [
    pytest.param(table, id=f"{name}-{i}")
    for name, family in FAMILIES.items()
    if name != COMPONENT_FORMAT  # which has our names
    for i, table in enumerate(family.names(SPEC))
]
ENDS = (  # not of a layer
    "embedding", "head", "norm", "position_embedding", "patches", "pre_norm", "norm_visual",
)  # fmt: skip

# Pattern: tensors of published checkpoints that it is for, and of which one.
REAL = {
    r"rotary_emb\.inv_freq$": [
        "model.layers.0.self_attn.rotary_emb.inv_freq",  # huggyllama/llama-7b
        "gpt_neox.layers.5.attention.rotary_emb.inv_freq",  # EleutherAI/pythia-160m
    ],
    r"^(vjepa2\.)?predictor\.": [  # facebook/vjepa2-vitl-fpc64-256, -fpc16-256-ssv2
        "predictor.embeddings.mask_tokens",
        "vjepa2.predictor.layer.11.mlp.fc1.weight",
    ],
    r"^(pooler|classifier)\.": ["pooler.query_tokens", "classifier.weight"],
    r"^(decoder|encoder_to_decoder|fc_norm|classifier)\.": [
        "decoder.norm.weight",  # MCG-NJU/videomae-base
        "encoder_to_decoder.weight",
        "fc_norm.weight",  # MCG-NJU/videomae-base-finetuned-kinetics
        "classifier.bias",
    ],
    r"^mask_token$": ["mask_token"],
    r"^mtp\.": ["mtp.fc.weight", "mtp.layers.0.self_attn.q_proj.weight"],  # Qwen/Qwen3.5-4B
    r"^(merger|deepstack_merger_list)\.": [
        "merger.ln_q.weight",  # Qwen/Qwen2.5-VL-3B-Instruct, behind "visual."
        "deepstack_merger_list.0.linear_fc1.weight",  # Qwen/Qwen3-VL-4B-Instruct
    ],
    r"\.attn\.(masked_)?bias$": [  # openai-community/gpt2
        "h.0.attn.bias",
        "transformer.h.11.attn.masked_bias",
    ],
    r"attention\.(masked_)?bias$": [  # EleutherAI/pythia-160m
        "gpt_neox.layers.0.attention.bias",
        "gpt_neox.layers.0.attention.masked_bias",
    ],
    r"^text_model\.": [  # openai/clip-vit-base-patch32, google/siglip-base-patch16-224
        "text_model.embeddings.token_embedding.weight",
        "text_model.encoder.layers.0.layer_norm1.bias",
        "text_model.head.weight",
    ],
    r"^logit_(scale|bias)$": ["logit_scale", "logit_bias"],
    r"^(visual|text)_projection\.": ["visual_projection.weight", "text_projection.weight"],
    r"position_ids$": [
        "vision_model.embeddings.position_ids",
        "text_model.embeddings.position_ids",
    ],
    r"^(vision_model\.)?head\.": [
        "vision_model.head.probe",
        "vision_model.head.attention.in_proj_weight",
        "vision_model.head.mlp.fc1.weight",
    ],
    r"mask_token$": ["embeddings.mask_token"],  # facebook/dinov2-base
    r"^classifier\.": ["classifier.weight"],  # facebook/dinov2-base-imagenet1k-1-layer
    r"^visual\.head\.": ["visual.head.proj.weight"],  # of open_clip around a model of timm
    r"^(?!visual\.)": [  # laion/CoCa-ViT-L-14-laion2B-s13B-b90k
        "text.token_embedding.weight",
        "text_decoder.cross_attn.0.attn.in_proj_weight",
        "logit_scale",
    ],
    r"^visual\.proj$": ["visual.proj"],
    r"^(visual\.trunk\.)?(head|fc_norm|attn_pool)\.": [
        "visual.trunk.attn_pool.latent",  # timm/ViT-SO400M-14-SigLIP-384
        "head.weight",  # timm/vit_base_patch16_224.augreg_in21k
        "fc_norm.bias",  # timm/eva02_large_patch14_448.mim_m38m_ft_in22k_in1k
    ],
    r"^text\.": ["text.transformer.resblocks.0.attn.in_proj_weight"],
    r"^freqs_(cos|sin)$": ["freqs_cos", "freqs_sin"],  # llama2.c
    r"^qformer\.encoder\.layer\.\d+\.(intermediate|output)\.": [  # Salesforce/blip2-itm-vit-g
        "qformer.encoder.layer.0.intermediate.dense.weight",
        "qformer.encoder.layer.11.output.LayerNorm.bias",
    ],
    r"^encoder\.layer\.\d+\.(intermediate|output)\.": [  # its Q-Former, saved alone
        "encoder.layer.0.intermediate.dense.bias",
        "encoder.layer.11.output.dense.weight",
    ],
    r"^(qformer\.)?embeddings\.": [
        "embeddings.word_embeddings.weight",
        "qformer.embeddings.position_ids",
    ],
    r"^((vision|text)_projection|itm_head)\.": ["vision_projection.bias", "itm_head.weight"],
    r"^vision_model\.(?!post_layernorm\b)": [  # Salesforce/blip2-opt-2.7b
        "vision_model.embeddings.class_embedding",
        "vision_model.encoder.layers.38.self_attn.qkv.bias",
    ],
    r"^language_(model|projection)\.": [
        "language_projection.weight",
        "language_model.model.decoder.embed_tokens.weight",
    ],
}


def mapped(table) -> set[str]:
    """Every name that the table may look for, of any model of the family."""
    names = set()
    for ours, theirs in table.modules.items():
        if isinstance(theirs, Tokens):
            found = {theirs.name}
        else:
            module = theirs
            while not isinstance(module, str):
                module = module.module
            found = {module, f"{module}.weight", f"{module}.bias"}
        if ours not in ENDS and not isinstance(theirs, (Tokens, Patches)):
            found = {table.layers.format(i) + name for i in (0, 7, 31) for name in found}
        names |= found
    return {prefix + name for prefix in table.prefixes for name in names}


def not_ignored(table, names):
    """The names that no pattern of the table matches."""
    return [name for name in names if not any(re.search(p, name) for p in table.ignored)]


@pytest.mark.parametrize("table", TABLES)
def test_no_pattern_matches_a_tensor_that_the_table_maps(table):
    assert len(mapped(table)) > 50
    for pattern in table.ignored:
        assert not [name for name in mapped(table) if re.search(pattern, name)], pattern


@pytest.mark.parametrize("table", TABLES)
def test_every_pattern_is_for_tensors_of_published_checkpoints(table):
    for pattern in table.ignored:
        assert REAL[pattern]
        assert not_ignored(table, REAL[pattern]) == []


def test_every_name_is_of_its_pattern_and_no_pattern_is_left():
    for pattern, names in REAL.items():
        assert [n for n in names if not re.search(pattern, n)] == []
    assert REAL.keys() == {pattern for p in TABLES for pattern in p.values[0].ignored}


@pytest.mark.parametrize("table", TABLES)
def test_tensors_that_no_pattern_matches_are_unused(table):
    own = table.layers.partition(".")[0] + "." if table.layers.startswith("visual.") else ""
    names = ("score.weight", "model.layers.0.gate", "h.0.attn.c_attn.bias2", "extra")
    strangers = [own + name for name in names]
    assert not_ignored(table, strangers) == strangers
