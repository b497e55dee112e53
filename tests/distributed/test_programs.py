"""A kept program gives the bits of the traced one, and is used for its own key alone."""

import hashlib
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vadapter.distributed.compile import jit
from vadapter.distributed.mesh import MeshConfig, make_mesh, to_mesh
from vadapter.distributed.programs import Program
from vadapter.io import results

ONE = make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(autouse=True)
def folder(tmp_path):
    before = results.folder()
    results.keep_in(tmp_path / "cache")
    yield tmp_path / "cache"
    results.keep_in(before)


def fn(params, batch, shown):
    """Return a loop over a product, and integers; `params.unused` is not read."""
    x = batch["x"] if shown is None else batch["x"] + shown
    out = jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ params["layers"][0]["kernel"]), x)
    return {"score": out.sum(-1), "best": out.argmax(-1), "half": out.astype(jnp.bfloat16)}


def arguments(seed=0, rows=4, dtype=np.float32, shown=False):
    rng = np.random.default_rng(seed)
    params = {"layers": ({"kernel": rng.standard_normal((8, 8))},), "unused": np.zeros(3)}
    batch = {"x": rng.standard_normal((rows, 8)).astype(np.float32)}
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    return params, to_mesh(batch, ONE), jnp.ones((1, 8)) if shown else None


class Traced:
    """A function that counts how often it is traced."""

    def __init__(self, fn=fn):
        self.fn, self.count = fn, 0

    def __call__(self, *args):
        self.count += 1
        return self.fn(*args)


def later(args, facts="facts", mesh=ONE, fn=fn):
    """What a later process gets, and whether it traced the function."""
    traced = Traced(fn)
    return Program(traced, facts, mesh)(*args), traced.count > 0


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name)


@pytest.mark.parametrize(
    "how", [{}, {"rows": 1}, {"dtype": jnp.bfloat16}, {"shown": True}], ids=str
)
def test_the_kept_program_gives_the_bits_of_the_traced_one(how):
    args = arguments(**how)
    plain = jit(fn)(*args)
    first, traced = later(args)
    assert traced
    again, traced = later(args)
    assert not traced
    assert_same_bits(first, plain)
    assert_same_bits(again, plain)


def test_parameters_are_arguments_of_the_program():
    later(arguments(0))
    for seed in (1, 2):
        args = arguments(seed)
        out, traced = later(args)
        assert not traced
        assert_same_bits(out, jit(fn)(*args))


def test_every_program_is_compiled_once_per_shape_in_a_process():
    traced = Traced()
    program = Program(traced, "facts", ONE)
    for rows in (4, 2, 4, 2):
        program(*arguments(rows=rows))
    assert traced.count == 2


def test_other_facts_shapes_or_types_are_traced():
    hows = [{}, {"rows": 3}, {"dtype": jnp.bfloat16}, {"shown": True}]
    for facts, how in itertools.product(("a", "b"), hows):
        assert later(arguments(**how), facts)[1], (facts, how)
    for facts, how in itertools.product(("a", "b"), hows):
        assert not later(arguments(**how), facts)[1], (facts, how)


def test_other_settings_of_jax_or_another_version_are_traced(monkeypatch):
    assert later(arguments())[1]
    with jax.default_matmul_precision("bfloat16"):
        assert later(arguments())[1]
    with monkeypatch.context() as patch:
        patch.setenv("JAX_SOMETHING", "1")
        assert later(arguments())[1]
    with monkeypatch.context() as patch:
        patch.setattr(results, "version", lambda: "another")
        assert later(arguments())[1]
    assert not later(arguments())[1]


def program_file(folder):
    return next((folder / "results").glob("program-*"))


def test_a_corrupt_program_is_traced_and_kept_again(folder):
    args = arguments()
    plain, _ = later(args)
    path = program_file(folder)
    whole = path.read_bytes()
    for changed in (b"", whole[:40], whole[:-1], whole[:-9] + b"corrupt!!"):
        path.write_bytes(changed)
        out, traced = later(args)
        assert traced
        assert_same_bits(out, plain)
        assert not later(args)[1]


def rewritten(change):
    """Change the header or the module of the kept program; its digest is right."""

    def write(folder):
        content = program_file(folder).read_bytes()[32:]
        line, _, module = content.partition(b"\n")
        header, module = change(json.loads(line), module)
        data = json.dumps(header).encode() + b"\n" + module
        program_file(folder).write_bytes(hashlib.sha256(data).digest() + data)

    return write


@pytest.mark.parametrize(
    "change",
    [
        lambda header, module: ({**header, "convention": 1}, module),
        lambda header, module: ({**header, "used": [0]}, module),
        lambda header, module: ({**header, "outputs": {"score": [[4], "float32"]}}, module),
        lambda header, module: ({}, module),
        lambda header, module: (header, module[: len(module) // 2]),
        lambda header, module: (header, b""),
    ],
    ids=["convention", "arguments", "results", "no header", "half a module", "no module"],
)
def test_a_program_of_another_format_is_traced_and_kept_again(folder, caplog, change):
    args = arguments()
    plain, _ = later(args)
    rewritten(change)(folder)
    out, traced = later(args)
    assert traced
    assert "a kept program cannot be used" in caplog.text
    assert_same_bits(out, plain)
    assert not later(args)[1]


def test_a_program_on_several_devices_is_traced_every_time():
    mesh = make_mesh(MeshConfig(), jax.devices()[:2])
    params, batch, _ = jax.tree.map(np.asarray, arguments())
    args = params, to_mesh(batch, mesh), None
    assert later(args, mesh=mesh)[1]
    assert later(args, mesh=mesh)[1]


def test_a_program_without_facts_is_traced_every_time():
    assert later(arguments(), None)[1]
    assert later(arguments(), None)[1]


def test_a_result_that_is_no_dict_of_arrays_is_computed_but_not_kept():
    as_list = lambda *args: list(fn(*args).values())  # noqa: E731
    for _ in range(2):
        out, traced = later(arguments(), fn=as_list)
        assert traced
        assert len(out) == 3
