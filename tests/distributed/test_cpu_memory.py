"""The allocator on the CPU: temporaries of a program are not mapped again at every call."""

import os
import subprocess
import sys

import pytest
from support.paths import ROOT

PROGRAM = """
import resource
from vadapter.distributed.compile import keep_memory
{keep}
import jax, jax.numpy as jnp
x = jnp.zeros({megabytes} << 18)
fn = jax.jit(lambda x: jnp.flip(jax.lax.optimization_barrier(jnp.flip(x) + 1)).sum())
for _ in range(40):
    fn(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    fn(x).block_until_ready()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10)
"""


def _page_faults(megabytes: int, keep: str) -> int:
    program = PROGRAM.format(megabytes=megabytes, keep=keep)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
@pytest.mark.parametrize("megabytes", [12, 150])
def test_a_call_takes_no_new_pages_for_its_temporaries(megabytes):
    pages = megabytes << 8  # of 4 KiB
    assert _page_faults(megabytes, "keep_memory()") < pages / 10
    if megabytes > 32:  # above every threshold, memory is mapped again: the count sees it
        assert _page_faults(megabytes, "") > pages / 2
