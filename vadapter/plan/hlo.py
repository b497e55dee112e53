"""What a compiled program does, read from its text: products, collectives, estimated cycles.

The compiler's own count takes the body of a loop once; here a loop counts as often as it runs.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

BITS = {"pred": 8, "token": 0, "opaque": 0}  # others end with their number of bits: bf16, f8e4m3fn
COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
NO_ESTIMATE = 2**63 - 1  # what the compiler writes where it has none
Shape = tuple[str, tuple[int, ...]]  # dtype, dimensions


class Sent(NamedTuple):
    """Collectives of a kind: how many, and bytes on each device, see `_bytes_sent`."""

    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program does on one device.

    Attributes:
      flops: of matrix products and convolutions, a multiply-add is two.
      cycles: the compiler's estimates of operations, summed; 0 if it makes none, as for CPUs.
        Collectives and hand-written kernels are not among them.
      collectives: kind -> what is sent.
      unestimated: of `flops`, those of operations whose cycles the compiler could not estimate.
    """

    flops: int
    cycles: int
    collectives: dict[str, Sent]
    unestimated: int = 0


class Instruction(NamedTuple):
    """A line: `%name = shapes op(operands), rest`."""

    name: str
    shapes: tuple[Shape, ...]
    op: str
    operands: tuple[str, ...]
    rest: str


def walk(text: str) -> Work:
    """The work of an optimized HLO module.

    Loops count as often as the compiler knows, or as the largest number that their condition
    compares with: a loop that may end early counts in full.
    """
    program = _Program(text)
    totals = program.total(program.entry)
    kinds = [kind for kind in COLLECTIVES if totals[f"count {kind}"]]
    return Work(
        totals["flops"],
        totals["cycles"],
        {kind: Sent(totals[f"count {kind}"], totals[f"bytes {kind}"]) for kind in kinds},
        totals["unestimated"],
    )


class _Program:
    """Computations by name; each is summed once."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self._read(text.splitlines())
        self.total = functools.cache(self._total)

    def _read(self, lines: list[str]) -> None:
        current = None
        for line, following in zip(lines, [*lines[1:], ""], strict=True):
            if current is None:
                if begin := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line.rstrip()):
                    current = self.computations.setdefault(begin[2], {})
                    self.entry = begin[2] if begin[1] else self.entry
            elif line == "}" and not following.strip():  # a kernel's text may have a lone brace
                current = None
            elif found := _instruction(line):
                current[found.name] = found

    def _total(self, name: str) -> Counter[str]:
        out: Counter[str] = Counter()
        for line in self.computations[name].values():
            flops = self._products(name, line)
            for inner, times in self._inside(line):
                for key, value in self.total(inner).items():
                    if key == "flops":
                        flops += times * value
                    elif line.op != "fusion":  # its own line has the estimate of all that is in it
                        out[key] += times * value
            out["flops"] += flops
            if cycles := re.search(r'"estimated_cycles":"(\d+)"', line.rest):
                if (count := int(cycles[1])) == NO_ESTIMATE:
                    out["unestimated"] += flops
                else:
                    out["cycles"] += count
        for kind, size in self._collectives(name):
            out[f"count {kind}"] += 1
            out[f"bytes {kind}"] += size
        return out

    def _products(self, name: str, line: Instruction) -> int:
        if line.op not in ("dot", "convolution"):
            return 0
        left, right = (self.computations[name][operand].shapes[0] for operand in line.operands[:2])
        return _dot(line, left) if line.op == "dot" else _convolution(line, left, right)

    def _collectives(self, name: str) -> Iterator[tuple[str, int]]:
        """(kind, bytes) of what a computation and its fusions send, without its loops and calls.

        TPU programs fuse a collective with products that run meanwhile: its begin, its parts and
        its end are then in several fusions, all with the number of the same channel.
        """
        seen: set[str] = set()
        for line, lines in self._fused(name):
            kind = line.op.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            channel = re.search(r"channel_id=(\d+)", line.rest)
            if channel and channel[1] in seen:
                continue
            seen |= {channel[1]} if channel else set()
            read = [
                s for operand in line.operands if operand in lines for s in lines[operand].shapes
            ]
            yield kind, _bytes_sent(line, read)

    def _fused(self, name: str) -> Iterator[tuple[Instruction, dict[str, Instruction]]]:
        """The instructions of a computation and of its fusions, each with those beside it."""
        lines = self.computations[name]
        for line in lines.values():
            yield line, lines
            if line.op == "fusion":
                for inner, _ in self._inside(line):
                    yield from self._fused(inner)

    def _inside(self, line: Instruction) -> Iterator[tuple[str, int]]:
        """Computations that an instruction runs, and how often."""
        named = lambda key: re.findall(rf"{key}=%?([\w.\-]+)", line.rest)  # noqa: E731
        if line.op == "while":
            yield named("body")[0], self._times(line, named("condition")[0])
        elif line.op == "conditional":
            branches = re.search(r"branch_computations=\{(.*?)\}", line.rest)
            names = re.findall(r"[\w.\-]+", branches[1]) if branches else []
            names += named("true_computation") + named("false_computation")
            yield max(names, key=lambda name: self.total(name)["flops"]), 1
        elif line.op in ("fusion", "async-start"):
            yield from ((name, 1) for name in named("calls"))
        elif line.op == "call":
            yield from ((name, 1) for name in named("to_apply"))

    def _times(self, line: Instruction, condition: str) -> int:
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line.rest)
        return int(known[1]) if known else max(self._constants(condition), default=1)

    def _constants(self, name: str) -> Iterator[int]:
        """The integers in a condition, and in what it calls."""
        for line in self.computations[name].values():
            if line.op == "constant" and line.shapes[0][0] in ("s32", "u32", "s64"):
                yield from map(int, line.operands)
            for called in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", line.rest):
                yield from self._constants(called)


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line)
    if not found:
        return None
    text = found[2]
    end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    shapes, text = _shapes(text[:end]), text[end:].lstrip()
    op, bracket, _ = text.partition("(")
    if not bracket:
        return None
    end = _closing(text, len(op))
    inside = text[len(op) + 1 : end]
    operands = re.findall(r"%([\w.\-]+)", inside) or re.findall(r"[\w.\-]+", inside)
    return Instruction(found[1], shapes, op, tuple(operands), text[end + 1 :])


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for at in re.finditer(r"[()]", text[start:]):
        depth += 1 if at[0] == "(" else -1
        if not depth:
            return start + at.start()
    return len(text)


def _shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a shape: several of a tuple."""
    found = re.findall(r"([a-z]\w*)\[([\d,]*)\]", text)
    return tuple((kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in found)


def _size(shape: Shape) -> int:
    kind, dims = shape
    width = re.match(r"[a-z]+(\d+)", kind)
    bits = BITS.get(kind, int(width[1]) if width else 0)
    return math.prod(dims) * bits // 8


def _bytes_sent(line: Instruction, operands: list[Shape]) -> int:
    """The larger of what a collective reads and makes: the gathered array, the unreduced one."""
    made, read = sum(map(_size, line.shapes)), sum(map(_size, operands))
    if line.op in ("all-gather-start", "collective-permute-start"):
        made -= read  # its result names its operands, too
    return max(made, read)


def _numbers(key: str, line: Instruction) -> list[int]:
    found = re.search(rf"{key}=\{{([\d,]*)\}}", line.rest)
    return [int(n) for n in found[1].split(",") if n] if found else []


def _dot(line: Instruction, left: Shape) -> int:
    contracted = math.prod(left[1][i] for i in _numbers("lhs_contracting_dims", line))
    return 2 * math.prod(line.shapes[0][1]) * contracted


def _convolution(line: Instruction, left: Shape, kernel: Shape) -> int:
    """FLOPs of a convolution; the TPU compiler writes matrix products as such, with batches as
    dilated windows, of which most positions meet nothing (as in XLA's HloCostAnalysis).
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.rest)
    assert labels is not None
    of = lambda key, names, shape: shape[1][names.index(key)]  # noqa: E731
    pairs = 1
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", _window(line)))
    for i in (c for c in labels[3] if c.isdigit()):
        pairs *= _pairs(
            of(i, labels[3], line.shapes[0]), of(i, labels[1], left), of(i, labels[2], kernel),
            {key: value.split("x")[int(i)] for key, value in window.items()},
        )  # fmt: skip
    grouped = re.search(r"batch_group_count=(\d+)", line.rest)
    batch = of("b", labels[1], left) // (int(grouped[1]) if grouped else 1)
    return 2 * batch * of("o", labels[2], kernel) * of("i", labels[2], kernel) * pairs


def _window(line: Instruction) -> str:
    found = re.search(r"window=\{(.*?)\}", line.rest)
    return found[1] if found else ""


def _pairs(outputs: int, inputs: int, size: int, window: dict[str, str]) -> int:
    """Pairs of an output and a place of the kernel, along a dimension, that meet an input."""
    stride, spread = int(window.get("stride", 1)), int(window.get("rhs_dilate", 1))
    gap, before = int(window.get("lhs_dilate", 1)), int(window.get("pad", "0_0").split("_")[0])
    if size == 1 and stride == gap == 1 and not before:
        return min(outputs, inputs)
    last = (inputs - 1) * gap
    places = (o * stride + k * spread - before for o in range(outputs) for k in range(size))
    return sum(0 <= place <= last and place % gap == 0 for place in places)
