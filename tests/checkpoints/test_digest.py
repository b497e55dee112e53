import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vadapter.checkpoints.digest import combined, leaf_digest, leaf_paths, tree_digests

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint8", "bool", "uint32", "int8", "int4"]


def _array(dtype, shape=(16, 6), seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 120, shape) % 7, dtype)


def _reference(x):
    """The definition in plain numpy: sum of word times odd weight, modulo 2**32."""
    x = np.asarray(x)
    x = x.astype(np.int8) if x.dtype == "int4" else x
    words = x.astype(np.uint8) if x.dtype == bool else x.view(f"u{x.dtype.itemsize}")
    total = 0
    for i, word in enumerate(words.ravel().tolist()):
        total += word * (((i * 2654435761 + 1) % 2**32) | 1)
    return total % 2**32


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_digest_is_its_definition_for_every_dtype(dtype):
    x = _array(dtype)
    assert int(leaf_digest(x)) == _reference(x)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("n", [1, 2, 8])
def test_the_digest_does_not_depend_on_the_sharding(n, explicit):
    kind = AxisType.Explicit if explicit else AxisType.Auto
    mesh = Mesh(np.array(jax.devices()[:n]), ("data",), axis_types=(kind,))
    tree = {d: _array(d) for d in DTYPES} | {"cube": _array("float32", (2, 8, 3))}
    want = tree_digests(tree)
    for spec in (P(), P("data")):
        specs = {k: (P(None, *spec) if k == "cube" else spec) for k in tree}
        placed = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in tree.items()}
        assert tree_digests(placed) == want


def test_scalars_keys_and_empty_arrays_have_digests():
    tree = {
        "step": jnp.int32(7),
        "scalar": jnp.float32(-0.0),
        "key": jax.random.key(3),
        "old_key": jax.random.key_data(jax.random.key(3)),
        "empty": jnp.zeros((0, 4)),
    }
    got = tree_digests(tree)
    assert got["step"] == [[], "int32", 7]
    assert got["scalar"] == [[], "float32", 2**31]  # the sign of zero is a bit like any other
    assert got["key"][2] == got["old_key"][2] != tree_digests(jax.random.key(4))["value"][2]
    assert got["empty"] == [[0, 4], "float32", 0]


def test_no_single_bit_flip_escapes():
    x = np.random.default_rng(0).standard_normal(97).astype(np.float32)
    before = int(leaf_digest(x))
    digest = jax.jit(leaf_digest)
    for bit in np.random.default_rng(1).choice(97 * 32, 200, replace=False):
        flipped = x.copy()
        flipped.view(np.uint32)[bit // 32] ^= np.uint32(1 << (bit % 32))
        assert int(digest(flipped)) != before


def test_moved_elements_and_shapes_change_the_combined_digest():
    x = jnp.arange(12.0).reshape(3, 4)
    digests = [
        combined(tree_digests({"w": y}))
        for y in (x, x[::-1], x[:, ::-1], x.reshape(4, 3), x.astype(jnp.bfloat16))
    ]
    digests.append(combined(tree_digests({"v": x})))
    assert len(set(digests)) == len(digests)
    assert combined({"a": [[], "int32", 1], "b": [[], "int32", 2]}) == combined(
        {"b": [[], "int32", 2], "a": [[], "int32", 1]}
    )


def test_complex_and_sub_byte_arrays_are_refused():
    for dtype in (jnp.complex64, jnp.uint4):
        with pytest.raises(TypeError, match="no digest for dtype"):
            leaf_digest(jnp.zeros((2,), dtype))


def test_two_leaves_never_share_a_path():
    assert list(leaf_paths({"a": [1, {"b": 2}]})) == ["a.0", "a.1.b"]
    with pytest.raises(ValueError, match=r"two leaves of the tree are called 'a\.b'"):
        leaf_paths({"a": {"b": 1}, "a.b": 2})
