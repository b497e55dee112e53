"""MobileNetV2 against a naive numpy network, stored golden features, and its own promises."""

import dataclasses
import functools
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image
from support.mobilenet_files import write_mobilenet

from vadapter.errors import CheckpointError, ConfigError
from vadapter.models.mobilenet import MobileNet, MobileNetConfig, block_specs
from vadapter.weights.mobilenet import load_mobilenet, unround

_STRIDES = (1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)
_SMALL = MobileNetConfig(image_size=32, width_mult=0.25)


def _frames(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


@functools.cache
def _small_params() -> dict:
    """Random parameters of _SMALL that keep activations between the clips, biases included."""
    model, rng = MobileNet(_SMALL), np.random.default_rng(1)
    abstract = jax.eval_shape(model.init, jax.random.key(0), _frames(1, 1, 32, 32))["params"]

    def draw(leaf):
        scale = 1.2 / np.sqrt(np.prod(leaf.shape[:3])) if len(leaf.shape) == 4 else 0.1
        return rng.normal(0, scale, leaf.shape).astype(np.float32)

    return jax.tree.map(draw, nn.unbox(abstract))


@functools.cache
def _jitted(config: MobileNetConfig):
    # Code for tiny frames runs in no time; what takes long is optimizing it.
    return jax.jit(
        MobileNet(config).apply,
        compiler_options={"xla_backend_optimization_level": 0},
    )


def _encode(config: MobileNetConfig, params: dict, frames) -> np.ndarray:
    return np.asarray(_jitted(config)({"params": params}, frames))


# The naive network: one image, float64, windows gathered and contracted.


def _naive_conv(x, layer, stride=1, relu6=True):
    kernel, bias = np.asarray(layer["kernel"], np.float64), np.asarray(layer["bias"], np.float64)
    size = kernel.shape[0]
    pads = []
    for length in x.shape[:2]:
        total = max((-(-length // stride) - 1) * stride + size - length, 0)
        pads.append((total // 2, total - total // 2))
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(x, (*pads, (0, 0))), (size, size), axis=(0, 1)
    )[::stride, ::stride]
    depthwise = kernel.shape[2] == 1 and x.shape[2] > 1
    if depthwise:
        y = np.einsum("hwcij,ijc->hwc", windows, kernel[:, :, 0])
    else:
        y = np.einsum("hwcij,ijcd->hwd", windows, kernel, optimize=True)
    y = y + bias
    return np.clip(y, 0, 6) if relu6 else y


def _naive(params, image):
    """u8[H, W, 3] -> f64[h, w, D]."""
    x = _naive_conv(image / 127.5 - 1, params["stem"], 2)
    for i, stride in enumerate(_STRIDES):
        block, y = params[f"block_{i:02d}"], x
        if "expand" in block:
            y = _naive_conv(y, block["expand"])
        y = _naive_conv(_naive_conv(y, block["depthwise"], stride), block["project"], relu6=False)
        x = x + y if stride == 1 and x.shape == y.shape else y
    return _naive_conv(x, params["last"])


@pytest.mark.parametrize(
    ("depthwise", "size", "dtype"),
    [("shifts", (64, 64), "u1"), ("shifts", (45, 71), "f4"), ("grouped", (45, 71), "u1")],
)
def test_agrees_with_a_naive_network(depthwise, size, dtype):
    frames = _frames(1, 1, *size).astype(dtype)
    config = dataclasses.replace(_SMALL, depthwise=depthwise)
    expected = _naive(_small_params(), frames[0, 0])
    assert ((expected > 0) & (expected < 6)).mean() > 0.3
    got = _encode(config, _small_params(), frames)[0, 0]
    np.testing.assert_allclose(got, expected.reshape(got.shape), atol=1e-4)


@pytest.mark.data
def test_agrees_with_a_naive_network_on_the_real_weights(data_root):
    config, params = load_mobilenet(data_root / "weights/mobilenet")
    frames = _frames(1, 1, 64, 64)
    got = _encode(config, params, frames)[0, 0]
    np.testing.assert_allclose(got, _naive(params, frames[0, 0]).reshape(4, 1280), atol=1e-4)


@pytest.mark.data
def test_real_photos_give_the_golden_features_and_classes(data_root):
    folder = data_root / "weights/mobilenet"
    config, params = load_mobilenet(folder, head=True)
    names = ("cat", "grace_hopper")
    images = [np.asarray(Image.open(folder / f"{n}_224.png").convert("RGB")) for n in names]
    frames = np.stack(images)[:, None]
    model = MobileNet(config)

    @jax.jit
    def run(variables, frames):
        features = model.apply(variables, frames)
        pooled = features.mean(axis=2, keepdims=True)
        return features, model.apply(variables, pooled, method=lambda m, x: m.head(x))[:, :, 0]

    features, logits = map(np.asarray, run({"params": params}, frames))
    assert logits.shape == (2, 1, 1001)
    for i, name in enumerate(names):
        with np.load(folder / f"{name}_golden.npz") as golden:
            expected, scores = golden["features_7x7x1280"], golden["logits_1001"]
        # The golden network had unrounded kernels. On those of the file, rounded to float16, a
        # float64 network is 0.087 and 0.117 away (mean 0.0024); see `unround`.
        difference = np.abs(features[i, 0] - expected.reshape(49, 1280))
        assert difference.max() < 0.015
        assert difference.mean() < 0.0003
        np.testing.assert_allclose(logits[i, 0], scores, atol=0.0025)
        assert set(np.argsort(logits[i, 0])[-5:]) == set(np.argsort(scores)[-5:])
        assert logits[i, 0].argmax() == scores.argmax()


def test_rounding_is_undone_in_dequantized_kernels_only():
    rng = np.random.default_rng(0)
    counts = rng.integers(-120, 135, 500)
    counts[:2] = -120, 134  # both ends are always used
    exact = counts * 0.0123456
    restored = unround(exact.astype(np.float16))
    assert restored.dtype == np.float32
    assert np.abs(exact.astype(np.float16) - exact).max() > 1e-4
    np.testing.assert_allclose(restored, exact, rtol=3e-6, atol=0)
    np.testing.assert_array_equal(restored.astype(np.float16), exact.astype(np.float16))
    for other in (
        rng.normal(size=500).astype(np.float16),
        exact.astype(np.float32),
        np.zeros(3, np.float16),
    ):
        assert unround(other) is other


def test_shapes_and_parameters_of_the_published_network():
    model = MobileNet(MobileNetConfig())
    params = jax.eval_shape(model.init, jax.random.key(0), _frames(1, 1, 32, 32))
    count = sum(p.size for p in jax.tree.leaves(params))
    # The usual 2,223,872 without the head, less one of the two vectors of each batch norm.
    assert count == 2_223_872 - 17_056
    for size, tokens in ((224, 49), (192, 36), (100, 16)):
        frames = jax.ShapeDtypeStruct((2, 8, size, size, 3), jnp.uint8)
        out = jax.eval_shape(model.apply, params, frames)
        assert (out.shape, out.dtype) == ((2, 8, tokens, 1280), jnp.float32)
        config = dataclasses.replace(model.config, image_size=size)
        assert MobileNet(config).tokens_per_frame() == tokens
    assert (model.width, model.view.size) == (1280, 224)
    assert tuple(spec.stride for spec in block_specs(model.config)) == _STRIDES


def test_classes_add_the_parameters_of_a_head():
    model = MobileNet(dataclasses.replace(_SMALL, classes=7))
    tree = jax.eval_shape(model.init, jax.random.key(0), _frames(1, 1, 32, 32))
    assert nn.unbox(tree)["params"]["head"]["kernel"].shape == (1, 1, 1280, 7)


def test_a_clip_equals_its_frames_one_by_one():
    clip = _frames(1, 8, 32, 32)
    together = _encode(_SMALL, _small_params(), clip)
    for f in range(8):
        alone = _encode(_SMALL, _small_params(), clip[:, f : f + 1])
        np.testing.assert_allclose(together[:, f : f + 1], alone, atol=1e-5)
    assert np.abs(together[:, 0] - together[:, 1]).max() > 0.01


def test_the_number_of_images_at_a_time_changes_no_token():
    frames = _frames(1, 8, 32, 32)
    config = dataclasses.replace(_SMALL, images_at_once=6)  # of 8: rounds of 2
    together = _encode(_SMALL, _small_params(), frames)
    np.testing.assert_allclose(_encode(config, _small_params(), frames), together, atol=1e-5)


def test_a_sharded_batch_stays_on_its_devices_while_images_take_turns():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    clip = _frames(1, 8, 32, 32)
    frames = jax.device_put(np.concatenate([clip, clip[:, ::-1]], 1).swapaxes(0, 1), sharding)
    variables = jax.device_put({"params": _small_params()}, NamedSharding(mesh, PartitionSpec()))
    run = _jitted(dataclasses.replace(_SMALL, images_at_once=8)).lower(variables, frames).compile()
    assert not re.search(r"all-gather|all-to-all|collective-permute", run.as_text())
    tokens = _encode(_SMALL, _small_params(), clip)
    expected = np.concatenate([tokens, tokens[:, ::-1]], 1).swapaxes(0, 1)
    np.testing.assert_allclose(run(variables, frames), expected, atol=1e-5)


def test_computes_in_the_dtype_it_is_given():
    model = MobileNet(_SMALL, dtype=jnp.dtype(jnp.bfloat16))
    jaxpr = jax.make_jaxpr(model.apply)({"params": _small_params()}, _frames(1, 1, 32, 32))
    assert jaxpr.out_avals[0].dtype == jnp.bfloat16
    products = re.findall(r":(\w+)\[[\d,]*\] = (?:dot_general|conv_general)", str(jaxpr))
    assert len(products) == 1 + 33 + 1  # stem, 1x1 convolutions of the blocks, last
    assert set(products) == {"bf16"}


def test_invalid_frames_and_settings_are_refused():
    model = MobileNet(_SMALL)
    with pytest.raises(ValueError, match=r"\[B, F, H, W, 3\]"):
        model.apply({"params": _small_params()}, _frames(1, 32, 32))
    for wrong in ({"depthwise": "fast"}, {"image_size": 0}, {"images_at_once": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            MobileNetConfig(**wrong)


@pytest.mark.parametrize("source", ["drawn", pytest.param("real", marks=pytest.mark.data)])
def test_corrupt_weights_and_another_graph_are_refused_by_name(request, source, tmp_path: Path):
    name = "mobilenet_v2_1.0_224"
    if source == "real":
        source = request.getfixturevalue("data_root") / "weights/mobilenet"
    else:
        source = write_mobilenet(tmp_path / "drawn")
    graph = (source / f"{name}.json").read_text()
    with np.load(source / f"{name}_float16.npz") as stored:
        tensors = dict(stored)

    def write(graph, tensors):
        (tmp_path / f"{name}.json").write_text(graph)
        np.savez(tmp_path / f"{name}_float16.npz", **tensors)

    write(graph, {k: v for k, v in tensors.items() if k != "l10/kernel"})
    with pytest.raises(CheckpointError, match=r"missing: block_03/expand/kernel .*l10/kernel"):
        load_mobilenet(tmp_path)
    write(graph, tensors | {"l02/bias": np.zeros(17, np.float32)})
    with pytest.raises(CheckpointError, match=r"mismatched: block_00/project/bias.*\[16\].*\[17\]"):
        load_mobilenet(tmp_path)
    write(graph.replace('"stride": 2', '"stride": 1'), tensors)
    with pytest.raises(CheckpointError, match=r"a network other.*'l00', 'l04'"):
        load_mobilenet(tmp_path)
    write("{}", tensors)
    with pytest.raises(CheckpointError, match="is not a list of the layers"):
        load_mobilenet(tmp_path)
    with pytest.raises(CheckpointError, match=rf"No weights file '{name}.json'.*does not exist"):
        load_mobilenet(tmp_path / "elsewhere")
