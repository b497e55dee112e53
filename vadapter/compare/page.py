"""compare.html: findings, tables and plots of a comparison in one file that loads nothing else."""

import re
from collections.abc import Mapping, Sequence

from vadapter import html_page
from vadapter.compare import plots
from vadapter.compare.curves import Measured
from vadapter.compare.summary import Finding
from vadapter.compare.table import Table, title
from vadapter.html_page import text
from vadapter.report.plots import COLORS

_GLYPHS = dict(zip(plots.MARKERS, "●■▲◆▼", strict=True))
_DARK = ("#4aa8e8", "#ff8a4c", "#2cc79c", "#e39ac6", "#f0b93a", "#9bd8ff")  # of COLORS, in order


def render(
    measured: Measured, findings: Mapping[str, Sequence[Finding]], tables: Sequence[Table],
    columns: Mapping[str, str],
) -> str:  # fmt: skip
    """Return the page.

    Args:
      findings: sentences by heading.
      tables: the results first, then in the order of the page.
      columns: meaning of each column of compare.csv.
    """
    arms = {name: _arm(measured, name) for name in plots.looks(measured)}
    first, *others = tables
    body = [
        f'<p class="sub">{_subtitle(measured)}</p>',
        '<div class="findings">',
        *(_findings(heading, found) for heading, found in findings.items() if found),
        "</div>",
        _table(first, arms),
        *(_plots(measured, i, arms) for i in range(len(measured.criteria))),
        *(_table(table, arms) for table in others),
        _READING,
        _columns(columns),
    ]
    count = len(measured.arms)
    return html_page.page(
        f"{measured.comparison.name}: {count} arms compared", _style(), "\n".join(body)
    )


def _subtitle(measured: Measured) -> str:
    baseline = text(measured.comparison.baseline)
    seeds = {curve.run.seed for arm in measured.arms for curve in arm.curves}
    runs = sum(len(arm.curves) for arm in measured.arms)
    return f"Baseline: <b>{baseline}</b> · {len(seeds)} seed{'s' * (len(seeds) != 1)} · {runs} runs"


def _arm(measured: Measured, name: str) -> str:
    """Return the name of an arm after its marker, as in the plots."""
    look = plots.looks(measured)[name]
    mark = f'<i class="c{COLORS.index(look.color)}">{_GLYPHS[look.marker]}</i>'
    return f'<span class="arm">{mark}<span>{_words(name)}</span></span>'


def _words(value: str) -> str:
    """Return text whose lines end within long names, and not within a number and its unit."""
    value = value.replace(" × ", "\xa0×\xa0").replace(" %", "\xa0%").replace("–", "–\u2060")
    return re.sub(r"([_/])(?=\w\w)", r"\1<wbr>", text(value))


def _findings(heading: str, found: Sequence[Finding]) -> str:
    items = []
    for each in found:
        lines = "".join(f"<li>{_words(line)}</li>" for line in each.arms)
        items.append(f"<p>{_words(each.text)}</p>" + f"<ul>{lines}</ul>" * bool(lines))
    return f"<section><h2>{text(heading)}</h2>{''.join(items)}</section>"


def _table(table: Table, arms: Mapping[str, str]) -> str:
    """Return a table that scrolls in its own container; its first column stays."""
    of_rows = arms if table.kind in ("arms", "pairs") else {}
    of_header = arms if table.kind == "pairs" else {}
    head = "".join(f"<th>{_cell(cell, of_header)}</th>" for cell in table.header)
    body = []
    for i, (first, *cells) in enumerate(table.rows):
        marked = ((i, 1 + j) in table.marked for j in range(len(cells)))
        tags = (
            f"<td{' class=marked' * mark}>{_cell(cell)}</td>"
            for mark, cell in zip(marked, cells, strict=True)
        )
        body.append(f"<tr><th>{_cell(first, of_rows)}</th>{''.join(tags)}</tr>")
    return (
        f"<section><h2>{_words(table.title)}</h2>\n"
        f'<div class="scroll" tabindex="0"><table class="{table.kind}">'
        f"<thead><tr>{head}</tr></thead>\n"
        f"<tbody>{''.join(body)}</tbody></table></div>\n"
        f'<p class="note">{_words(table.note)}</p></section>'
    )


def _cell(value: str, arms: Mapping[str, str] = {}) -> str:
    """Return a cell: its first line, and the others smaller below it; an arm with its marker."""
    if value in arms:
        return arms[value]
    first, *others = value.split("\n")
    return _words(first) + "".join(f"<small>{_words(line)}</small>" for line in others)


def _plots(measured: Measured, index: int, arms: Mapping[str, str]) -> str:
    """Return the plots of a criterion: a row without stage 1, and one with it."""
    criterion = measured.criteria[index]
    rows = plots.panels(measured, criterion)
    headings = ("Stage 1 not counted", "Stage 1 counted") if len(rows) > 1 else ("",)
    color = COLORS.index(plots.looks(measured)[measured.baseline.name].color)
    best = f'<i class="c{color}">┅</i><span>best of {_words(measured.baseline.name)}</span>'
    best = f'<span class="arm">{best}</span>'
    parts = [f'<p class="legend">{" ".join(arms.values())} {best}</p>']
    for heading, row in zip(headings, rows, strict=True):
        figures = "".join(f"<figure>{plots.svg(measured, panel)}</figure>" for panel in row)
        parts.append(f"<h3>{heading}</h3>" * bool(heading))
        parts.append(f'<div class="plots" tabindex="0">{figures}</div>')
    if criterion.count is not None:
        parts.append(
            f'<p class="note">Evaluations on {criterion.count:,.0f} items; those on another number '
            "are left out, since a score depends on the items.</p>"
        )
    return f"<section><h2>{_words(title(criterion))}</h2>\n" + "\n".join(parts) + "</section>"


def _columns(columns: Mapping[str, str]) -> str:
    rows = "".join(
        f"<tr><th><code>{text(name)}</code></th><td>{text(meaning)}</td></tr>"
        for name, meaning in columns.items()
    )
    return (
        "<section><details><summary>Columns of compare.csv</summary>"
        f'<div class="scroll"><table class="words">{rows}</table></div></details></section>'
    )


_READING = """\
<section><h2>How to read this</h2>
<p>All arms are trained on the same data, in the same order for the same seed, in front of the same
frozen encoder and LLM. Where a grid of learning rates is shown, each arm uses the rate with its
lowest validation loss. <b>Stage 1</b> is what an arm trains before the compared stage: numbers
count it only where they say so.</p>
<p>Lines are means over seeds and <b>bands</b> reach from the lowest to the highest seed: they are
not confidence intervals, and as all runs share the frozen parts they do not show how much others
would change. The <b>dashed line</b> is the baseline's best, the mean of each seed's. An arm that
crosses it further left needed less. The best of many evaluations is a little too good, for every
arm alike; the final scores are measured once, at the end.</p>
<p><b>Brackets</b> are 95&nbsp;% bootstrap intervals over evaluated items, with whole images or
clips drawn. Two arms whose intervals overlap may still differ: the table of differences compares
them item by item, which is sharper. Where nothing differs, one interval in twenty leaves out 0 by
chance.</p></section>
"""


def _style() -> str:
    light = "".join(f" --arm-{i}: {color};" for i, color in enumerate(COLORS))
    dark = "".join(f" --arm-{i}: {color};" for i, color in enumerate(_DARK))
    chips = "".join(f".c{i} {{ color: var(--arm-{i}); }}\n" for i in range(len(COLORS)))
    return (
        f":root {{{light} --line: #8883; --soft: #8881; --page: #fff; --muted: #5c6166; }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{{dark} --page: #121417;"
        f" --muted: #a2a8ae; }} }}\n{chips}{_RULES}"
    )


_RULES = """\
* { box-sizing: border-box; }
body { background: var(--page); font: 16px/1.55 system-ui, sans-serif; margin: 0 auto;
 max-width: 84rem; padding: clamp(1rem, 3vw, 2.5rem); overflow-wrap: anywhere; }
h1 { font-size: clamp(1.5rem, 1.2rem + 1.6vw, 2.2rem); line-height: 1.2; margin: 0 0 .3rem;
 letter-spacing: -.01em; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 0 0 .6rem; }
h3 { font-size: .95rem; font-weight: 600; margin: 1rem 0 .4rem; }
section { margin: 2.4rem 0; }
p, ul { max-width: 46rem; margin: 0 0 .5rem; }
ul { margin-bottom: 1rem; padding-left: 1.1rem; }
li { margin-bottom: .25rem; }
.sub, .note { color: var(--muted); }
.note { font-size: .85rem; line-height: 1.45; margin-top: .5rem; }
.scroll { max-width: 100%; width: fit-content; overflow-x: auto;
 border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: separate; border-spacing: 0; font-size: .9rem; line-height: 1.35;
 font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .5rem .65rem; text-align: right; vertical-align: top; white-space: nowrap; }
th { font-weight: 600; }
thead th { min-width: 4.2rem; color: var(--muted); font-size: .8rem; vertical-align: bottom;
 border-bottom: 1px solid var(--line); }
tbody tr + tr > * { border-top: 1px solid var(--line); }
th:first-child { background: var(--page); left: 0; min-width: clamp(7.5rem, 18vw, 13rem);
 position: sticky; text-align: left; z-index: 1; box-shadow: 1px 0 var(--line); }
th { white-space: normal; overflow-wrap: break-word; }
th small, td small { display: block; color: var(--muted); font-size: .85em; font-weight: 400; }
.marked { font-weight: 700; background: var(--soft); }
.words td, .words th { text-align: left; }
.words td { white-space: normal; overflow-wrap: anywhere; min-width: 14rem; }
.words td small { color: inherit; font-size: 1em; }
.arm { display: inline-flex; gap: .4em; align-items: baseline; }
.arm i { font-style: normal; }
thead .arm { min-width: 6rem; max-width: 9rem; text-align: left; justify-content: flex-end; }
.findings { display: grid; gap: 0 2.5rem; margin: 2rem 0 2.4rem;
 grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.findings section { border-top: 1px solid var(--line); margin: 0 0 1rem; padding-top: .8rem; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; max-width: none; font-size: .9rem; }
.plots { display: grid; gap: .6rem 1rem; grid-template-columns: repeat(4, minmax(0, 1fr)); }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
summary { cursor: pointer; font-weight: 600; margin-bottom: .6rem; }
@media (max-width: 60rem) {
 .plots { grid-auto-columns: min(78vw, 21rem); grid-auto-flow: column; grid-template-columns: none;
  overflow-x: auto; scroll-snap-type: x proximity; padding-bottom: .4rem; }
 figure { scroll-snap-align: start; }
}
"""
