"""Functions whose traced program is kept, so that the next process neither traces nor lowers them.

The program is StableHLO without the values of any argument: parameters may change, shapes may not.
It is compiled through JAX's persistent cache, whose key includes the machine. A program is used
only where it was made: in the folder of `io.results`, on the platform and by the versions of its
key. One on several devices is traced every time, as its shardings follow from them.
"""

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from vadapter.distributed import hosts
from vadapter.distributed.compile import jit
from vadapter.io import results

_KIND = "program"

log = logging.getLogger(__name__)


class Program:
    """A function of trees of arrays to a dict of arrays, compiled once per shape.

    Args:
      fn: the function; called to be traced, unless its program is kept.
      facts: a JSON value of all that the program follows from but the shapes of the arguments; None
        if that is unknown, so that it cannot be kept.
      mesh: of the devices that it runs on.
      use: of compiler options, see `compile.OPTIONS`.
    """

    def __init__(
        self, fn: Callable[..., Any], facts: Any, mesh: jax.sharding.Mesh,
        use: str = "",
    ):  # fmt: skip
        self._fn, self._facts, self._device = fn, facts, mesh.devices.flat[0]
        self._jit = functools.partial(jit, use=use)
        self._keeps = facts is not None and mesh.size == 1 and hosts.count() == 1
        self._jitted: Any = None
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        """Return the function's result."""
        if not (self._keeps and results.folder()):
            return self._plain()(*args)
        leaves, structure = jax.tree.flatten(args)
        shapes = tuple((x.shape, x.dtype.name) for x in leaves)
        if (shapes, structure) not in self._compiled:
            self._compiled[shapes, structure] = self._compile(args, shapes, str(structure))
        return self._compiled[shapes, structure](*args)

    def _plain(self) -> Any:
        if self._jitted is None:
            self._jitted = self._jit(self._fn)
        return self._jitted

    def _compile(self, args: Any, shapes: Any, structure: str) -> Callable[..., Any]:
        """Return the compiled program of some arguments: the kept one, or traced and then kept."""
        device = self._device
        key = {
            "facts": self._facts, "arguments": [structure, shapes], "platform": device.platform,
            "device": device.device_kind, "settings": _settings(),
        }  # fmt: skip
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
        data = results.read(_KIND, key)
        if data is not None:
            try:
                return self._call(_unpack(data, abstract, device.platform), args)
            except Exception as error:  # of another format: trace it again
                log.warning("a kept program cannot be used (%s); it is made again", error)
        try:
            program = export.export(jax.jit(self._fn), platforms=[device.platform])(*abstract)
            data = _pack(program)
        except (ValueError, NotImplementedError) as error:  # what cannot be serialized
            log.debug("a program is not kept: %s", error)
            return self._plain()
        results.write(_KIND, key, data)
        # Not `program`: names in it differ, and the compilation would be kept under another key.
        return self._call(_unpack(data, abstract, device.platform), args)

    def _call(self, program: export.Exported, args: Any) -> Callable[..., Any]:
        return self._jit(program.call).lower(*args).compile()


def _settings() -> dict[str, str]:
    """Return the settings of JAX that a traced program may depend on."""
    variables = (k for k in os.environ if k.startswith("JAX_") and "CACHE" not in k)
    set_by_variables = {name: os.environ[name] for name in variables}
    names = ("jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion")
    return set_by_variables | {name: str(getattr(jax.config, name)) for name in names}


def _pack(program: export.Exported) -> bytes:
    """Return a program as bytes: a line of JSON, then its StableHLO.

    Raises:
      ValueError: its result is not a dict of arrays, or it has effects.
    """
    outputs = program.out_tree.unflatten(program.out_avals)
    if program.out_tree != jax.tree.structure(dict.fromkeys(outputs, 0)):
        raise ValueError("its result is not a dict of arrays")
    if program.ordered_effects or program.unordered_effects or program.uses_global_constants:
        raise ValueError("it has effects or dynamic shapes")
    header = {
        "outputs": {name: [list(x.shape), x.dtype.name] for name, x in outputs.items()},
        "used": list(program.module_kept_var_idx),
        "convention": program.calling_convention_version,
    }
    return json.dumps(header).encode() + b"\n" + bytes(program.mlir_module_serialized)


def _unpack(data: bytes, abstract: Any, platform: str) -> export.Exported:
    """Return the program of `_pack` for arguments of these shapes.

    `Exported.serialize` would need another library. What it adds to StableHLO are the types of
    arguments and results: those of a function of the same types that returns zeros.

    Raises:
      ValueError: it is of another version of JAX.
    """
    line, _, module = data.partition(b"\n")
    header = json.loads(line)

    def zeros(*_: Any) -> dict[str, jax.Array]:
        return {n: jax.lax.full(s, 0, jnp.dtype(d)) for n, (s, d) in header["outputs"].items()}

    same_types = export.export(jax.jit(zeros), platforms=[platform])(*abstract)
    if same_types.calling_convention_version != header["convention"]:
        raise ValueError(f"calling convention {header['convention']}")
    return dataclasses.replace(
        same_types, mlir_module_serialized=module, module_kept_var_idx=tuple(header["used"])
    )
