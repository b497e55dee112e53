"""The mesh and the one table from logical to mesh axes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, PartitionSpec

from vadapter.errors import ConfigError
from vadapter.models.variants import KINDS, SIZES, make_module
from vadapter.parallel.mesh import (
    AXES,
    RULES,
    MeshConfig,
    batch_sharding,
    make_mesh,
    replicated,
    shardings,
)

TINY = {
    "vit": {"image_size": 16, "patch": 8, "width": 16, "depth": 1, "heads": 2, "mlp_dim": 32,
            "class_token": True},
    "mobilenet": {"image_size": 32, "classes": 4},
    "resampler": {"queries": 4, "query_dim": 16, "hidden_dim": 16, "layers": 1, "heads": 2,
                  "space_embed": True},
    "pooler": {"queries": 4, "width": 16, "heads": 2},
    "mlp": {"hidden_dim": 16, "width": 16},
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
    elif kind in ("vit", "mobilenet"):
        args = (jnp.zeros((1, 1, module.view.size, module.view.size, 3)),)
    elif kind == "fc":
        args = (jnp.zeros((1, 2, 16)),)
    else:
        args = (jnp.zeros((1, 8, 4, 16)),)
    return jax.eval_shape(module.init, jax.random.key(0), *args)["params"]


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
    assert used - {None} == set(RULES)
    assert set(RULES.values()) <= {None, *AXES}


@pytest.mark.parametrize("kind", TINY)
def test_every_parameter_of_every_kind_gets_a_valid_sharding(kind, mesh):
    tree = boxes(make_module(kind, {"kind": kind} | TINY[kind]), kind)
    placed = shardings(tree, mesh)
    shapes = nn.unbox(tree)
    assert jax.tree.structure(placed) == jax.tree.structure(shapes)
    for path, sharding in tiny.paths(placed).items():
        sharding.shard_shape(tiny.paths(shapes)[path].shape)  # raises where it does not divide


@pytest.mark.parametrize("name", [n for n in SIZES if n != "llm_8b"])
def test_every_large_parameter_of_a_named_size_is_split(name, mesh):
    module = make_module(name, {"size": name})
    kind = next(k for k, (config, _) in KINDS.items() if isinstance(module.config, config))
    tree = boxes(module, kind)
    for path, leaf in tiny.paths(nn.unbox(tree)).items():
        if leaf.size >= 2**20:
            spec = tiny.paths(shardings(tree, mesh))[path].spec
            assert any(axis for axis in spec), f"{path} {leaf.shape} is on every device in full"


def test_an_axis_without_a_rule_is_an_error(mesh):
    box = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((4,), jnp.float32), ("colour",))
    with pytest.raises(KeyError, match="colour"):
        shardings({"w": box}, mesh)


def test_a_dimension_that_does_not_divide_stays_whole_and_a_bare_leaf_is_replicated(mesh):
    box = lambda *shape: nn.LogicallyPartitioned(  # noqa: E731
        jax.ShapeDtypeStruct(shape, jnp.float32), ("embed", "mlp")
    )
    tree = {"fits": box(4, 6), "odd": box(4, 7), "bare": jax.ShapeDtypeStruct((4,), jnp.float32)}
    placed = shardings(tree, mesh)
    assert placed["fits"].spec == PartitionSpec("fsdp", "tensor")
    assert placed["odd"].spec == PartitionSpec("fsdp", None)
    assert placed["bare"].spec == PartitionSpec()


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


def test_a_batch_is_split_over_data_and_fsdp_together(mesh):
    rows = jax.device_put(np.arange(8), batch_sharding(mesh))
    assert {s.data.shape for s in rows.addressable_shards} == {(2,)}
    assert len({s.index[0].start for s in rows.addressable_shards}) == 4
    assert replicated(mesh).is_fully_replicated
