"""Folders of models that are not read: what they are, and what to give instead."""

import dataclasses
import shlex
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from vadapter.errors import CheckpointError
from vadapter.io.json_files import EXPORT_FORMAT
from vadapter.weights.safetensors import CONVERT, PICKLES

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
    """The names of what is in a folder or a repository, and its config.json, {} without one."""

    path: str  # or hub id
    names: frozenset[str]  # with "/" after those of folders
    config: Mapping[str, Any]

    def first(self, *suffixes: str) -> str | None:
        """Return the first name with one of these suffixes."""
        return min((name for name in self.names if name.lower().endswith(suffixes)), default=None)

    def group(self, key: str) -> Mapping[str, Any] | None:
        """Return a group of keys of config.json, or of that of one of its parts."""
        for config in (self.config, *self.config.values()):
            if isinstance(config, Mapping) and isinstance(config.get(key), Mapping):
                return config[key]
        return None


Kind = tuple[Callable[[Folder], str | None], str, str]


def refuse(path: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a folder of a kind that is never read; it names the kind."""
    if path.is_dir():
        _refuse(_folder(path, config), str(path), _KINDS)


def refuse_repository(repo_id: str, names: Collection[str]) -> None:
    """Raise CheckpointError for a repository without safetensors; it names what is there.

    `names` are those of all its files; nothing is raised without any.
    """
    top = frozenset("".join(name.partition("/")[:2]) for name in names)
    if names:
        _refuse(Folder(repo_id, top, {}), repo_id, (*_KINDS, *_WITHOUT_WEIGHTS))


def refuse_without_config(path: Path) -> None:
    """Raise CheckpointError for a folder without config.json: what it holds, and what to do."""
    _refuse(_folder(path, {}), str(path), _WITHOUT_CONFIG)


def _folder(path: Path, config: Mapping[str, Any]) -> Folder:
    names = frozenset(f"{p.name}/" if p.is_dir() else p.name for p in path.iterdir())
    return Folder(str(path.absolute()), names, config)


def _refuse(folder: Folder, shown: str, kinds: tuple[Kind, ...]) -> None:
    for test, what, instead in kinds:
        if (found := test(folder)) is not None:
            what, instead = (text.replace("{}", found) for text in (what, instead))
            raise CheckpointError(f"{shown} is {what}: {_instead(instead, folder)}")


def _instead(text: str, folder: Folder) -> str:
    source, target = folder.path, folder.path.rpartition("/")[2] + "-safetensors"
    scripts = {
        "{merge}": (_MERGE, f"{source}-float"),
        "{dequantize}": (_DEQUANTIZE, f"{source}-float"),
        "{convert}": (CONVERT.format(options=""), target),
    }
    for word, (script, to) in scripts.items():
        text = text.replace(word, shlex.join(["python", "-c", script, source, to]))
    return text


# Suffix or name of a file -> the format of models that has it.
_FORMATS = {
    ".gguf": "GGUF, the format of llama.cpp", ".ggml": "GGML, the first format of llama.cpp",
    ".llamafile": "a llamafile", ".onnx": "ONNX", ".mlpackage/": "Core ML", ".mlmodel": "Core ML",
    "openvino_model.xml": "OpenVINO", ".tflite": "TensorFlow Lite",
    "saved_model.pb": "TensorFlow's SavedModel", ".keras": "Keras", ".engine": "TensorRT",
    ".pte": "ExecuTorch", ".nemo": "NeMo", "mlc-chat-config.json": "MLC",
    "shared_vocabulary.json": "CTranslate2", "shared_vocabulary.txt": "CTranslate2",
    ".distcp": "the format of torch's distributed checkpoints", "weights.npz": "MLX",
    "_checkpoint_metadata": "Orbax",
}  # fmt: skip
_METHODS = {"compression_config": "compressed-tensors", "quantization": "MLX"}
_QUANTIZED = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_ADAPTERS = {"adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"}
_OWN_LAYOUTS = {"params.json", "consolidated.safetensors", "consolidated.00.pth"}


def _adapter(folder: Folder) -> str | None:
    if not _ADAPTERS & folder.names or "model.safetensors" in folder.names:
        return None  # or a whole model with an adapter beside it
    return "adapter_config.json"


def _diffusers(folder: Folder) -> str | None:
    own = "_diffusers_version" in folder.config or "_class_name" in folder.config
    return "" if own or "model_index.json" in folder.names else None


def _format(folder: Folder) -> str | None:
    if folder.first(".safetensors", "pytorch_model.bin"):
        return None
    return next((what for end, what in _FORMATS.items() if folder.first(end)), None)


def _quantized(folder: Folder) -> str | None:
    for key in ("quantization_config", "compression_config", "quantization"):
        if (group := folder.group(key)) is not None:
            return str(group.get("quant_method") or _METHODS.get(key, "an unnamed method"))
    return next((method for name, method in _QUANTIZED.items() if name in folder.names), None)


def _own_layout(folder: Folder) -> str | None:
    if "config.json" in folder.names:
        return None
    return min(_OWN_LAYOUTS & folder.names, default=None)


def _exported(folder: Folder) -> str | None:
    return "" if folder.config.get("format") == EXPORT_FORMAT else None


def _run(folder: Folder) -> str | None:
    return "" if {"components", "stages", "chain"} <= folder.config.keys() else None


def _cache(folder: Folder) -> str | None:
    return "" if {"refs/", "snapshots/"} <= folder.names else None


def _holding(*suffixes: str) -> Callable[[Folder], str | None]:
    """Return a test for a file with one of these suffixes."""
    return lambda folder: folder.first(*suffixes)


def _anything(folder: Folder) -> str | None:
    return ""


# (what tells it: a detail or None, what the folder is, what to give instead)
_KINDS: tuple[Kind, ...] = (
    (_adapter, "an adapter of PEFT, as LoRA ({}), which holds changes of a model and not the model",
     "merge it into its model where torch, transformers and peft are installed, and give the "
     "merged folder:\n  {merge}"),
    (_diffusers, "a model of diffusers, which draws images",
     "give a vision encoder or a language model"),
    (_format, "a model in {}", "give the safetensors checkpoint that it was made from"),
    (_quantized, "quantized ({})", _FLOAT),
    (_own_layout, "a model in its maker's own layout ({})",
     "give its folder or hub id for transformers, with config.json and model.safetensors"),
    (_exported, "an adapter that `vadapter export` wrote, which has several components",
     "give one that `vadapter export --components` writes"),
    (_run, "a run of vadapter, which has several components",
     "give one that `vadapter export --components` writes, or start from the stage, see "
     "stages.NAME.start"),
)  # fmt: skip
_WITHOUT_CONFIG: tuple[Kind, ...] = (
    (lambda folder: None if folder.names else "", "empty", "give a Hugging Face model folder"),
    (_holding(".safetensors"), "a folder of weights ({}) that has no config.json",
     "fetch it from where they come from, as it says what model they are, or set the component's "
     "`kind` for weights of another format"),
    (_holding(*PICKLES), "a folder of pickled weights ({}) that has no config.json; pickles are "
     "never loaded", "give the folder or hub id of a safetensors checkpoint"),
    (_cache, "a folder of the hub's cache, which has no config.json itself",
     "give the hub id, or the folder of a commit in its snapshots"),
    (_holding("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"),
     "a folder of a tokenizer ({}) that has no config.json", "give the folder of the whole model"),
    (_holding(".tar", ".parquet", ".arrow", ".tfrecord", ".jsonl", ".jpg", ".png"),
     "a folder of data ({}) that has no config.json", "give a Hugging Face model folder"),
    (_holding("/"), "a folder of folders that has no config.json itself",
     "give the folder of the model in it ({})"),
    (_anything, "a folder that has no config.json",
     "give a Hugging Face model folder, or set the component's `kind` for weights of another "
     "format"),
)  # fmt: skip
# Of a repository without safetensors in its top folder.
_WITHOUT_WEIGHTS: tuple[Kind, ...] = (
    (_holding(*PICKLES), "pickled ({}), and pickles are never loaded, as they can run code",
     "give a repository or commit with safetensors or, if you trust the file, convert it where "
     "torch and transformers are installed, and give the new folder:\n  {convert}"),
    (_holding("/"), "a repository without weights outside its folders ({})",
     "download it, and give the folder of the model in it"),
    (_anything, "a repository without weights", "give one that has model.safetensors"),
)  # fmt: skip
