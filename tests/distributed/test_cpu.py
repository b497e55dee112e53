"""Settings of a process on a CPU: temporaries are not mapped again, XLA unrolls no kernels."""

import os
import subprocess
import sys

import pytest
from support.paths import ROOT

PROGRAM = """
import resource
from vadapter.distributed import cpu
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
    assert _page_faults(megabytes, "cpu.prepare()") < pages / 3
    if megabytes > 32:  # above every threshold, memory is mapped again: the count sees it
        assert _page_faults(megabytes, "") > pages / 2


FLAGS = """
import os
from vadapter.distributed import cpu
cpu.prepare()
import jax
text = jax.jit(lambda x: (x * 2).sum()).lower(jax.numpy.ones(999)).compile().as_text()
assert "fusion" in text
print(os.environ["XLA_FLAGS"])
"""
UNROLLING = "--xla_backend_extra_options=xla_cpu_disable_loop_unrolling"
OTHER = "--xla_backend_extra_options=xla_cpu_optimize_for_size"


@pytest.mark.parametrize(
    ("given", "then"),
    [
        ("", UNROLLING),
        ("--xla_cpu_enable_fast_math=false", f"--xla_cpu_enable_fast_math=false {UNROLLING}"),
        (OTHER, OTHER),
    ],
)
def test_a_process_adds_its_flags_to_those_of_the_variable_which_win(given, then):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": given}
    done = subprocess.run(
        [sys.executable, "-c", FLAGS], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == then


def test_with_an_accelerator_nothing_is_set():
    program = "import os\nfrom vadapter.distributed import cpu\ncpu.prepare()\nprint(os.environ)"
    env = os.environ | {"JAX_PLATFORMS": "cuda,cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert "'XLA_FLAGS': ''" in done.stdout
