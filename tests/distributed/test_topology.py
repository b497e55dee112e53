"""Names of accelerators, and the devices that are made of them."""

import math
import sys

import pytest

from vadapter.distributed.topology import CHIPS, Topology, devices, larger, parse, smallest
from vadapter.errors import ConfigError

NAMES = {
    "v5e:4x4": Topology("v5e", (4, 4)),
    "V5E:16x16": Topology("v5e", (16, 16)),
    "2*v5e:4x4": Topology("v5e", (4, 4), slices=2),
    "v5e-16": Topology("v5e", (4, 4)),
    "v5litepod-8": Topology("v5e", (2, 4)),
    "v6e-8": Topology("v6e", (2, 4)),
    "v5p-128": Topology("v5p", (4, 4, 4)),
    "v4-8": Topology("v4", (2, 2, 1)),
    "2*v4-16": Topology("v4", (2, 2, 2), slices=2),
    "h100:8": Topology("h100", (8,)),
    "h200:1": Topology("h200", (1,)),
    "a100:16": Topology("a100", (16,)),
    "cpu:4": Topology("cpu", (4,)),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_topology_has_its_common_names(name):
    assert parse(name) == NAMES[name]


def test_every_topology_is_read_under_the_name_that_it_prints():
    for chip, row in CHIPS.items():
        for shape in row.shapes.values():
            for slices in (1, 3):
                made = Topology(chip, shape, slices)
                assert parse(str(made)) == made


@pytest.mark.parametrize(("name", "chips", "hosts"), [
    ("v5e-16", 16, 4), ("v5p-128", 64, 16), ("v4-8", 4, 1), ("v6e-1", 1, 1),
    ("2*v5e:4x4", 32, 8), ("h100:16", 16, 2), ("h200:3", 3, 1),
])  # fmt: skip
def test_accelerator_types_count_cores_of_v4_and_v5p_and_chips_of_the_others(name, chips, hosts):
    assert (parse(name).chips, parse(name).hosts) == (chips, hosts)


@pytest.mark.parametrize(("name", "says"), [
    ("v5e:3x4", "v5e:2x4 (v5e-8, 8 chips), v5e:4x4 (v5e-16, 16 chips)"),
    ("v5e:8x4", "v5e:4x8 (v5e-32, 32 chips)"),
    ("v5p-100", "v5p:4x4x4 (v5p-128, 128 cores)"),
    ("v5p:4x4", "v5p:2x2x4 (v5p-32, 32 cores)"),
    ("v4-9", "v4:2x2x1 (v4-8, 8 cores)"),
    ("v5e-4x4", "a shape is v5e:4x4"),
    ("v5x:4x4", "unknown chip 'v5x'; known: v4, v5e, v5p, v6e, a100, h100, h200, cpu"),
    ("h100:12", "whole hosts of 8"),
    ("2*h100:8", "whole hosts of 8"),
    ("v5e:0x4", "below 1"),
    ("0*v5e:4x4", "below 1"),
    ("v5e", "write v5e:4x4"),
    ("", "write v5e:4x4"),
])  # fmt: skip
def test_an_unknown_topology_is_refused_with_the_nearest_in_one_line(name, says):
    with pytest.raises(ConfigError) as error:
        parse(name)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "next_one"), [
    ("v5e:4x4", "v5e:4x8"), ("v5p:4x4x4", "v5p:4x4x8"), ("2*v5e:4x4", "2*v5e:4x8"),
    ("h100:1", "h100:2"), ("h100:6", "h100:8"), ("h100:8", "h100:16"), ("h100:16", "h100:32"),
])  # fmt: skip
def test_the_next_larger_one_has_more_chips(name, next_one):
    assert larger(parse(name)) == parse(next_one)


@pytest.mark.parametrize(("name", "first"), [
    ("v5e", "v5e:1x1"), ("V5LITE", "v5e:1x1"), ("v5p", "v5p:2x2x1"), ("h100", "h100:1"),
])  # fmt: skip
def test_a_generation_alone_begins_with_its_smallest_slice(name, first):
    assert smallest(name) == parse(first)
    assert smallest(first) is None


def test_nothing_is_larger_than_the_largest_slice():
    assert larger(parse("v5e:16x16")) is None


def test_the_clock_is_the_peak_over_the_products_of_a_cycle():
    cycle = {"v4": 8 * 128**2, "v5p": 8 * 128**2, "v5e": 4 * 128**2, "v6e": 4 * 256**2}
    for chip, products in cycle.items():
        assert CHIPS[chip].peak / (2 * products) == pytest.approx(CHIPS[chip].clock, rel=0.01)


@pytest.mark.parametrize("name", ["h100:8", "cpu:4"])
def test_for_gpus_and_cpus_there_are_as_many_cpu_devices(name):
    made = devices(parse(name))
    assert made.shape == (parse(name).chips,)
    assert {device.platform for device in made.ravel()} == {"cpu"}


def test_more_cpu_devices_than_the_process_has_are_refused():
    with pytest.raises(ConfigError, match="this process has 8"):
        devices(parse("cpu:9"))


def test_a_tpu_without_its_compiler_is_refused_with_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)  # as if not installed
    with pytest.raises(ConfigError, match=r"pip install 'vadapter\[tpu\]'"):
        devices(parse("v5e:4x4"))


@pytest.mark.libtpu
@pytest.mark.parametrize("name", ["v5e:1x1", "v5e:2x4", "v4-8", "v5p-8", "v6e-4", "2*v5e:2x2"])
def test_a_chip_is_one_device_and_slices_are_distinguished(name):
    wanted = parse(name)
    made = devices(wanted).ravel()
    assert len(made) == wanted.chips
    assert {device.platform for device in made} == {"tpu"}
    assert len({getattr(d, "slice_index", None) or 0 for d in made}) == wanted.slices


@pytest.mark.libtpu
def test_the_compiler_supports_every_slice_of_the_table():
    for chip, row in CHIPS.items():
        for shape in row.shapes.values():
            made = devices(Topology(chip, shape))
            assert made.size == math.prod(shape), (chip, shape)
