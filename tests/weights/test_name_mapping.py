"""A piece of a leaf is what numpy would cut out of the whole, of any size and dtype."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from vadapter.weights.name_mapping import Table
from vadapter.weights.safetensors import TensorFiles

TABLE = Table(layers="layers.{}.", modules={"up": "fc", "head": "head"})
INDICES = [
    (slice(None), slice(None), slice(None)),
    (slice(1, 3), slice(0, 20), slice(None)),
    (slice(2, 3), slice(None), slice(70, 140)),
]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("outputs", [1, 63, 64, 65, 150])
def test_a_stacked_transposed_leaf_is_read_piece_by_piece(tmp_path, outputs, dtype):
    rng = np.random.default_rng(0)
    theirs = rng.standard_normal((3, outputs, 40)).astype(ml_dtypes.bfloat16)
    head = rng.standard_normal((outputs, 40)).astype(ml_dtypes.bfloat16)
    tensors = {f"layers.{i}.fc.weight": x for i, x in enumerate(theirs)} | {"head.weight": head}
    save_file(tensors, tmp_path / "model.safetensors")
    files = TensorFiles.open(tmp_path)
    whole = theirs.transpose(0, 2, 1).astype(dtype)
    source = TABLE.source("stack/blocks/up/kernel", whole.shape)
    for index in INDICES:
        piece = source.read(files, index, 8, dtype)
        assert piece.dtype == dtype
        np.testing.assert_array_equal(piece, whole[index])
        assert not piece.size or piece.ctypes.data % 64 == 0, "a CPU device would copy it"
    source = TABLE.source("head/kernel", (40, outputs))
    piece = source.read(files, INDICES[1][1:], 8, dtype)
    np.testing.assert_array_equal(piece, head.T[:20].astype(dtype))
