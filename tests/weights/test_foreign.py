"""Weights that would compute nothing or something else: each is refused as what it is."""

import json
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.public_models import read_checkpoint, write_model

from vadapter.errors import CheckpointError
from vadapter.models.registry import make_module
from vadapter.weights.hf_checkpoint import FAMILIES, Checkpoint, describe
from vadapter.weights.parts import MODELS

LLAMA = {"model_type": "llama", "tie_word_embeddings": True, "vocab_size": 97, "hidden_size": 32,
         "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
METHODS = ("gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors", "mxfp4")
# Folder: the files in it, beside a whole model -> what the message says of it.
FOLDERS = {
    **{method: ({"config.json": LLAMA | {"quantization_config": {"quant_method": method}}},
                rf"quantized \({method}\): give the checkpoint in float32.*dequantize")
       for method in METHODS},
    "quantized text of two parts": (
        {"config.json": {"model_type": "gemma3", "vision_config": {}, "text_config": {
            "quantization_config": {"quant_method": "awq"}}}}, r"quantized \(awq\)"),
    "mlx": ({"config.json": LLAMA | {"quantization": {"bits": 4}}}, r"quantized \(MLX\)"),
    "gptq beside": ({"config.json": LLAMA, "quantize_config.json": {}}, r"quantized \(gptq\)"),
    "diffusers": ({"model_index.json": {}}, "a model of diffusers, which draws images: give a vis"),
    "a part of diffusers": ({"config.json": {"_class_name": "UNet2DConditionModel"}}, "diffusers"),
}  # fmt: skip
ALONE = {
    "lora": ("adapter_model.safetensors", r"adapter of PEFT, as LoRA .*merge_and_unload"),
    "gguf": ("model-Q4_K_M.gguf", "a model in GGUF.*: give the safetensors checkpoint"),
    "onnx": ("model.onnx", "a model in ONNX: give the safetensors checkpoint"),
}


def load(folder, **overrides):
    checkpoint = Checkpoint.open(folder)
    spec = {**checkpoint.spec, **overrides}
    module = make_module("llm", spec)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    params, report = read_checkpoint(checkpoint, nn.unbox(shapes)["params"])
    return module, params, report


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_not_read_is_named_as_what_it_is(name, tmp_path):
    files, message = FOLDERS[name]
    write_model(tmp_path, LLAMA)
    for file, content in files.items():
        (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        describe(tmp_path)


@pytest.mark.parametrize("name", ALONE)
def test_a_folder_without_the_model_itself_is_named_as_what_it_is(name, tmp_path):
    file, message = ALONE[name]
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        describe(tmp_path)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, ml_dtypes.float8_e4m3fn])
def test_a_matrix_of_integers_or_of_8_bit_floats_is_refused(dtype, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    spoil = lambda t: t.update({name: np.ones((48, 32), dtype)})  # noqa: E731
    with pytest.raises(CheckpointError, match=rf"quantized: {name} is \w+8?\w*, and its scales"):
        load(write_model(tmp_path, LLAMA, spoil=spoil))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_number_that_is_not_finite_is_refused_by_the_name_of_its_tensor(dtype, tmp_path):
    folder = write_model(tmp_path, LLAMA)
    tensors = load_file(folder / "model.safetensors")
    tensors = {k: v.astype(np.dtype(getattr(ml_dtypes, dtype, dtype))) for k, v in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    load(folder)
    for value in (np.inf, -np.inf, np.nan, -np.nan):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight' holds numb"):
            load(folder)


def test_the_largest_finite_numbers_are_read(tmp_path):
    values = np.resize([np.finfo(np.float32).max, np.finfo(np.float32).min, -0.0], 32)
    spoil = lambda t: t.update({"model.norm.weight": values.astype(np.float32)})  # noqa: E731
    _, params, _ = load(write_model(tmp_path, LLAMA, spoil=spoil))
    np.testing.assert_array_equal(params["norm"]["scale"], values.astype(np.float32))


def test_a_stored_head_that_is_not_the_embedding_is_refused_or_used(tmp_path, originals):
    """The original does not tie such a head; here it is used where the recipe says so."""
    torch, transformers = originals
    folder = write_model(tmp_path, LLAMA)
    tensors = load_file(folder / "model.safetensors")
    same = tensors | {HEAD: tensors[EMBEDDING].copy()}
    save_file(same, folder / "model.safetensors", metadata={"format": "pt"})
    _, _, report = load(folder)
    assert report.unused == (HEAD,)
    other = tensors | {HEAD: np.roll(tensors[EMBEDDING], 1)}
    save_file(other, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is stored and is not.*tied=False"):
        load(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    np.testing.assert_array_equal(model.lm_head.weight.detach().numpy(), other[HEAD])
    module, params, _ = load(folder, tied=False)
    np.testing.assert_array_equal(params["head"]["kernel"].T, other[HEAD])
    tokens = np.array([[5, 6, 7]])
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    assert np.abs(module.apply({"params": params}, tokens) - theirs).max() < 1e-4


def test_a_folder_of_other_names_is_one_line(tmp_path):
    def rename(tensors):
        for name in list(tensors):
            tensors[f"net.{name}"] = tensors.pop(name)

    folder = write_model(tmp_path, LLAMA, spoil=rename)
    with pytest.raises(
        CheckpointError, match=r"no tensor of llama: its names are like 'net\.mo"
    ) as e:
        load(folder)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("model_type", ["paligemma2", "gemma3n", "mistral3", "phi", ""])
def test_an_unknown_model_type_names_what_is_supported_and_guesses_nothing(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(
        CheckpointError, match=r"Supported are language models: gemma, .*siglip"
    ) as e:
        describe(tmp_path)
    assert "did you mean" not in str(e.value)
    assert "open_clip" not in str(e.value)


ODD = (None, True, False, 0, 1, -1, 2, 7, 224, 2**40, 0.5, float("nan"), float("inf"), "", "x",
       "gelu", [], [1], [[]], ["x", None], {}, {"x": 1}, {"rope_type": "yarn"},
       {"full_attention": None}, {"model_type": []}, {"quant_method": 1})  # fmt: skip


@pytest.mark.parametrize("model_type", [*FAMILIES, *MODELS, "x"])
def test_any_values_of_any_keys_are_read_or_an_error_for_users(model_type, tmp_path):
    """Files with some random values, of keys that are known or not, also within groups."""
    rng = np.random.default_rng(zlib.crc32(model_type.encode()))
    family = FAMILIES.get(model_type)
    keys = [*((family and family.keys) or ()), "vision_config", "text_config", "model_type", "x",
            "qformer_config", "pretrained_cfg", "architecture", "model_args", "vision_cfg",
            "tie_word_embeddings", "quantization_config"]  # fmt: skip

    def pick(values):
        return values[rng.integers(len(values))]

    refused = 0
    for _ in range(8):
        config = {"model_type": model_type}
        config |= {str(pick(keys)): pick(ODD) for _ in range(rng.integers(0, 3))}
        group = {str(pick(keys)): pick(ODD) for _ in range(3)}
        config |= {str(pick(["vision_config", "text_config", "rope_parameters", "x"])): group}
        for part in ("", "vision", "text"):
            (tmp_path / "config.json").write_text(json.dumps(config))
            try:
                describe(tmp_path, part)
            except CheckpointError:
                refused += 1
            except Exception as e:
                raise AssertionError(f"{config}, part={part!r}") from e
    assert refused
