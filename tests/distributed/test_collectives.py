"""What the compiled train step sends between devices, and what it never makes."""

import dataclasses
import functools
import re
from math import prod

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support import programs, tiny

WIDTH = 2  # dimensions of a kernel without the layers in front
V = 2560  # more than the tokens of a batch, as ever: what is less is sent instead
# No kernel, nor a part of one, has the shape of anything else; the last block is not in the loop.
LLM = {"width": 120, "heads": 4, "kv_heads": 4, "head_dim": 24, "mlp_dim": 224, "depth": 3}


def program(mesh=None):
    recipe = programs.recipe()
    components = {**recipe.components, "llm": {**recipe.components["llm"], **LLM}}
    tokenizer = dataclasses.replace(recipe.tokenizer, vocab_size=V)
    recipe = dataclasses.replace(recipe, components=components, tokenizer=tokenizer)
    return programs.program("vadapter", mesh, everything=recipe)


@functools.cache
def compiled(mesh):
    """Computation -> its (name of the operation, [shapes that it makes]) in order."""
    stage = program(mesh)
    text = jax.jit(stage.train_step).lower(*stage.arguments()).compile().as_text()
    assert text is not None
    computations, current = {}, None
    for line in text.splitlines():
        if line and not line.startswith(" ") and "{" in line:
            current = "entry" if line.startswith("ENTRY") else line.split()[0]
            computations[current] = []
        found = re.search(r" = (.*?) ([a-z\-]+)\(", line)
        if found and current:
            shapes = re.findall(r"\w+\[([\d,]*)\]", found[1])
            sizes = [tuple(int(n) for n in shape.split(",") if n) for shape in shapes]
            computations[current].append((found[2].removesuffix("-start"), sizes))
    return computations


def made(mesh, *operations, where=lambda name: True):
    """Every shape that one of these operations makes."""
    return {
        shape
        for name, rows in compiled(mesh).items()
        if where(name)
        for operation, shapes in rows
        if operation in operations
        for shape in shapes
    }


def kernels(name, mesh):
    """Shapes of a component's kernels, without the layers: whole, as a device holds them, and as it
    computes with them, once they are gathered over `fsdp`."""
    trainable, frozen = program(mesh).abstract_params()
    whole, part, used = set(), set(), set()
    for path, leaf in tiny.paths((trainable | frozen)[name]).items():
        if path.endswith("kernel"):
            at = leaf.sharding
            spec = PartitionSpec(*(None if axis == "fsdp" else axis for axis in at.spec))
            whole.add(leaf.shape[-WIDTH:])
            part.add(at.shard_shape(leaf.shape)[-WIDTH:])
            used.add(NamedSharding(at.mesh, spec).shard_shape(leaf.shape)[-WIDTH:])
    return whole, part, used


def tail(shapes):
    return {shape[-WIDTH:] for shape in shapes if len(shape) >= WIDTH}


def vocabulary(shapes):
    """Those that hold a row for every token."""
    return {shape for shape in shapes if V in shape}


@pytest.mark.parametrize("mesh", ["tensor", "all"])
def test_tensor_parallelism_gathers_no_whole_weight_of_the_frozen_language_model(mesh):
    whole, part, used = kernels("llm", mesh)
    assert not whole & (part | used), "every kernel is split"
    gathered = made(mesh, "all-gather", "all-to-all")
    assert gathered, "or this test reads nothing"
    assert not {shape for shape in gathered if shape[-WIDTH:] in whole}
    assert made(mesh, "all-reduce"), "activations are summed instead"


@pytest.mark.parametrize("mesh", ["fsdp", "all"])
def test_fsdp_gathers_weights_layer_by_layer_and_inside_the_loop(mesh):
    _, _, used = kernels("llm", mesh)
    layers = program().model.modules["llm"].config.depth
    inside = made(mesh, "all-gather", where=lambda name: name != "entry")
    outside = made(mesh, "all-gather", "all-to-all", where=lambda name: name == "entry")
    assert used <= tail(inside)
    for shape in inside | outside:
        stacked = len(shape) > WIDTH and shape[-WIDTH:] in used and prod(shape[:-WIDTH]) >= layers
        assert not stacked, shape


@pytest.mark.parametrize("mesh", ["fsdp", "tensor", "all"])
def test_the_vocabulary_is_never_gathered(mesh):
    sent = made(mesh, "all-gather", "all-to-all", "collective-permute", "all-reduce")
    assert not vocabulary(sent), "neither embeddings nor logits"


@pytest.mark.parametrize("mesh", ["fsdp", "tensor", "all"])
def test_there_is_no_gradient_of_a_frozen_kernel(mesh):
    trainable, frozen = (kernels(name, mesh)[:2] for name in ("tlm", "llm"))
    products = {shape for shape in made(mesh, "dot", "all-reduce") if len(shape) == WIDTH}
    assert products & (trainable[0] | trainable[1]), "those of the trained ones are there"
    assert not products & (frozen[0] | frozen[1])
