"""A plan for a terminal: a block for each of memory, time and traffic."""

import textwrap
from collections.abc import Iterator

from vadapter.distributed.topology import CHIPS, parse
from vadapter.plan.compiled_stats import Figures
from vadapter.plan.plan import Plan, Rows
from vadapter.report import table

WIDTH = 98
_PARTS = (("component",), ("   parameters",), ("state",), ("on a chip",))
_SENT = (("collective",), ("a step",), ("on each chip",))


def as_text(plan: Plan) -> str:
    """All of it, in under 100 columns."""
    return "\n\n".join("\n".join(block) for block in _blocks(plan))


def _blocks(plan: Plan) -> Iterator[list[str]]:
    mesh = " ".join(f"{axis}={n}" for axis, n in plan.mesh.items())
    remat = ", ".join(f"{name} {kind}" for name, kind in plan.remat.items()) or "—"
    int8 = f"; int8 {', '.join(plan.int8)}" if plan.int8 else ""
    yield [
        f"{plan.stage}: {plan.kind}, {plan.steps:,} steps of {plan.batch:,} rows",
        f"on {plan.topology}: {_many(plan.chips, 'chip')}, {_many(plan.hosts, 'host')}",
        f"mesh {mesh}; remat {remat}{int8}",
        *textwrap.wrap(plan.train.how, WIDTH),
    ]
    fill = lambda line: textwrap.wrap(line, WIDTH, subsequent_indent="  ")  # noqa: E731
    fits = [_fit(f"train{_what(one, plan)}", one.train) for one in plan.rows]
    yield [*_parts(plan), *(part for line in fits for part in fill(line))]
    if plan.decode is not None:
        texts = plan.decode
        search = f" with {texts.beams} beams" if texts.beams > 1 else ""
        what = f"writing {texts.rows} texts of {texts.max_new} tokens{search}"
        yield [*fill(_fit(what, texts.made)), *fill("; ".join(_program(texts.made, "a batch")))]
    gpu, used = parse(plan.topology).row.kind == "gpu", plan.train.peak / plan.train.limit
    if gpu and 0.75 < used <= 1:
        yield ["set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95: by default jax takes 0.75 of the memory"]
    yield [part for line in _time(plan) for part in fill(line)]
    if plan.train.collectives:
        rows = [
            ((kind,), (f"{sent.count:>6,}",), (f"{size(sent.bytes):>12}",))
            for kind, sent in plan.train.collectives.items()
        ]
        yield [table.as_text(rows, _SENT)]


def _parts(plan: Plan) -> Iterator[str]:
    rows: list[tuple[table.Cell, ...]] = [
        ((name,), (f"{part.parameters:>13,}",), ("trained" if part.trained else "frozen",),
         (f"{size(part.bytes):>9}",))
        for name, part in plan.parts.items()
    ]  # fmt: skip
    rows.append((("optimizer",), ("",), ("",), (f"{size(plan.optimizer):>9}",)))
    batch = max(one.batch_bytes for one in plan.rows)
    rows.append((("batch",), ("",), ("",), (f"{size(batch):>9}",)))
    yield table.as_text(rows, _PARTS)
    count = plan.parameters
    yield (
        f"total {count['total']:,} parameters: {count['trained']:,} trained, "
        f"{count['frozen']:,} frozen"
    )


def _what(one: Rows, plan: Plan) -> str:
    """Which of the stage's rows, where there are several."""
    if len(plan.rows) == 1:
        return ""
    frames = f", {one.frames} frames" if one.frames > 1 else ""
    return f" on {', '.join(one.data)} ({one.share:.0%}{frames})"


def _fit(what: str, figures: Figures | None) -> str:
    if figures is None:
        return f"{what}: not made, as the others do not fit"
    if figures.temporaries is None:
        return f"{what}: does not fit: needs {size(figures.peak)} of {size(figures.limit)}"
    verdict = "fits" if figures.fits else "does not fit"
    word = "needs" if not figures.fits else "peak"
    return (
        f"{what}: {verdict}: {word} {size(figures.peak)} of {size(figures.limit)} a chip "
        f"({size(figures.arguments)} stay, {size(figures.temporaries)} temporaries)"
    )


def _time(plan: Plan) -> Iterator[str]:
    row = CHIPS[parse(plan.topology).chip]
    formula = "no formula" if plan.flops is None else f"{_tera(plan.flops)} by formula"
    ratio = "" if plan.flops is None else f", ratio {plan.counted / plan.flops:.4f}"
    mean = "" if len(plan.rows) == 1 else "mean "
    yield f"{mean}TFLOP a step: {formula}, {_tera(plan.counted)} counted{ratio}"
    for one in plan.rows:
        if one.train is not None:
            yield from _program(one.train, f"a step{_what(one, plan)}")
    yield (
        f"a {mean}step: {plan.step_ms:,.1f} ms at the peak ({row.peak / 1e12:g} TFLOP/s a chip), "
        f"{plan.utilised_ms:,.1f} ms at {plan.utilisation:.0%} of it"
    )
    if plan.estimated_ms is not None:
        yield (
            f"the compiler's estimate, no run and no collectives: {plan.estimated_ms:,.1f} ms, "
            f"{plan.share or 0:.0%} of the peak"
        )
    yield (
        f"the run at {plan.utilisation:.0%}: {plan.days:,.2f} days, {plan.chip_hours:,.0f} "
        f"chip-hours; every host reads {plan.rows_s:,.0f} rows/s"
    )


def _program(made: Figures, what: str) -> Iterator[str]:
    compiled = f" ({_tera(made.compiled_flops)} compiled)" if made.compiled_flops else ""
    cycles = f", {made.cycles:,} cycles ({made.estimated_ms:,.1f} ms)" if made.estimated_ms else ""
    if made.unestimated:
        cycles += f", {_tera(made.unestimated)} TFLOP of it without an estimate and at the peak"
    seconds = "" if made.compile_s is None else f"; compiled in {made.compile_s:,.0f} s"
    yield f"{what}: {_tera(made.flops)} TFLOP with what is recomputed{compiled}{cycles}{seconds}"


def _tera(count: float) -> str:
    return f"{count / 1e12:,.1f}" if count >= 1e12 else f"{count / 1e12:.4g}"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def size(count: float) -> str:
    """Bytes as people write them, decimal: 999 kB, 1.71 GB."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{count / 10**power:.3g} {unit}"
    return f"{count:.0f} B"
