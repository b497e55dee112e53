"""Loading holds the process's own shards and one tensor beside them, and not much more.

The numbers of the large checkpoint, beside the library's own reading:

    python -m pytest -m slow -s tests/weights/test_memory.py
"""

import itertools
from pathlib import Path

import pytest
from support.cases import some_slow

from benches.bench_load import measure, write

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs /proc of Linux to measure memory"
)


def show(name: str, found: dict[str, float]) -> None:
    sizes = ("peak", "shards", "largest", "stored")
    megabytes = {k: round(found[k] / 1e6) for k in sizes}
    speed = found["stored"] / found["seconds"] / 1e9
    print(f"\n{name}: {megabytes} MB, {found['seconds']:.1f} s, {speed:.2f} GB/s", end="")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """gigabytes -> a checkpoint of about that size, written once."""
    made = {}

    def folder(gigabytes):
        if gigabytes not in made:
            made[gigabytes] = write(tmp_path_factory.mktemp("large"), gigabytes)
        return made[gigabytes]

    return folder


@pytest.mark.parametrize(
    ("devices", "dtype"),
    some_slow(
        itertools.product([1, 8], ["bfloat16", "float32"]), fast=[(1, "bfloat16"), (8, "float32")]
    ),
)
@pytest.mark.parametrize(
    ("gigabytes", "times"), [(0.3, 1), pytest.param(2, 3, marks=pytest.mark.slow)]
)
def test_peak_memory_is_the_own_shards_and_the_largest_tensor(
    folders, gigabytes, times, devices, dtype
):
    for _ in range(times):
        found = measure("ours", folders(gigabytes), dtype, devices)
        show(f"{devices} devices, {dtype}", found)
        assert found["peak"] < found["shards"] + found["largest"]
        # All of it in the dtype asked for, once: replicas on one host are one.
        assert found["shards"] == found["stored"] * (2 if dtype == "float32" else 1)


@pytest.mark.slow
def test_loading_takes_at_most_four_times_as_long_as_the_librarys_own_reading(folders):
    """Ours also transposes every linear layer and stacks them."""
    theirs = min(measure("library", folders(2))["seconds"] for _ in range(3))
    ours = [measure("ours", folders(2)) for _ in range(3)]
    show("ours", min(ours, key=lambda found: found["seconds"]))
    print(f"\nsafetensors: {theirs:.1f} s", end="")
    assert min(found["seconds"] for found in ours) < 4 * theirs
