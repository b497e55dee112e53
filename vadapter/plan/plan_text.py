"""A plan for a terminal: a block for each of memory, time and traffic."""

from collections.abc import Iterator

from vadapter.console import quantity, size, table, wrap
from vadapter.distributed.topology import CHIPS, parse
from vadapter.plan.compiled_stats import Figures
from vadapter.plan.plan import Plan, Rows

_PARTS = ("component", "parameters", "state", "per chip")
_SENT = ("collective", "per step", "on each chip")


def as_text(plan: Plan) -> str:
    """All of it, in under 100 columns."""
    return "\n\n".join("\n".join(block) for block in _blocks(plan))


def _blocks(plan: Plan) -> Iterator[list[str]]:
    mesh = " ".join(f"{axis}={n}" for axis, n in plan.mesh.items())
    remat = ", ".join(f"{name} {kind}" for name, kind in plan.remat.items()) or "—"
    int8 = f"; int8 {', '.join(plan.int8)}" if plan.int8 else ""
    yield [
        f"{plan.stage}: {plan.kind}, {plan.steps:,} steps of {plan.batch:,} rows",
        f"on {plan.topology}: {quantity(plan.chips, 'chip')}, {quantity(plan.hosts, 'host')}",
        f"mesh {mesh}; remat {remat}{int8}",
        *wrap(plan.train.how, subsequent=""),
    ]
    fits = [_fit(f"train{_what(one, plan)}", one.train) for one in plan.rows]
    yield [*_parts(plan), *(part for line in fits for part in wrap(line))]
    if plan.decode is not None:
        texts = plan.decode
        search = f" with {texts.beams} beams" if texts.beams > 1 else ""
        what = f"writing {texts.rows} texts of {texts.max_new} tokens{search}"
        yield [*wrap(_fit(what, texts.made)), *wrap("; ".join(_program(texts.made, "a batch")))]
    gpu, used = parse(plan.topology).row.kind == "gpu", plan.train.peak / plan.train.limit
    if gpu and 0.75 < used <= 1:
        yield ["set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95: by default jax takes 0.75 of the memory"]
    yield [part for line in _time(plan) for part in wrap(line)]
    if plan.train.collectives:
        rows = [
            (kind, f"{sent.count:,}", size(sent.bytes))
            for kind, sent in plan.train.collectives.items()
        ]
        yield [table(rows, _SENT, right=(1, 2))]


def _parts(plan: Plan) -> Iterator[str]:
    rows = [
        (name, f"{part.parameters:,}", "trained" if part.trained else "frozen", size(part.bytes))
        for name, part in plan.parts.items()
    ]
    rows.append(("optimizer", "", "", size(plan.optimizer)))
    batch = max(one.batch_bytes for one in plan.rows)
    rows.append(("batch", "", "", size(batch)))
    yield table(rows, _PARTS, right=(1, 3))
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
        f"{plan.utilized_ms:,.1f} ms at {plan.utilization:.0%} of it"
    )
    if plan.estimated_ms is not None:
        yield (
            f"the compiler's estimate, no run and no collectives: {plan.estimated_ms:,.1f} ms, "
            f"{plan.share or 0:.0%} of the peak"
        )
    yield (
        f"the run at {plan.utilization:.0%}: {plan.days:,.2f} days, {plan.chip_hours:,.0f} "
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
