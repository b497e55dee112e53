"""The mesh and the one table from logical to mesh axes."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from support import tiny

from vadapter.distributed.mesh import (
    AXES,
    LARGE,
    RULES,
    MeshConfig,
    arrange,
    batch_sharding,
    constrain,
    make_mesh,
    partition,
    poorly_sharded,
    replicated,
    with_mesh,
)
from vadapter.errors import ConfigError
from vadapter.models.registry import KINDS, SIZES, expand, make_module
from vadapter.stages.outline import abstract

TINY = {
    "vit": {"image_size": 16, "patch": 8, "width": 16, "depth": 1, "heads": 2, "mlp_dim": 32,
            "class_token": True},
    "mobilenet": {"image_size": 32, "classes": 4},
    "video_vit": {"image_size": 16, "patch": 8, "tubelet": 2, "width": 16, "depth": 1, "heads": 2,
                  "mlp_dim": 32},
    "resampler": {"queries": 4, "query_dim": 16, "hidden_dim": 16, "layers": 1, "heads": 2,
                  "space_embed": True},
    "pooler": {"queries": 4, "width": 16, "heads": 2},
    "qformer": {"queries": 4, "width": 16, "depth": 2, "heads": 2, "mlp_dim": 32,
                "time_embed": True},
    "mlp": {"hidden_dim": 16, "width": 16},
    "c_abstractor": {"queries": 4, "width": 16, "hidden_dim": 16, "grid": (2, 2)},
    "cross_attention": {"heads": 2, "head_dim": 8, "width": 16, "depth": 2},
    "words": {"width": 16, "vocab_size": 32},
    "fc": {"width": 16},
    "lm": {"vocab_size": 32, "width": 16, "depth": 1, "heads": 2, "mlp_dim": 32, "bias": True,
           "positions": "learned", "tied": False, "norm": "layer"},
    "fusion": {"depth": 1, "width": 16, "heads": 2, "mlp_dim": 32, "embed_dim": 8},
}  # fmt: skip


def boxes(module, kind):
    if kind == "lm":
        args = (jnp.zeros((1, 2), jnp.int32),)
    elif kind == "fusion":
        text = jnp.zeros((1, 2, 16))
        args = (text, text, (text[:, 0], text[:, 0]), None)
    elif kind in ("vit", "video_vit", "mobilenet"):
        args = (jnp.zeros((1, 1, module.view.size, module.view.size, 3)),)
    elif kind in ("fc", "cross_attention", "words"):
        args = (jnp.zeros((1, 2, 16)),)
    else:
        args = (jnp.zeros((1, 8, 4, 16)),)
    return jax.eval_shape(module.init, jax.random.key(0), *args).get("params", {})


def is_box(x):
    return isinstance(x, nn.LogicallyPartitioned)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def test_every_kind_has_a_small_example_here():
    assert set(TINY) == set(KINDS)


def test_the_rules_are_the_logical_axes_that_models_use_and_no_others():
    used = set()
    for kind, fields in TINY.items():
        tree = boxes(make_module(kind, {"kind": kind} | fields), kind)
        leaves = [x for x in jax.tree.leaves(tree, is_leaf=is_box) if is_box(x)]
        used |= {name for leaf in leaves for name in leaf.names}
    assert (used - {None}) | {"batch"} == set(RULES)  # rows are an axis of activations alone
    assert {axis for axes in RULES.values() for axis in axes} == set(AXES)


@pytest.mark.parametrize("kind", TINY)
def test_every_parameter_of_every_kind_gets_a_valid_sharding(kind, mesh):
    tree = boxes(make_module(kind, {"kind": kind} | TINY[kind]), kind)
    placed = abstract(tree, mesh)
    shapes = nn.unbox(tree)
    assert jax.tree.structure(placed) == jax.tree.structure(shapes)
    shapes_at = tiny.paths(shapes)
    for path, leaf in tiny.paths(placed).items():
        assert (leaf.shape, leaf.dtype) == (shapes_at[path].shape, shapes_at[path].dtype)
        leaf.sharding.shard_shape(leaf.shape)  # raises where it does not divide


@pytest.mark.parametrize("name", SIZES)
def test_every_large_parameter_of_a_named_size_is_split_as_far_as_the_mesh_allows(name, mesh):
    module = make_module(name, {"size": name}, width=2048, grid=(2, 2))
    tree = abstract(boxes(module, expand(name, {"size": name})["kind"]), mesh)
    assert poorly_sharded(tree) == []
    for path, leaf in tiny.paths(tree).items():
        if leaf.size >= LARGE:
            assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 == leaf.size, path


def box(shape, *names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


@pytest.mark.parametrize(
    ("leaf", "error"),
    [
        (box((4,), "color"), r"parameter lm/w: unknown logical axes \['color'\]"),
        (box((4, 4), "embed"), r"parameter lm/w: 1 logical axes \('embed',\) for shape \(4, 4\)"),
        (jax.ShapeDtypeStruct((4,), jnp.float32), r"parameter lm/w \(4,\) names no logical axes"),
    ],
    ids=["an unknown axis", "another number of axes", "no axes"],
)
def test_a_parameter_that_the_rules_do_not_cover_is_an_error_with_its_name(mesh, leaf, error):
    with pytest.raises(ValueError, match=error):
        abstract({"lm": {"w": leaf}}, mesh)


@pytest.mark.parametrize(
    ("shape", "names", "spec"),
    [
        ((4, 6), ("embed", "mlp"), ("fsdp", "tensor")),
        ((6, 4), ("mlp", "embed"), ("tensor", "fsdp")),
        ((4, 7), ("embed", "mlp"), (("fsdp", "tensor"), None)),  # 7 does not divide
        ((6, 7), ("embed", "mlp"), ("fsdp", None)),  # nor 6 by both
        ((8, 4), ("vocab", "embed"), (("tensor", "fsdp"), None)),
        ((6, 4), ("vocab", "embed"), ("tensor", "fsdp")),
        ((7, 4), ("vocab", "embed"), (None, ("fsdp", "tensor"))),
        ((3, 4, 4), ("layers", None, "embed"), (None, None, ("fsdp", "tensor"))),
        ((8, 3, 5), ("batch", None, None), (("data", "fsdp"), None, None)),
        ((8, 3, 8), ("batch", None, "vocab"), ("data", None, ("tensor", "fsdp"))),
        ((2, 4), ("batch", "embed"), ("data", ("fsdp", "tensor"))),
        ((4,), ("norm",), (None,)),
        ((), (), ()),
    ],
)
def test_a_dimension_takes_the_mesh_axes_that_it_divides_by_and_that_are_left(
    mesh, shape, names, spec
):
    assert partition(names, shape, mesh) == PartitionSpec(*spec)


def test_large_leaves_that_do_not_divide_are_reported(mesh):
    tree = {
        "odd": box((1027, 1023), "embed", "mlp"),
        "half": box((1026, 1023), "embed", "mlp"),
        "split": box((1024, 1024), "embed", "mlp"),
        "small": box((25, 23), "embed", "mlp"),
    }
    half, odd = poorly_sharded(abstract(tree, mesh))
    assert odd == "odd float32[1027, 1023]: 1 parts instead of 4, 4.2 MB on every device"
    assert half == "half float32[1026, 1023]: 2 parts instead of 4, 2.1 MB on every device"
    assert poorly_sharded(abstract(tree, make_mesh(MeshConfig()))) == []


def test_a_constraint_holds_where_a_mesh_is_active_and_nowhere_else(mesh):
    x = jax.device_put(jnp.zeros((8, 3, 4)), replicated(mesh))
    fn = lambda x: constrain(x, "batch", None, "mlp")  # noqa: E731
    assert jax.jit(with_mesh(mesh, fn))(x).sharding.spec == PartitionSpec(
        ("data", "fsdp"), None, "tensor"
    )
    assert "sharding_constraint" not in str(jax.make_jaxpr(fn)(x))
    single = make_mesh(MeshConfig(), jax.devices()[:1])
    assert with_mesh(single, fn) is fn


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(fsdp=4), (2, 4, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=-1), (2, 2, 2)),
        (MeshConfig(data=1, fsdp=8), (1, 8, 1)),
    ],
)
def test_the_mesh_covers_all_devices_with_automatic_axes(config, shape):
    mesh = make_mesh(config)
    assert mesh.axis_names == AXES
    assert mesh.devices.shape == shape
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert len(set(mesh.devices.ravel())) == 8


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data=3),
        MeshConfig(data=4),
        MeshConfig(data=16),
        MeshConfig(fsdp=3),
        MeshConfig(data=-1, fsdp=-1),
        MeshConfig(data=-2, fsdp=-4),
        MeshConfig(data=0),
        MeshConfig(data=-1, fsdp=0),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_cover_the_devices_is_refused(config):
    with pytest.raises(ConfigError, match="does not cover 8 devices"):
        make_mesh(config)


def test_a_mesh_may_take_some_devices_only():
    assert make_mesh(MeshConfig(), jax.devices()[:2]).devices.shape == (2, 1, 1)


@dataclasses.dataclass(frozen=True)
class Tpu:
    """What `jax.devices()` tell of a TPU v4."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    process_index: int = 0
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v4"


def slices(count):
    """So many slices of 2 x 2 x 2 chips, listed in turns."""
    ids = [(i, s) for i in range(8) for s in range(count)]
    return np.array([Tpu(8 * s + i, s, (i % 2, i // 2 % 2, i // 4)) for i, s in ids])


@pytest.mark.parametrize("shape", [(2, 4, 2), (4, 2, 2), (16, 1, 1), (2, 1, 8)])
def test_data_alone_crosses_slices(shape):
    mesh = arrange(slices(2), shape, 2)
    assert mesh.shape == shape
    assert len({device.id for device in mesh.ravel()}) == 16
    for i, row in enumerate(mesh):
        assert {device.slice_index for device in row.ravel()} == {2 * i // shape[0]}


def test_neighbors_in_the_mesh_are_neighbors_in_the_slice():
    for row in arrange(slices(1), (2, 2, 2), 1).reshape(4, 2):
        assert np.abs(np.subtract(row[0].coords, row[1].coords)).sum() == 1


def test_slices_that_the_devices_or_the_mesh_do_not_have_are_refused():
    with pytest.raises(ConfigError, match=r"mesh\.slices=1, but the devices are in 2 slices"):
        arrange(slices(2), (16, 1, 1), 1)
    with pytest.raises(ConfigError, match=r"mesh\.data=3 must be a multiple of mesh\.slices=2"):
        make_mesh(MeshConfig(data=3, slices=2), jax.devices()[:3])
    with pytest.raises(ConfigError, match=r"mesh\.slices=0"):
        make_mesh(MeshConfig(slices=0))


def test_devices_without_slices_count_as_many_in_their_order():
    mesh = make_mesh(MeshConfig(fsdp=2, slices=2))
    assert mesh.devices.ravel().tolist() == jax.devices()


def test_a_batch_is_split_over_data_and_fsdp_together(mesh):
    rows = jax.device_put(np.arange(8), batch_sharding(mesh))
    assert {s.data.shape for s in rows.addressable_shards} == {(2,)}
    assert len({s.index[0].start for s in rows.addressable_shards}) == 4
    assert replicated(mesh).is_fully_replicated
