"""Language models of llama2.c: seven numbers, then float32 tensors one after the other.

Such a .bin, its "legacy" format, describes itself: its header is converted to the config.json of a
Llama. Nothing is unpickled.

Source: github.com/karpathy/llama2.c, `legacy_export` of export.py and `memory_map_weights` of
run.c; the names of tensors are those of its model.py.
"""

import itertools
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from vadapter.errors import CheckpointError
from vadapter.weights.files import naming, reject_lookalikes, stamp
from vadapter.weights.name_mapping import Pairs, Table
from vadapter.weights.safetensors import TensorFiles, TensorInfo

TABLE = Table(
    layers="layers.{}.",
    modules={
        "embedding": "tok_embeddings", "norm": "norm", "head": "output",
        "norm_attn": "attention_norm",
        "attn/q": Pairs("attention.wq"), "attn/k": Pairs("attention.wk"),
        "attn/v": "attention.wv", "attn/o": "attention.wo",
        "norm_mlp": "ffn_norm",
        "mlp/gate": "feed_forward.w1", "mlp/up": "feed_forward.w3", "mlp/down": "feed_forward.w2",
    },
    ignored=(r"^freqs_(cos|sin)$",),
)  # fmt: skip
_FLOAT = np.dtype("<f4")
_HEADER = struct.Struct("<7i")
_LIMITS = {  # the numbers of the header, in its order, and a limit above any model's
    "dim": 2**16, "hidden_dim": 2**18, "n_layers": 2**10, "n_heads": 2**10, "n_kv_heads": 2**10,
    "vocab_size": 2**22, "seq_len": 2**22,
}  # fmt: skip
_VERSIONED = b"24ka"  # first bytes of its later formats


def find(folder: Path) -> Path | None:
    """Return the only .bin of a folder that is not a tokenizer's (tok*.bin); None without one."""
    files = sorted(set(folder.glob("*.bin")) - set(folder.glob("tok*.bin")))
    files = [file for file in files if file.is_file()]
    if len(files) > 1:
        raise CheckpointError(
            f"{folder} holds {len(files)} .bin files ({files[0].name}, {files[1].name}, …) and no "
            "config.json: keep only the .bin of the llama2.c model in the folder, or add the "
            "model's config.json"
        )
    return files[0] if files else None


def read_config(file: Path) -> dict[str, Any]:
    """Return the header as the config.json of a Llama.

    Raises:
      CheckpointError: another format, a wrong size, or invalid numbers. Names the file.
    """
    with naming(file):
        size = file.stat().st_size
        with file.open("rb") as f:
            head = f.read(64)
        reject_lookalikes(head)
        if head.startswith(_VERSIONED):
            raise ValueError(
                "only the first format of llama2.c is supported; convert it with "
                "`python export.py FILE --version 0`"
            )
        if len(head) < _HEADER.size:
            raise ValueError(f"it has {size} bytes, fewer than the header of a llama2.c file")
        header = dict(zip(_LIMITS, _HEADER.unpack_from(head), strict=True))
        tied = header["vocab_size"] > 0
        header["vocab_size"] = abs(header["vocab_size"])
        for name, number in header.items():
            if not 1 <= number <= _LIMITS[name]:
                raise ValueError(
                    f"it is not a llama2.c file, or is corrupt: its header has {name}={number}, "
                    f"outside 1..{_LIMITS[name]}"
                )
        dim, heads, kv_heads = (header[name] for name in ("dim", "n_heads", "n_kv_heads"))
        if dim % (2 * heads) or heads % kv_heads:
            raise ValueError(
                f"its header has dim={dim}, n_heads={heads}, n_kv_heads={kv_heads}, which do not "
                "divide into heads of rotated pairs"
            )
        config = {
            "model_type": "llama2c", "vocab_size": header["vocab_size"], "hidden_size": dim,
            "intermediate_size": header["hidden_dim"], "num_hidden_layers": header["n_layers"],
            "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "max_position_embeddings": header["seq_len"], "tie_word_embeddings": tied,
            "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        }  # fmt: skip
        floats = sum(math.prod(shape) for shape in _shapes(config).values())
        if size != (expected := _HEADER.size + floats * _FLOAT.itemsize):
            raise ValueError(
                f"it has {size} bytes, but a llama2.c file with its header has {expected}: it is "
                "truncated, or in another format"
            )
    return config


def open_files(folder: Path) -> TensorFiles:
    """Return the tensors of the folder's .bin, by their names in llama2.c, none of them read."""
    if not (file := find(folder)):
        raise CheckpointError(f"{folder} holds no .bin of a llama2.c model")
    with naming(file):
        read_at = stamp(file)
    shapes = _shapes(read_config(file))
    sizes = (math.prod(shape) * _FLOAT.itemsize for shape in shapes.values())
    starts = itertools.accumulate(sizes, initial=_HEADER.size)
    tensors = {
        name: TensorInfo(shape, _FLOAT, file, start)
        for (name, shape), start in zip(shapes.items(), starts, strict=False)
    }
    return TensorFiles(folder, tensors, {file: read_at})


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return all tensors in the order of the file: each kind for all layers, then the next."""
    dim, hidden = config["hidden_size"], config["intermediate_size"]
    head_dim = dim // config["num_attention_heads"]
    keys, vocab = config["num_key_value_heads"] * head_dim, config["vocab_size"]
    inside = {
        "attention_norm": (dim,),
        "attention.wq": (dim, dim), "attention.wk": (keys, dim), "attention.wv": (keys, dim),
        "attention.wo": (dim, dim),
        "ffn_norm": (dim,),
        "feed_forward.w1": (hidden, dim), "feed_forward.w2": (dim, hidden),
        "feed_forward.w3": (hidden, dim),
    }  # fmt: skip
    layers = range(config["num_hidden_layers"])
    angles = (config["max_position_embeddings"], head_dim // 2)
    return {
        "tok_embeddings.weight": (vocab, dim),
        **{f"layers.{i}.{kind}.weight": inside[kind] for kind in inside for i in layers},
        "norm.weight": (dim,),
        "freqs_cos": angles,
        "freqs_sin": angles,
        **({} if config["tie_word_embeddings"] else {"output.weight": (vocab, dim)}),
    }
