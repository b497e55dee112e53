"""Strict numerics for every test, eight fake devices, and the optional real data folder."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS",
    # Tests compile much and compute little: without optimisation they take a quarter of the time.
    "--xla_force_host_platform_device_count=8 "
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
)

import jax
import pytest
from absl import flags

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

if not flags.FLAGS.is_parsed():  # grain reads absl flags
    flags.FLAGS.mark_as_parsed()


def _data_root() -> Path:
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("VADAPTER_DATA", default))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The real data folder; the test is skipped, with the reason, where there is none."""
    root = _data_root()
    if not root.is_dir():
        pytest.skip(f"no real data at {root}; set VADAPTER_DATA to a folder that holds it")
    return root
