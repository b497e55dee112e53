"""Types of models that are no encoder and no language model here: what they are, what to give.

Source: the mappings of transformers' `modeling_auto.py`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vadapter.errors import CheckpointError

_LLM = "give a language model that predicts the next word, such as HuggingFaceTB/SmolLM2-135M"
_ENCODER = "give a vision transformer, such as google/siglip-so400m-patch14-384"
_EITHER = "give a vision encoder or a language model"


@dataclasses.dataclass(frozen=True)
class Kind:
    """Models of one kind."""

    what: str  # a model of it is
    instead: str  # what to give
    types: frozenset[str]  # by the model_type of config.json


def _kind(what: str, instead: str, types: str) -> Kind:
    return Kind(what, instead, frozenset(types.split()))


KINDS = {
    "sound": _kind(
        "a model of speech or sound", _EITHER,
        "whisper wav2vec2 wav2vec2-bert wav2vec2-conformer hubert wavlm data2vec-audio sew sew-d "
        "unispeech unispeech-sat speech_to_text speecht5 seamless_m4t seamless_m4t_v2 "
        "audio-spectrogram-transformer clap encodec dac mimi musicgen bark vits moonshine "
        "parakeet_ctc qwen2_audio granite_speech",
    ),
    "two halves": _kind(
        "a language model with an encoder and a decoder", _LLM,
        "t5 mt5 umt5 longt5 t5gemma switch_transformers bart mbart pegasus pegasus_x marian led "
        "blenderbot blenderbot-small m2m_100 nllb-moe fsmt prophetnet plbart mvp "
        "encoder-decoder",
    ),
    "gaps": _kind(
        "a language model that fills gaps and writes no text", _LLM,
        "bert roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod camembert distilbert "
        "albert electra deberta deberta-v2 mpnet modernbert nomic_bert mobilebert squeezebert "
        "longformer big_bird convbert layoutlm funnel ibert nystromformer rembert roformer yoso "
        "eurobert esm fnet",
    ),
    "states": _kind(
        "a language model whose layers hand on a state from word to word", _LLM,
        "mamba mamba2 falcon_mamba rwkv recurrent_gemma jamba bamba zamba zamba2 falcon_h1 "
        "nemotron_h lfm2 qwen3_next xlstm",
    ),
    "experts": _kind(
        "a language model with a mixture of experts", _LLM,
        "mixtral qwen2_moe qwen3_moe deepseek_v2 deepseek_v3 gpt_oss olmoe phimoe granitemoe dbrx "
        "glm4_moe ernie4_5_moe minimax jetmoe hunyuan_v1_moe dots1",
    ),
    "images": _kind(
        "an image encoder that is not read", _ENCODER,
        "resnet convnext convnextv2 regnet efficientnet mobilevit mobilevitv2 poolformer bit "
        "levit cvt swin swinv2 vit vit_mae vit_msn beit data2vec-vision deit pvt pvt_v2 dinat "
        "focalnet hiera ijepa timm_wrapper timesformer vivit",
    ),
    "places": _kind(
        "a model that finds, cuts out or measures what is in an image", _ENCODER,
        "detr conditional_detr deformable_detr rt_detr d_fine yolos owlvit owlv2 grounding-dino "
        "sam sam2 segformer upernet mask2former maskformer oneformer dpt depth_anything "
        "depth_pro glpn zoedepth table-transformer",
    ),
    "parts": _kind(
        "a model of several parts that are not read", _EITHER,
        "align altclip blip bridgetower chinese_clip clipseg clvp flava groupvit "
        "vision-text-dual-encoder vilt instructblip instructblipvideo kosmos-2 git fuyu mllama "
        "florence2 internvl mistral3 pixtral qwen2_vl qwen2_5_omni llava_next llava_next_video "
        "video_llava vipllava idefics idefics2 chameleon emu3 aya_vision got_ocr2 gemma3n "
        "perception_lm cohere2_vision ovis2 janus llama4 vision-encoder-decoder pix2struct "
        "trocr",
    ),
}  # fmt: skip
# End of an architecture's name -> the head that the model has in place of that over words.
_HEADS = {
    "ForSequenceClassification": "one of a classifier or reward model",
    "ForRewardModel": "one of a reward model", "RewardModel": "one of a reward model",
    "ForTokenClassification": "one of a tagger", "ForQuestionAnswering": "one of a reader",
    "ForMaskedLM": "one that fills gaps",
}  # fmt: skip


def kind_of(model_type: Any) -> Kind | None:
    """Return the kind of a model, if it is one of these."""
    return next((kind for kind in KINDS.values() if model_type in kind.types), None)


def require_words(file: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a language model without the head over words.

    `config` is that of `file`, a config.json of a language model that is read.
    """
    architectures = config.get("architectures")
    for name in architectures if isinstance(architectures, list) else ():
        for end, head in _HEADS.items():
            if str(name).endswith(end):
                raise CheckpointError(
                    f"{file}: {name} is a language model whose head is {head}, and which writes no "
                    "text: give the model that it was trained from"
                )
