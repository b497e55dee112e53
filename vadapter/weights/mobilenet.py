"""MobileNetV2 1.0/224 trained on ImageNet: numbered layers of a TFLite graph to our tree.

The folder holds a .json that lists the graph's layers in order (batch norm folded) and an .npz with
"<layer>/kernel" and "<layer>/bias"; kernels are float16, laid out as ours. They come from an 8-bit
network, which lets the rounding to float16 be undone.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vadapter.errors import CheckpointError
from vadapter.models.mobilenet import MobileNet, MobileNetConfig, block_specs
from vadapter.weights import npz
from vadapter.weights.hf_checkpoint import Report

_NAME = "mobilenet_v2_1.0_224"
_ENDS = (".json", "_float16.npz")
_CLASSES = 1001  # ImageNet's 1000 and, at index 0, "background"
_MAX_BYTES = 64 * 2**20  # the file holds 7 MB
_STEPS = 254  # from the smallest to the largest value of a kernel, 8 bits without one end


@dataclasses.dataclass(frozen=True)
class MobileNetFiles:
    """The encoder's folder, open; see `reference.Weights`."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> "MobileNetFiles":
        """The folder; CheckpointError if a file is missing."""
        opened = cls(path)
        opened.stamps()
        return opened

    def stamps(self) -> dict[Path, tuple[int, int]]:
        """The two files, each with its size and time of change in ns."""
        files = [npz.require_file(self.path / f"{_NAME}{end}") for end in _ENDS]
        return {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in files}

    def digest(self) -> str:
        """The sha256, in hex, of the bytes of one after the other."""
        whole = hashlib.sha256()
        for file in self.stamps():
            whole.update(file.read_bytes())
        return whole.hexdigest()

    def match(self, abstract: Any) -> Report:
        """Accounts forevery tensor of both sides, by the graph and the headers of the arrays.

        Raises:
          CheckpointError: files that are damaged or describe another network.
        """
        _, kept, left_out = _names(self.path, head=False)
        found = npz.read_npz_headers(self.path / f"{_NAME}{_ENDS[1]}", max_bytes=_MAX_BYTES)
        used = npz.account(abstract, found, kept, ignore=left_out)
        count = sum(int(np.prod(found[name].shape)) for name, _ in used.values())
        return Report(len(used), len(used), count, ("head",))

    def leaves(self, abstract: Any, dtype: Any = None) -> Iterator[tuple[str, jax.Array]]:
        """The parameters as `abstract` places them, (path, array) one after the other.

        Raises:
          CheckpointError: files that are damaged or describe another network.
        """
        params = traverse_util.flatten_dict(load_mobilenet(self.path)[1], sep="/")
        for path, leaf in traverse_util.flatten_dict(abstract, sep="/").items():
            yield path, jax.device_put(np.asarray(params[path], dtype or leaf.dtype), leaf.sharding)


def load_mobilenet(path: Path, *, head: bool = False) -> tuple[MobileNetConfig, dict[str, Any]]:
    """Loads the encoder.

    Args:
      path: the folder with the .json and the .npz.
      head: also load the classifier; by default its two tensors are left out.

    Returns:
      The configuration (`dataclasses.replace` it to choose how to compute) and the float32
      parameters, numpy arrays: `MobileNet(config).apply({"params": params}, frames)`.

    Raises:
      CheckpointError: a file is missing or damaged, or describes another network.
    """
    config, kept, left_out = _names(path, head=head)
    tensors = npz.read_npz(path / f"{_NAME}{_ENDS[1]}", max_bytes=_MAX_BYTES)
    tensors = {name: unround(tensor) for name, tensor in tensors.items()}
    return config, npz.assign(_abstract(config), tensors, kept, ignore=left_out)


def _names(path: Path, *, head: bool) -> tuple[MobileNetConfig, dict[str, str], list[str]]:
    """The configuration; name in the .npz to path in our tree; names that are left out."""
    config = MobileNetConfig(classes=_CLASSES if head else 0)
    table = _name_table(config, path / f"{_NAME}.json")
    left_out = [] if head else [name for name in table if table[name].startswith("head/")]
    return config, {k: v for k, v in table.items() if k not in left_out}, left_out


def _abstract(config: MobileNetConfig) -> Any:
    """The shapes of the published network's parameters."""
    frames = jax.ShapeDtypeStruct((1, 1, 32, 32, 3), jnp.uint8)
    init = lambda frames: MobileNet(config).init(jax.random.key(0), frames)  # noqa: E731
    return nn.unbox(jax.eval_shape(init, frames)["params"])


def unround(tensor: np.ndarray) -> np.ndarray:
    """Undoes the rounding to float16 of a tensor of whole multiples of one step.

    Dequantised 8-bit kernels are such multiples. Each value confines the step to what would have
    been rounded to that value; together they leave an interval of about 1e-6 of the step.

    Returns:
      f32 of the same shape, which rounds to `tensor`; `tensor` itself where it is not float16 or
      not of that form.
    """
    if tensor.dtype != np.float16 or not np.ptp(tensor):
        return tensor
    values = np.abs(tensor).astype(np.float64)
    counts = np.round(values / (np.ptp(tensor.astype(np.float64)) / _STEPS))
    some = counts > 0
    margin = np.spacing(np.abs(tensor)).astype(np.float64) / 2
    low = ((values - margin)[some] / counts[some]).max()
    high = ((values + margin)[some] / counts[some]).min()
    if low > high or values[~some].any():
        return tensor
    return (np.sign(tensor) * counts * (low + high) / 2).astype(np.float32)


def _name_table(config: MobileNetConfig, graph: Path) -> dict[str, str]:
    """Name in the .npz to path in our tree, once the graph is known to be the network we build."""
    npz.require_file(graph)
    try:
        layers = json.loads(graph.read_text(encoding="utf-8"))["layers"]
        names = [layer["name"] for layer in layers]
        found = [
            (layer["op"], layer.get("stride", 1), layer.get("activation", "none"))
            for layer in layers
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{graph} does not list the layers of a network: {e!r}.") from e
    ours, expected = zip(*_graph(config), strict=True)
    if found != list(expected):
        differing = [n for n, f, e in zip(names, found, expected, strict=False) if f != e]
        raise CheckpointError(
            f"{graph} describes another network than MobileNetV2 1.0: {len(found)} layers instead "
            f"of {len(expected)}; other op, stride or activation in {differing}."
        )
    return {
        f"{name}/{leaf}": f"{our_name}/{leaf}"
        for name, our_name in zip(names, ours, strict=True)
        if our_name
        for leaf in ("kernel", "bias")
    }


def _graph(config: MobileNetConfig) -> Iterator[tuple[str, tuple[str, int, str]]]:
    """Our layer ("" if it has no parameters) and the (op, stride, activation) expected there."""
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
