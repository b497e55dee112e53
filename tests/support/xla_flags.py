"""XLA's flags for tests, to be set before JAX is imported."""

from importlib.metadata import version


def xla_flags(devices: int) -> str:
    """Return flags for a number of fake devices.

    Tests compile much and compute little: without optimization they take a quarter of the time.
    """
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    # Those of a process that `cpu.prepare` has set up, so that it changes nothing in tests.
    flags += " --xla_backend_extra_options=xla_cpu_disable_loop_unrolling"
    # Newer compilers stop at a flag that they do not know.
    of_0_10 = " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    return flags + of_0_10 * version("jaxlib").startswith("0.10.")
