"""Compilation of small models, which takes most of the time of their tests."""

import functools

import jax

# Without what the compiler spends on the speed of its programs.
_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=_OPTIONS)
