"""The number of cores follows affinity and the quotas of control groups of both versions."""

import os
import random

import pytest

from vadapter.data import cores


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host of 16 cores; `make(files, own)` writes files of cgroups and this process's own."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)

    def make(files: dict[str, str], own: str) -> int:
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (tmp_path / "self").write_text(own)
        return cores.available(tmp_path / "cgroup", tmp_path / "self")

    return make


@pytest.mark.parametrize(
    ("files", "own", "count"),
    [
        ({}, "0::/\n", 16),
        ({"cpu.max": "max 100000\n"}, "0::/\n", 16),
        ({"cpu.max": "200000 100000\n"}, "0::/\n", 2),
        ({"cpu.max": "150000 100000\n"}, "0::/\n", 2),
        ({"cpu.max": "5000 100000\n"}, "0::/\n", 1),
        ({"cpu.max": "9900000 100000\n"}, "0::/\n", 16),
        ({"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, "0::/a/b\n", 3),
        ({"a/b/cpu.max": "100000 100000\n", "a/cpu.max": "300000 100000\n"}, "0::/a/b\n", 1),
        ({"other/cpu.max": "100000 100000\n"}, "0::/a\n", 16),
        # In a container, with the path outside of it.
        ({"cpu.max": "400000 100000\n"}, "0::/docker/0123\n", 4),
        (
            {"cpu/job/cpu.cfs_quota_us": "250000\n", "cpu/job/cpu.cfs_period_us": "50000\n"},
            "5:memory:/job\n4:cpuacct,cpu:/job\n",
            5,
        ),
        (
            {"cpu/job/cpu.cfs_quota_us": "-1\n", "cpu/job/cpu.cfs_period_us": "50000\n"},
            "4:cpu:/job\n",
            16,
        ),
        ({"cpu.max": "what\n"}, "0::/\n", 16),
    ],
)
def test_quotas_of_the_own_group_and_those_above_it_apply(host, files, own, count):
    assert host(files, own) == count


def test_without_control_groups_affinity_counts_and_without_affinity_all_cores(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 9}, raising=False)
    assert cores.available(tmp_path, tmp_path / "none") == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert cores.available(tmp_path, tmp_path / "none") == 7


def test_readers_use_every_core_and_at_most_one_more():
    draw = random.Random(0)
    for count in (1, 2, 3, 4, 8, 15, 16):
        assert cores.readers(0, None, count) == (0, max(2, count))
        workers, threads = cores.readers(-1, None, count)
        assert workers == count - 1  # with one core, the threads of this process
        assert (workers, threads) == ((count - 1, 1) if workers > 1 else (workers, 2))
        asked = draw.randrange(1, 40)
        workers, threads = cores.readers(asked, None, count)
        assert workers == asked
        assert threads >= 1
        assert threads == 1 or workers * threads <= count
        assert cores.readers(asked, 3, count) == (asked, 3)
    assert cores.readers(0, None, 200) == (0, 16)
