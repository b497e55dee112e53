"""Folders of models that are not read: what they are, and what to give instead."""

import dataclasses
import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vadapter.errors import CheckpointError

_FLOAT = (
    "give the checkpoint in float32, float16 or bfloat16 that it was made from, or convert it "
    "where torch and transformers are installed:\n  {dequantize}\nFor half the memory of a frozen "
    "LLM, set int8=True beside weights"
)
_DEQUANTIZE = (
    "import sys, transformers as t; a, b = sys.argv[1:]; "
    "c = getattr(t, t.AutoConfig.from_pretrained(a).architectures[0]); "
    "c.from_pretrained(a).dequantize().save_pretrained(b)"
)
_MERGE = (
    "import sys, peft; a, b = sys.argv[1:]; "
    "peft.AutoPeftModelForCausalLM.from_pretrained(a).merge_and_unload().save_pretrained(b)"
)


@dataclasses.dataclass(frozen=True)
class Folder:
    """The names of a folder's files, and its config.json, {} without a readable one."""

    path: Path
    names: frozenset[str]
    config: Mapping[str, Any]

    def holds(self, suffix: str) -> bool:
        """Return whether a file has this suffix."""
        return any(name.lower().endswith(suffix) for name in self.names)

    def group(self, key: str) -> Mapping[str, Any] | None:
        """Return a group of keys of config.json, or of that of one of its parts."""
        for config in (self.config, *self.config.values()):
            if isinstance(config, Mapping) and isinstance(config.get(key), Mapping):
                return config[key]
        return None


def refuse(path: Path) -> None:
    """Raise CheckpointError for a folder of a kind that is never read; it names the kind."""
    if not path.is_dir():
        return
    folder = Folder(path, frozenset(p.name for p in path.iterdir()), _config(path))
    for test, what, instead in _KINDS:
        if (found := test(folder)) is not None:
            raise CheckpointError(f"{path} is {what.format(found)}: {_instead(instead, folder)}")


def _instead(text: str, folder: Folder) -> str:
    source = str(folder.path.absolute())
    for word, script in (("{merge}", _MERGE), ("{dequantize}", _DEQUANTIZE)):
        text = text.replace(word, shlex.join(["python", "-c", script, source, f"{source}-float"]))
    return text


def _config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # which its reader reports
    return config if isinstance(config, Mapping) else {}


def _adapter(folder: Folder) -> str | None:
    if not {"adapter_config.json", "adapter_model.safetensors"} & folder.names:
        return None
    if folder.holds(".safetensors") and "model.safetensors" in folder.names:
        return None  # a whole model with an adapter beside it
    return "adapter_config.json"


def _gguf(folder: Folder) -> str | None:
    return "" if folder.holds(".gguf") and not folder.holds(".safetensors") else None


def _onnx(folder: Folder) -> str | None:
    return "" if folder.holds(".onnx") and not folder.holds(".safetensors") else None


def _diffusers(folder: Folder) -> str | None:
    own = "_diffusers_version" in folder.config or "_class_name" in folder.config
    return "" if own or "model_index.json" in folder.names else None


def _quantized(folder: Folder) -> str | None:
    for key in ("quantization_config", "compression_config", "quantization"):
        if (group := folder.group(key)) is not None:
            return str(group.get("quant_method") or _METHODS.get(key, "an unnamed method"))
    for name, method in _QUANTIZED.items():
        if name in folder.names:
            return method
    return None


_METHODS = {"compression_config": "compressed-tensors", "quantization": "MLX"}
_QUANTIZED = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
# (what tells it: a detail or None, what the folder is, what to give instead)
_KINDS: tuple[tuple[Callable[[Folder], str | None], str, str], ...] = (
    (_adapter, "an adapter of PEFT, as LoRA ({}), which holds changes of a model and not the model",
     "merge it into its model where torch, transformers and peft are installed, and give the "
     "merged folder:\n  {merge}"),
    (_diffusers, "a model of diffusers, which draws images",
     "give a vision encoder or a language model"),
    (_gguf, "a model in GGUF, the format of llama.cpp",
     "give the safetensors checkpoint that it was made from"),
    (_onnx, "a model in ONNX", "give the safetensors checkpoint that it was made from"),
    (_quantized, "quantized ({})", _FLOAT),
)  # fmt: skip
