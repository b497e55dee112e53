"""Work of a compiled program, read from its HLO text: products, collectives, estimated cycles.

XLA's own cost analysis counts the body of a loop once; here it counts once per iteration.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

# Names of other types contain their number of bits: bf16, f8e4m3fn.
BITS = {"pred": 8, "token": 0, "opaque": 0}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
               "ragged-all-to-all", "collective-broadcast")  # fmt: skip
NO_ESTIMATE = 2**63 - 1  # what the compiler writes for an operation that it has no estimate of
Shape = tuple[str, tuple[int, ...]]  # dtype, dimensions


class Sent(NamedTuple):
    """Number of collectives of a kind, and their bytes on each device, see `_bytes_sent`."""

    count: int
    bytes: int


class Work(NamedTuple):
    """Work of a program on one device."""

    flops: int  # of matrix products and convolutions; a multiply-add is two
    cycles: int  # the compiler's, without collectives and hand-written kernels; 0: no estimates
    collectives: dict[str, Sent]  # by kind
    unestimated: int = 0  # part of `flops` in operations for which the compiler estimates no cycles
    # Hand-written kernels by the (FLOPs, bytes) that they state, and how often each runs; their
    # FLOPs are part of `flops`, and the compiler estimates no cycles for them.
    kernels: Mapping[tuple[int, int], int] = {}


class Instruction(NamedTuple):
    """A line of a computation: `%name = shapes op(operands), rest`."""

    name: str
    shapes: tuple[Shape, ...]
    op: str
    operands: tuple[str, ...]
    rest: str

    def match(self, pattern: str) -> str:
        """Return the first group of a pattern in the attributes of the instruction, or ""."""
        match = re.search(pattern, self.rest)
        return match[1] if match else ""

    def computations(self, key: str) -> list[str]:
        """Return the names of the computations in an attribute."""
        return re.findall(rf"(?:{key})=%?([\w.\-]+)", self.rest)


def walk(text: str) -> Work:
    """Return the work of an optimized HLO module.

    A loop has the number of iterations that the compiler knows, or else the largest number in its
    condition: a loop that may end early counts in full.
    """
    program = _Program(text)
    totals = program.total(program.entry)
    kinds = [kind for kind in COLLECTIVES if totals[f"count {kind}"]]
    return Work(
        totals["flops"],
        totals["cycles"],
        {kind: Sent(totals[f"count {kind}"], totals[f"bytes {kind}"]) for kind in kinds},
        totals["unestimated"],
        {key: n for key, n in totals.items() if isinstance(key, tuple)},
    )


class _Program:
    """Computations by name; the totals of each are computed once."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self.total = functools.cache(self._total)
        current, lines = None, text.splitlines()
        for line, following in zip(lines, [*lines[1:], ""], strict=True):
            if current is None:
                if begin := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line.rstrip()):
                    current = self.computations.setdefault(begin[2], {})
                    self.entry = begin[2] if begin[1] else self.entry
            elif line == "}" and not following.strip():  # a kernel's text may have a lone brace
                current = None
            elif instruction := _instruction(line):
                current[instruction.name] = instruction

    def _total(self, name: str) -> Counter[Any]:
        totals: Counter[Any] = Counter()
        for line in self.computations[name].values():
            flops = self._products(name, line)
            for inner, times in self._called(line):
                for key, value in self.total(inner).items():
                    if key == "flops":
                        flops += times * value
                    elif line.op != "fusion":  # a fusion's own line has the estimate of its content
                        totals[key] += times * value
            if kernel := _kernel(line):
                flops += kernel[0]
                totals[kernel] += 1
            totals["flops"] += flops
            if cycles := line.match(r'"estimated_cycles":"(\d+)"'):
                if int(cycles) == NO_ESTIMATE:
                    totals["unestimated"] += flops
                else:
                    totals["cycles"] += int(cycles)
        for kind, size in self._collectives(name):
            totals[f"count {kind}"] += 1
            totals[f"bytes {kind}"] += size
        return totals

    def _products(self, name: str, line: Instruction) -> int:
        if line.op not in ("dot", "convolution"):
            return 0
        left, right = (self.computations[name][operand].shapes[0] for operand in line.operands[:2])
        return _dot(line, left) if line.op == "dot" else _convolution(line, left, right)

    def _collectives(self, name: str) -> Iterator[tuple[str, int]]:
        """Yield (kind, bytes) of the collectives of a computation and its fusions.

        Those of its loops and calls are not included. TPU programs fuse a collective with products
        that run meanwhile: its begin, parts and end are then in several fusions, all with the same
        channel, and count once.
        """
        channels: set[str] = set()
        for line, siblings in self._fused(name):
            kind = line.op.removesuffix("-start")
            channel = line.match(r"channel_id=(\d+)")
            if kind not in COLLECTIVES or channel in channels:
                continue
            channels |= {channel} - {""}
            operands = [siblings[operand] for operand in line.operands if operand in siblings]
            yield kind, _bytes_sent(line, [shape for one in operands for shape in one.shapes])

    def _fused(self, name: str) -> Iterator[tuple[Instruction, dict[str, Instruction]]]:
        """Yield the instructions of a computation and its fusions, each with its computation."""
        lines = self.computations[name]
        for line in lines.values():
            yield line, lines
            if line.op == "fusion":
                for inner, _ in self._called(line):
                    yield from self._fused(inner)

    def _called(self, line: Instruction) -> Iterator[tuple[str, int]]:
        """Yield the computations that an instruction runs, and the number of times."""
        if line.op == "while":
            condition = line.computations("condition")[0]
            known = line.match(r'"known_trip_count":\{"n":"(\d+)"\}')
            times = int(known) if known else max(self._constants(condition), default=1)
            yield line.computations("body")[0], times
        elif line.op == "conditional":
            names = re.findall(r"[\w.\-]+", line.match(r"branch_computations=\{(.*?)\}"))
            names += line.computations("true_computation|false_computation")
            yield max(names, key=lambda name: self.total(name)["flops"]), 1
        elif key := {"fusion": "calls", "async-start": "calls", "call": "to_apply"}.get(line.op):
            yield from ((name, 1) for name in line.computations(key))

    def _constants(self, name: str) -> Iterator[int]:
        """Yield the integers in a condition and in the computations that it calls."""
        for line in self.computations[name].values():
            if line.op == "constant" and line.shapes[0][0] in ("s32", "u32", "s64"):
                yield from map(int, line.operands)
            for called in line.computations("calls|to_apply"):
                yield from self._constants(called)


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line)
    if not match:
        return None
    text = match[2]
    end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    shapes, text = _shapes(text[:end]), text[end:].lstrip()
    op, bracket, _ = text.partition("(")
    if not bracket:
        return None
    end = _closing(text, len(op))
    inside = text[len(op) + 1 : end]
    operands = re.findall(r"%([\w.\-]+)", inside) or re.findall(r"[\w.\-]+", inside)
    return Instruction(match[1], shapes, op, tuple(operands), text[end + 1 :])


def _closing(text: str, start: int) -> int:
    """Return the index of the parenthesis that closes the one at `start`."""
    depth = 0
    for bracket in re.finditer(r"[()]", text[start:]):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            return start + bracket.start()
    return len(text)


def _shapes(text: str) -> tuple[Shape, ...]:
    """Return the shapes in a text; a tuple has several."""
    matches = re.findall(r"([a-z]\w*)\[([\d,]*)\]", text)
    return tuple((kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in matches)


def _size(shape: Shape) -> int:
    kind, dims = shape
    width = re.match(r"[a-z]+(\d+)", kind)
    bits = BITS.get(kind, int(width[1]) if width else 0)
    return math.prod(dims) * bits // 8


def _bytes_sent(line: Instruction, operands: list[Shape]) -> int:
    """Return the larger of a collective's input and output: gathered or not yet reduced."""
    result, read = sum(map(_size, line.shapes)), sum(map(_size, operands))
    if line.op in ("all-gather-start", "collective-permute-start"):
        result -= read  # its result contains its operands
    return max(result, read)


def _kernel(line: Instruction) -> tuple[int, int] | None:
    """Return the FLOPs and bytes that a hand-written kernel states; None: it is none."""
    if line.op != "custom-call" or not (flops := line.match(r'"cost_estimate":\{"flops":"(\d+)"')):
        return None
    return int(flops), int(line.match(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"') or 0)


def _dot(line: Instruction, left: Shape) -> int:
    dims = line.match(r"lhs_contracting_dims=\{([\d,]*)\}")
    contracted = math.prod(left[1][int(i)] for i in dims.split(",") if i)
    return 2 * math.prod(line.shapes[0][1]) * contracted


def _convolution(line: Instruction, left: Shape, kernel: Shape) -> int:
    """Return the FLOPs of a convolution.

    The TPU compiler writes matrix products as convolutions, with batches as dilated windows: most
    positions of the kernel meet no input and do not count (as in XLA's HloCostAnalysis).
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.rest)
    assert labels is not None
    left_dims, kernel_dims, output_dims = (
        dict(zip(names, shape[1], strict=True))
        for names, shape in zip(labels.groups(), (left, kernel, line.shapes[0]), strict=True)
    )
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", line.match(r"window=\{(.*?)\}")))
    pairs = 1
    for i in filter(str.isdigit, output_dims):
        axis = {key: value.split("x")[int(i)] for key, value in window.items()}
        pairs *= _pairs(output_dims[i], left_dims[i], kernel_dims[i], axis)
    batch = left_dims["b"] // int(line.match(r"batch_group_count=(\d+)") or 1)
    return 2 * batch * kernel_dims["o"] * kernel_dims["i"] * pairs


def _pairs(outputs: int, inputs: int, size: int, window: dict[str, str]) -> int:
    """Return the number of pairs of output and kernel position that meet an input, for one axis."""
    stride, spread = int(window.get("stride", 1)), int(window.get("rhs_dilate", 1))
    gap, before = int(window.get("lhs_dilate", 1)), int(window.get("pad", "0_0").split("_")[0])
    if size == 1 and stride == gap == 1 and not before:
        return min(outputs, inputs)
    last = (inputs - 1) * gap
    positions = (o * stride + k * spread - before for o in range(outputs) for k in range(size))
    return sum(0 <= position <= last and position % gap == 0 for position in positions)
