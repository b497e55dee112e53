"""MobileNetV2 1.0/224 trained on ImageNet, converted from a TFLite graph.

The folder holds a .json that lists the graph's layers in order (batch norm folded) and an .npz with
"<layer>/kernel" and "<layer>/bias"; kernels are float16, in our layout. They come from an 8-bit
network, so that the rounding to float16 can be undone.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vadapter.errors import CheckpointError
from vadapter.models.mobilenet import MobileNet, MobileNetConfig, block_specs
from vadapter.models.paths import flatten
from vadapter.weights import npz
from vadapter.weights.files import Stamp, require_file, sha256, stamp
from vadapter.weights.hf_checkpoint import Report
from vadapter.weights.name_mapping import assign, match_names

_GRAPH = "mobilenet_v2_1.0_224.json"
_ARRAYS = "mobilenet_v2_1.0_224_float16.npz"
_CLASSES = 1001  # ImageNet's 1000 and, at index 0, "background"
_MAX_BYTES = 64 * 2**20  # the file holds 7 MB
_STEPS = 254  # between the smallest and the largest value of a kernel: 8 bits, one code unused


@dataclasses.dataclass(frozen=True)
class MobileNetFiles:
    """The encoder's folder; see `reference.Weights`."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> "MobileNetFiles":
        """Return the folder; raise CheckpointError if a file is missing."""
        opened = cls(path)
        opened.stamps()
        return opened

    def stamps(self) -> dict[Path, Stamp]:
        """Return the two files with their stamps."""
        files = [require_file(self.path / name) for name in (_GRAPH, _ARRAYS)]
        return {file: stamp(file) for file in files}

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the concatenated files."""
        return sha256(file.open("rb") for file in self.stamps())

    def match(self, abstract: Any) -> Report:
        """Match the tensors to the parameters, by the graph and the headers of the arrays."""
        _, names, ignored = _names(self.path, head=False)
        headers = npz.read_npz_headers(self.path / _ARRAYS, max_bytes=_MAX_BYTES)
        used = match_names(abstract, headers, names, ignore=ignored)
        count = sum(int(np.prod(headers[name].shape)) for name, _ in used.values())
        return Report(len(used), count, ("head",))

    def leaves(self, abstract: Any, dtype: Any = None) -> Iterator[tuple[str, jax.Array]]:
        """Yield (path, array) with the shardings of `abstract`, one after the other."""
        params = flatten(load_mobilenet(self.path)[1])
        for path, leaf in flatten(abstract).items():
            yield path, jax.device_put(np.asarray(params[path], dtype or leaf.dtype), leaf.sharding)


def load_mobilenet(path: Path, *, head: bool = False) -> tuple[MobileNetConfig, dict[str, Any]]:
    """Load the encoder, and its classifier for `head`; otherwise its two tensors are ignored.

    Returns:
      The configuration and the float32 parameters, numpy arrays:
      `MobileNet(config).apply({"params": params}, frames)`.

    Raises:
      CheckpointError: a file is missing or corrupt, or describes another network.
    """
    config, names, ignored = _names(path, head=head)
    tensors = npz.read_npz(path / _ARRAYS, max_bytes=_MAX_BYTES)
    tensors = {name: unround(tensor) for name, tensor in tensors.items()}
    return config, assign(abstract_params(config), tensors, names, ignore=ignored)


def _names(path: Path, *, head: bool) -> tuple[MobileNetConfig, dict[str, str], list[str]]:
    """Return the configuration; name in the .npz -> path in our tree; ignored names."""
    config = MobileNetConfig(classes=_CLASSES if head else 0)
    table = _name_table(config, path / _GRAPH)
    ignored = [] if head else [name for name in table if table[name].startswith("head/")]
    return config, {k: v for k, v in table.items() if k not in ignored}, ignored


def abstract_params(config: MobileNetConfig) -> Any:
    """Return the shapes of the published network's parameters."""
    frames = jax.ShapeDtypeStruct((1, 1, 32, 32, 3), jnp.uint8)
    return nn.unbox(jax.eval_shape(MobileNet(config).init, jax.random.key(0), frames)["params"])


def unround(tensor: np.ndarray) -> np.ndarray:
    """Undo the rounding to float16 of a tensor of integer multiples of one step; return float32.

    Dequantized 8-bit kernels are such multiples. Each value bounds the step to those that would
    have been rounded to it; together they leave an interval of about 1e-6 of the step. A tensor
    that is not float16 or not of that form is returned itself.
    """
    if tensor.dtype != np.float16 or not np.ptp(tensor):
        return tensor
    values = np.abs(tensor).astype(np.float64)
    counts = np.round(values / (np.ptp(tensor.astype(np.float64)) / _STEPS))
    used = counts > 0
    margin = np.spacing(np.abs(tensor)).astype(np.float64) / 2
    low = ((values - margin)[used] / counts[used]).max()
    high = ((values + margin)[used] / counts[used]).min()
    if low > high or values[~used].any():
        return tensor
    return (np.sign(tensor) * counts * (low + high) / 2).astype(np.float32)


def _name_table(config: MobileNetConfig, graph: Path) -> dict[str, str]:
    """Return name in the .npz -> path in our tree; the graph must be that of our network."""
    require_file(graph)
    try:
        layers = json.loads(graph.read_text(encoding="utf-8"))["layers"]
        names = [layer["name"] for layer in layers]
        keys = {"stride": 1, "activation": "none"}
        stored = [(layer["op"], *(layer.get(k, v) for k, v in keys.items())) for layer in layers]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{graph} is not a list of the layers of a network: {e!r}.") from e
    ours, expected = zip(*_graph(config), strict=True)
    if stored != list(expected):
        differing = [n for n, s, e in zip(names, stored, expected, strict=False) if s != e]
        raise CheckpointError(
            f"{graph} describes a network other than MobileNetV2 1.0: {len(stored)} layers instead "
            f"of {len(expected)}; different op, stride or activation in {differing}."
        )
    return {
        f"{name}/{leaf}": f"{our_name}/{leaf}"
        for name, our_name in zip(names, ours, strict=True)
        if our_name
        for leaf in ("kernel", "bias")
    }


def _graph(config: MobileNetConfig) -> Iterator[tuple[str, tuple[str, int, str]]]:
    """Yield our layer ("" if it has no parameters) and its expected (op, stride, activation)."""
    yield "stem", ("conv", 2, "relu6")
    for i, spec in enumerate(block_specs(config)):
        block = f"block_{i:02d}"
        if spec.expanded != spec.inputs:
            yield f"{block}/expand", ("conv", 1, "relu6")
        yield f"{block}/depthwise", ("depthwise", spec.stride, "relu6")
        yield f"{block}/project", ("conv", 1, "none")
        if spec.residual:
            yield "", ("add", 1, "none")
    yield "last", ("conv", 1, "relu6")
    yield "", ("global_mean", 1, "none")
    yield "head", ("conv", 1, "none")
