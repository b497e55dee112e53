"""The two files of MobileNetV2 1.0/224 as `load_mobilenet` reads them, with drawn weights.

The layers are built from Table 2 of the paper (Sandler et al., 2018), not from the package.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

NAME = "mobilenet_v2_1.0_224"
CLASSES = 1001
# Expansion, output channels, blocks, stride of the first of them.
BLOCKS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _layers() -> Iterator[tuple[str, int, str, tuple[int, ...]]]:
    """Yield op, stride, activation and the kernel's shape; () for a layer without parameters."""
    yield "conv", 2, "relu6", (3, 3, 3, 32)
    width = 32
    for expansion, out, count, first_stride in BLOCKS:
        for i in range(count):
            stride, inner = first_stride if i == 0 else 1, width * expansion
            if expansion > 1:
                yield "conv", 1, "relu6", (1, 1, width, inner)
            yield "depthwise", stride, "relu6", (3, 3, 1, inner)
            yield "conv", 1, "none", (1, 1, inner, out)
            if stride == 1 and width == out:
                yield "add", 1, "none", ()
            width = out
    yield "conv", 1, "relu6", (1, 1, width, 1280)
    yield "global_mean", 1, "none", ()
    yield "conv", 1, "none", (1, 1, 1280, CLASSES)


def write_mobilenet(folder: Path, seed: int = 0) -> Path:
    """Write the graph (.json) and the weights (.npz), 8-bit kernels stored as float16."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    layers: list[dict[str, Any]] = []
    tensors: dict[str, np.ndarray] = {}
    for i, (op, stride, activation, shape) in enumerate(_layers()):
        name = f"l{i:02d}"
        layer: dict[str, Any] = {"name": name, "op": op}
        layers.append(layer | ({"stride": stride, "activation": activation} if shape else {}))
        if shape:
            step = 1 / (128 * np.sqrt(np.prod(shape[:3])))
            kernel = step * rng.integers(-127, 128, shape)
            tensors[f"{name}/kernel"] = kernel.astype(np.float16)
            tensors[f"{name}/bias"] = rng.normal(scale=0.1, size=shape[3]).astype(np.float32)
    (folder / f"{NAME}.json").write_text(json.dumps({"layers": layers}))
    np.savez(folder / f"{NAME}_float16.npz", **tensors)
    return folder
