"""Folders and repositories that are no encoder or no language model: a line says what they are."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from support.hub_server import NEW
from support.public_models import write_model
from support.public_tokenizers import llama2

from vadapter.cli.main import main
from vadapter.errors import USER_ERROR, CheckpointError
from vadapter.models.registry import make_module
from vadapter.weights import hub, other_models
from vadapter.weights.hf_checkpoint import (
    ENCODERS,
    FAMILIES,
    LANGUAGE_MODELS,
    Checkpoint,
    locate,
)
from vadapter.weights.parts import MODELS

CLIP = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "image_size": 32, "num_attention_heads": 2,
        "patch_size": 8}  # fmt: skip
LM = {"model_type": "llama", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
      "num_attention_heads": 2, "max_position_embeddings": 512}  # fmt: skip
PLAIN = {"pretrained_cfg": {"input_size": [3, 32, 32], "interpolation": "bicubic",
                            "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.5] * 3}}  # fmt: skip

# Keys without which a model of a type has what is not read.
SIMPLE = {
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    "gemma4_unified_text": {"hidden_size_per_layer_input": 0},
    "granitemoehybrid": {"num_local_experts": 0, "num_hidden_layers": 2,
                         "layer_types": ["attention"] * 2},
}  # fmt: skip


def config(**keys):
    return {"config.json": keys}


# What is given as encoder or llm: its files, None for empty ones -> what the line says.
ENCODER, LLM = "components.encoder", "components.llm"
WRONG = {
    # models of other kinds
    "whisper": (LLM, config(model_type="whisper"), "'whisper' is a model of speech or sound: give"),
    "whisper as encoder": (ENCODER, config(model_type="whisper"), "speech or sound: give a vision"),
    "t5": (LLM, config(model_type="t5"), "with an encoder and a decoder: give a language model"),
    "bert": (LLM, config(model_type="bert"), "fills gaps and writes no text: give a language"),
    "bert as encoder": (ENCODER, config(model_type="bert"), "'bert' is a language model that"),
    "mamba": (LLM, config(model_type="mamba2"), "hand on a state from word to word: give"),
    "mixtral": (LLM, config(model_type="mixtral"), "with a mixture of experts: give"),
    "resnet": (ENCODER, config(model_type="resnet"), "encoder that is not read: give a vision tr"),
    "sam": (ENCODER, config(model_type="sam"), "'sam' is a model that finds, cuts out"),
    "llava next": (LLM, config(model_type="llava_next"), "several parts that are not read: give"),
    "reward model": (LLM, config(**LM, architectures=["LlamaForSequenceClassification"]),
                     "whose head is one of a classifier or reward model, and which writes no"),
    "tagger": (LLM, config(**LM, architectures=["LlamaForTokenClassification"]), "of a tagger"),
    "unknown": (LLM, config(model_type="frobnicate"), "'frobnicate' is not supported. Supported"),
    "no type": (ENCODER, config(hidden_size=16), "it has no model_type. Supported are"),
    "two parts": (LLM, config(model_type="paligemma"), "name the part beside weights: part='vis"),
    "two parts, seen": (ENCODER, config(model_type="qwen3_vl"), "part='vision' or part='text'"),
    "timm's resnet": (ENCODER, config(architecture="resnet50", **PLAIN), "timm's 'resnet50' is no"),
    "timm's swin": (ENCODER, config(architecture="swin_tiny_patch4_window7_224", **PLAIN), "plain"),
    "resnet of open_clip": (ENCODER, {"open_clip_config.json": {"model_cfg": {
        "embed_dim": 8, "vision_cfg": {"layers": [3, 4, 6, 3], "width": 64}}}}, "vision_cfg.layer"),
    # other formats
    "gguf": (LLM, {"model.Q4_K_M.gguf": None}, "is a model in GGUF, the format of llama.cpp: give"),
    "gguf with config": (LLM, config(**LM) | {"m.gguf": None}, "is a model in GGUF"),
    "onnx": (ENCODER, {"model.onnx": None}, "is a model in ONNX: give the safetensors checkpoint"),
    "openvino": (LLM, config(**LM) | {"openvino_model.xml": None, "openvino_model.bin": None},
                 "is a model in OpenVINO"),
    "core ml": (ENCODER, {"clip.mlpackage/Manifest.json": None}, "is a model in Core ML"),
    "tflite": (ENCODER, {"model.tflite": None}, "is a model in TensorFlow Lite"),
    "saved model": (ENCODER, {"saved_model.pb": None, "variables/x": None}, "TensorFlow's SavedMo"),
    "ctranslate2": (LLM, {"config.json": {}, "model.bin": None, "shared_vocabulary.json": None},
                    "is a model in CTranslate2"),
    "mlc": (LLM, {"mlc-chat-config.json": None}, "is a model in MLC"),
    "mlx": (LLM, config(**LM, quantization={"bits": 4}) | {"model.safetensors": None}, "(MLX)"),
    "old mlx": (LLM, {"weights.npz": None, "tokenizer.model": None}, "is a model in MLX"),
    "gptq": (LLM, config(**LM, quantization_config={"quant_method": "gptq"}), "quantized (gptq)"),
    "exl2": (LLM, config(**LM, quantization_config={"quant_method": "exl2"}), "quantized (exl2)"),
    "lora": (LLM, {"adapter_config.json": None, "adapter_model.safetensors": None},
             "is an adapter of PEFT, as LoRA"),
    "lora of mlx": (LLM, {"adapters.safetensors": None}, "is an adapter of PEFT"),
    "pickled lora": (LLM, {"adapter_config.json": None, "adapter_model.bin": None}, "of PEFT"),
    "stable diffusion": (ENCODER, {"model_index.json": None, "unet/config.json": None},
                         "is a model of diffusers, which draws images: give a vision encoder"),
    "unet": (ENCODER, config(_class_name="UNet2DConditionModel"), "is a model of diffusers"),
    "mistral's own": (LLM, {"params.json": {}, "consolidated.safetensors": None},
                      "in its maker's own layout (consolidated.safetensors): give its folder"),
    "meta's own": (LLM, {"params.json": {}, "consolidated.00.pth": None}, "maker's own layout"),
    # folders that are no model's
    "empty": (LLM, {}, "is empty: give a Hugging Face model folder"),
    "no config": (LLM, {"model.safetensors": None}, "weights (model.safetensors) that has no conf"),
    "shards alone": (LLM, {"model-00001-of-00002.safetensors": None}, "that has no config.json: f"),
    "lightning": (ENCODER, {"epoch=3.ckpt": None}, "pickled weights (epoch=3.ckpt) that has no c"),
    "tokenizer": (LLM, {"tokenizer.json": {}}, "of a tokenizer (tokenizer.json) that has no confi"),
    "shards of data": (ENCODER, {"train-0000.tar": None}, "of data (train-0000.tar) that has no"),
    "parent": (LLM, {"gemma/config.json": LM}, "give the folder of the model in it (gemma/)"),
    "cache": (LLM, {"refs/main": None, "snapshots/abc/config.json": LM}, "the hub's cache, which"),
    "notes": (LLM, {"README.md": None}, "is a folder that has no config.json: give"),
    "run": (LLM, config(components={}, stages={}, chain=[]), "is a run of vadapter, which has sev"),
    "export": (LLM, config(format="vadapter-export"), "an adapter that `vadapter export` wrote"),
    "web page": (LLM, {"config.json": "<html>"}, "config.json cannot be read"),
    "list": (LLM, {"config.json": []}, "config.json cannot be read"),
    "bert's processor": (
        ENCODER, config(**CLIP) | {"preprocessor_config.json": {"image_processor_type": "Foo"}},
        "image_processor_type 'Foo' is not read; those that are: CLIPImageProcessor"),
    # where they are not
    "a file": (LLM, "model.safetensors", "is a file: give the folder that holds it"),
    "nowhere": (LLM, "gemm", "There is no folder"),
}  # fmt: skip


def write(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text("" if content is None else text)
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Folders of a small encoder and language model, and of nothing else."""
    folder = tmp_path_factory.mktemp("good")
    write_model(folder / "encoder", CLIP, "vision_model.")
    written = json.loads((llama2(folder / "llm") / "config.json").read_text())
    write_model(folder / "llm", {**written, **LM})
    return folder


def lines(capsys, good, **given):
    """What `vadapter check` of a recipe of public models writes; it exits with 78."""
    named = {"encoder": good / "encoder", "tlm": good / "llm", "llm": good / "llm", **given}
    words = ",".join(f"{key}={folder}" for key, folder in named.items())
    code = main(["check", f"--config=configs/public.py:{words},data={good}"])
    err = capsys.readouterr().err
    assert code == USER_ERROR
    assert "Traceback" not in err
    return err.strip().splitlines()


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_model_of_the_wanted_kind_is_named_in_one_line(name, good, tmp_path, capsys):
    key, files, message = WRONG[name]
    folder = tmp_path / files if isinstance(files, str) else write(tmp_path / "given", files)
    if files == "model.safetensors":
        folder.write_bytes(b"")
    first, *others = lines(capsys, good, **{key.rpartition(".")[2]: folder})
    assert message in first
    assert f"{key}.weights: " in first
    assert "did you mean" not in first
    commands = ("  python -c", "For half the memory")  # what converts it
    assert all(line.startswith(commands) for line in others)


BARE = ("llama2c", "open_clip", "timm")  # described by other files than config.json
IMAGES = sorted(name for name in ENCODERS if not name.startswith(BARE) and "_vl_" not in name)


@pytest.mark.parametrize("model_type", sorted(set(LANGUAGE_MODELS) - {"llama2c"}))
def test_a_language_model_as_encoder_is_told_apart(model_type, good, tmp_path, capsys):
    folder = write(tmp_path / "lm", config(model_type=model_type, **SIMPLE.get(model_type, {})))
    (line,) = lines(capsys, good, encoder=folder)
    assert "components.encoder is of kind lm, which reads no images; an encoder is of kind" in line
    assert f"In place of weights='{folder}' give a vision encoder, such as google/siglip" in line


@pytest.mark.parametrize("role", ["tlm", "llm"])
@pytest.mark.parametrize("model_type", [*IMAGES, "clip", "siglip", "blip-2"])
def test_an_encoder_as_language_model_is_told_apart(model_type, role, good, tmp_path, capsys):
    keys = {"vision_config": {}} if model_type in MODELS else {}
    folder = write(tmp_path / "encoder", config(model_type=model_type, **keys))
    (line,) = lines(capsys, good, **{role: folder})
    assert f"components.{role} is of kind " in line
    assert f"In place of weights='{folder}' give a language model, such as HuggingFaceTB" in line


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_base_model_without_its_head_is_one_line(prefix, tmp_path):
    """As embedding models are saved, with and without "model." in front."""

    def spoil(tensors):
        del tensors["lm_head.weight"]
        for name in list(tensors):
            tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)

    folder = write_model(tmp_path, {**LM, "vocab_size": 97, "tie_word_embeddings": False},
                         spoil=spoil)  # fmt: skip
    checkpoint = Checkpoint.open(folder)
    module = make_module("llm", checkpoint.spec)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    with pytest.raises(CheckpointError, match=r"has no lm_head\.weight: it is a base or") as met:
        checkpoint.match(nn.unbox(shapes)["params"])
    assert "\n" not in str(met.value)


def test_types_of_other_kinds_are_transformers_own_and_none_that_is_read(originals):
    _, transformers = originals
    types = [name for kind in other_models.KINDS.values() for name in kind.types]
    assert len(types) == len(set(types))
    assert not {*types} & {*FAMILIES, *MODELS}
    known = transformers.CONFIG_MAPPING
    assert {name for name in types if name not in known} == set()


# -- repositories ------------------------------------------------------------------------------

# Files of a repository -> what the line says of it.
REPOSITORIES = {
    "gguf": (["README.md", "m-Q4_K_M.gguf", "m-Q8_0.gguf"], "owner/model is a model in GGUF, the"),
    "gguf with config": (["config.json", "m.gguf"], "is a model in GGUF"),
    "pickles": (["config.json", "pytorch_model.bin"],
                "owner/model is pickled (pytorch_model.bin), and pickles are never loaded"),
    "pickled shards": (["config.json", "pytorch_model-00001-of-00002.bin",
                        "pytorch_model-00002-of-00002.bin"], "is pickled (pytorch_model-00001"),
    "open_clip's pickle": (["open_clip_config.json", "open_clip_pytorch_model.bin"], "is pickled"),
    "onnx": (["config.json", "onnx/model.onnx"], "a repository without weights outside its folder"),
    "onnx at the top": (["model.onnx"], "is a model in ONNX"),
    "mlx": (["weights.npz", "config.json"], "is a model in MLX"),
    "pickled adapter": (["adapter_config.json", "adapter_model.bin"], "is an adapter of PEFT"),
    "diffusers": (["model_index.json", "unet/diffusion_pytorch_model.safetensors"], "of diffusers"),
    "meta's own": (["params.json", "consolidated.00.pth"], "its maker's own layout"),
    "folders": (["base/config.json", "base/model.safetensors"], "outside its folders (base/): dow"),
    "data": (["README.md", ".gitattributes"], "is a repository without weights: give one that has"),
}  # fmt: skip


@pytest.mark.parametrize("name", REPOSITORIES)
def test_a_repository_without_safetensors_is_named_by_its_other_files(name, monkeypatch, tmp_path):
    """The commit's folder holds what is downloaded of it, without pickles and subfolders."""
    names, message = REPOSITORIES[name]
    for file in (n for n in names if n.endswith(".json") and "/" not in n):
        (tmp_path / file).write_text("{}")
    snapshot = hub.Snapshot(tmp_path, "owner/model", NEW)
    monkeypatch.setattr(hub, "resolve", lambda *args, **kwargs: snapshot)
    monkeypatch.setattr(hub, "files", lambda snapshot: names)
    with pytest.raises(CheckpointError) as met:
        locate("owner/model", "components.llm.weights")
    first, *others = str(met.value).splitlines()
    assert message in first
    assert first.startswith("components.llm.weights: owner/model is ")
    assert all(line.startswith("  python -c") for line in others)
    assert met.value.exit_code == USER_ERROR
