"""Text of a plan for terminals: blocks for the setting, memory, time and communication."""

from collections.abc import Iterable, Iterator

from vadapter.console import quantity, size, table, wrap
from vadapter.distributed.mesh import axes
from vadapter.distributed.topology import parse
from vadapter.plan.compiled_stats import ProgramStats
from vadapter.plan.estimate import Plan, Rows

_PARTS = ("component", "parameters", "state", "per chip")
_SENT = ("collective", "per step", "per chip")


def as_text(plan: Plan) -> str:
    """Return the whole plan as text of less than 100 columns."""
    return "\n\n".join("\n".join(block) for block in _blocks(plan))


def _blocks(plan: Plan) -> Iterator[list[str]]:
    remat = ", ".join(f"{name} {kind}" for name, kind in plan.remat.items()) or "—"
    integers = "".join(f"; {kind} {part}" for part, kind in plan.integers.items())
    yield [
        f"{plan.stage}: {plan.kind}, {plan.steps:,} steps of {plan.batch:,} rows",
        f"on {plan.topology}: {quantity(plan.chips, 'chip')}, {quantity(plan.hosts, 'host')}",
        f"mesh {axes(plan.mesh)}; remat {remat}{integers}",
        *wrap(plan.train.how, subsequent=""),
    ]
    yield [
        _memory(plan),
        *_wrapped(_fit(f"train{_data(each, plan)}", each.train) for each in plan.rows),
    ]
    if generation := plan.decode:
        beams = f" with {generation.beams} beams" if generation.beams > 1 else ""
        tokens = f"generation of {generation.max_new} tokens for {generation.rows} rows{beams}"
        yield _wrapped([_fit(tokens, generation.stats), _program(generation.stats, "a batch")])
    train = plan.train
    if parse(plan.topology).row.kind == "gpu" and 0.75 < train.peak / train.limit <= 1:
        yield ["set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95: by default, JAX uses 75 % of the memory"]
    yield _wrapped(_time(plan))
    if train.collectives:
        rows = [
            (kind, f"{sent.count:,}", size(sent.bytes)) for kind, sent in train.collectives.items()
        ]
        yield [table(rows, _SENT, right=(1, 2))]


def _wrapped(lines: Iterable[str]) -> list[str]:
    return [part for line in lines for part in wrap(line)]


def _memory(plan: Plan) -> str:
    rows = [
        (name, f"{part.parameters:,}", "trained" if part.trained else "frozen", size(part.bytes))
        for name, part in plan.parts.items()
    ]
    rows.append(("optimizer", "", "", size(plan.optimizer)))
    rows.append(("batch", "", "", size(max(each.batch_bytes for each in plan.rows))))
    count = plan.parameters
    return (
        f"{table(rows, _PARTS, right=(1, 3))}\n"
        f"total {count['total']:,} parameters: {count['trained']:,} trained, "
        f"{count['frozen']:,} frozen"
    )


def _data(rows: Rows, plan: Plan) -> str:
    """Return which of the stage's rows these are, if there are several."""
    if len(plan.rows) == 1:
        return ""
    frames = f", {rows.frames} frames" if rows.frames > 1 else ""
    return f" on {', '.join(rows.data)} ({rows.share:.0%}{frames})"


def _fit(program: str, stats: ProgramStats | None) -> str:
    if stats is None:
        return f"{program}: not planned, as a larger step does not fit"
    if stats.temporaries is None:
        return f"{program}: does not fit: needs {size(stats.peak)} of {size(stats.limit)}"
    verdict = "fits: peak" if stats.fits else "does not fit: needs"
    return (
        f"{program}: {verdict} {size(stats.peak)} of {size(stats.limit)} per chip "
        f"({size(stats.arguments)} arguments, {size(stats.temporaries)} temporaries)"
    )


def _time(plan: Plan) -> Iterator[str]:
    mean = "" if len(plan.rows) == 1 else "mean "
    yield (
        f"{mean}TFLOP per step: {_tera(plan.flops)} by formula, {_tera(plan.counted)} counted, "
        f"ratio {plan.counted / plan.flops:.4f}"
    )
    for rows in plan.rows:
        if rows.train is not None:
            yield _program(rows.train, f"a step{_data(rows, plan)}")
    peak = parse(plan.topology).row.peak
    yield (
        f"a {mean}step: {plan.step_ms:,.1f} ms at the peak ({peak / 1e12:g} TFLOP/s per chip), "
        f"{plan.utilized_ms:,.1f} ms at {plan.utilization:.0%} of it"
    )
    if plan.estimated_ms is not None:
        yield (
            f"the compiler's estimate, without collectives: {plan.estimated_ms:,.1f} ms, "
            f"{plan.share or 0:.0%} of the peak"
        )
    yield (
        f"the whole stage at {plan.utilization:.0%}: {plan.days:,.2f} days, "
        f"{plan.chip_hours:,.0f} chip-hours; each host reads {plan.rows_s:,.0f} rows/s"
    )


def _program(stats: ProgramStats, unit: str) -> str:
    text = f"{unit}: {_tera(stats.flops)} TFLOP with recomputation"
    if stats.compiled_flops:
        text += f" ({_tera(stats.compiled_flops)} compiled)"
    if stats.estimated_ms:
        text += f", {stats.cycles:,} cycles ({stats.estimated_ms:,.1f} ms)"
    if stats.unestimated:
        text += f"; {_tera(stats.unestimated)} TFLOP have no estimate and count at the peak"
    if stats.kernel_ms:
        text += f"; {stats.kernel_ms:,.1f} ms of it are the bound of kernels without an estimate"
    if stats.compile_s is not None:
        text += f"; compiled in {stats.compile_s:,.0f} s"
    return text


def _tera(count: float) -> str:
    """Return a number of FLOPs in TFLOP."""
    return f"{count / 1e12:,.1f}" if count >= 1e12 else f"{count / 1e12:.4g}"
