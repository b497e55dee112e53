"""The page of `vadapter inspect`: one HTML file that loads nothing else.

Legend: F frames, Q queries.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vadapter.console import number, quantity
from vadapter.html_page import page, text
from vadapter.inspect.attention import Maps
from vadapter.inspect.heat import FULL, Backgrounds, heat, ramp
from vadapter.inspect.inspection import Facts, Inspected, Shown
from vadapter.inspect.words import Vocabulary

MAX_TILES = 32  # soft tokens of an item on the page; all are in the JSON file
_TILE_WORDS = 3
_INPUTS = {
    "right": "right image",
    "wrong": "another image",
    "blank": "blank gray",
    "shuffled": "frames shuffled",
}
_CLIP = {"right": "right clip", "wrong": "another clip"}


def inspection_page(title: str, found: Sequence[Inspected]) -> str:
    """Return the page of what was found about one or more subjects."""
    backgrounds = Backgrounds()
    names = dict.fromkeys(name for each in found for name in each.shown)
    body = [_summary(found)]
    for name in names:
        having = [each for each in found if name in each.shown]
        body.append(_section(name, having, backgrounds))
    return page(title, _STYLE + backgrounds.style(), _LEGEND + "\n".join(body))


# -- the table -------------------------------------------------------------------------------------


def _summary(found: Sequence[Inspected]) -> str:
    """Return a table with a column for each subject."""
    rows: list[tuple[str, list[str]]] = [
        ("chain", [" → ".join([*f["chain"], f["lm"]]) for f in _facts(found)]),
        ("steps", [f"{f['step']:,}" for f in _facts(found)]),
        ("soft tokens", [_soft_count(each) for each in found]),
        ("norm, × that of words", [_ratio(f) for f in _facts(found)]),
    ]
    for name in dict.fromkeys(n for f in _facts(found) for n in f.get("evals", {})):
        evals = [f.get("evals", {}).get(name) for f in _facts(found)]
        for key in dict.fromkeys(k for e in evals if e for k in e if k[:4] in ("near", "lens")):
            what = "nearest word" if key == "nearest" else f"word at layer {key[5:]}"
            shares = [e and e.get(key) for e in evals]
            rows += [
                (f"{name}: {what} in own captions", [_percent(s and s["own"]) for s in shares]),
                ("… in another image's", [_percent(s and s["other"]) for s in shares]),
                ("… difference", [_percent(s and s["own"]["minus_other"], "+") for s in shares]),
            ]
        said = [e and e["generations"] for e in evals]
        rows += [
            (f"{name}: ended", [f"{100 * g['ended']:.0f} %" if g else "–" for g in said]),
            ("… words each (5–95 %)", [_lengths(g) for g in said]),
            ("… distinct words", [_words_used(g) for g in said]),
        ]
    head = "".join(f"<th>{text(each.label)}</th>" for each in found)
    body = "\n".join(
        f"<tr><th>{text(name)}</th>{''.join(f'<td>{text(cell)}</td>' for cell in cells)}</tr>"
        for name, cells in rows
    )
    return (
        f"<div class=wide><table><thead><tr><td></td>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _facts(found: Sequence[Inspected]) -> list[Facts]:
    return [each.facts for each in found]


def _soft_count(each: Inspected) -> str:
    if why := each.facts.get("no_soft_tokens"):
        return why
    counts = {
        len(shown.facts["soft_tokens"])
        for group in each.shown.values()
        for shown in group
        if "soft_tokens" in shown.facts
    }
    return " or ".join(str(count) for count in sorted(counts)) or "–"


def _ratio(facts: Facts) -> str:
    norms = facts["norms"]
    if "ratio" not in norms:
        return "–"
    soft, words = norms["soft_tokens"], norms["words"]
    return f"{norms['ratio']:.2f} ({number(soft['mean'])} and {number(words['mean'])})"


def _percent(measured: Facts | None, sign: str = "") -> str:
    if not measured:
        return "–"
    value = f"{_fixed(100 * measured['value'], 1, sign)} %"
    if not measured["interval"]:
        return value
    low, high = (_fixed(100 * end, 1, sign) for end in measured["interval"])
    return f"{value} [{low}, {high}]"


def _fixed(value: float, digits: int, sign: str = "") -> str:
    """Return a number with some digits and a true minus sign, which 0 does not have."""
    return f"{value:{sign}z.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _lengths(generations: Facts | None) -> str:
    if not generations:
        return "–"
    words = generations["words"]
    return f"{words['mean']:.1f} ({words['p5']:.0f}–{words['p95']:.0f})"


def _words_used(generations: Facts | None) -> str:
    if not generations:
        return "–"
    known = generations["vocabulary_of_references"]
    both = generations["vocabulary_in_both"]
    return f"{generations['vocabulary']} ({both} of the references' {known})"


# -- an evaluation ---------------------------------------------------------------------------------


def _section(name: str, found: Sequence[Inspected], backgrounds: Backgrounds) -> str:
    parts = [f"<h2>{text(name)}</h2>"]
    if all("evals" in each.facts for each in found):
        evals = [each.facts["evals"][name] for each in found]
        first = evals[0]
        noun = "question" if first["task"] == "question" else first["media"]
        about = f"{quantity(first['n'], f'held-out {noun}')} of data set {text(first['data'])}"
        if noun == "question":
            about += f" about {quantity(first['images'], first['media'])}"
        parts.append(
            f"<p>{about}. Lines are 95 % intervals, by bootstrap over {first['media']}s.</p>"
        )
        panels = []
        for key, title in (("loss", "Loss, nats per token"), ("score", _score_title(first))):
            by_label = {
                each.label: facts["inputs"][key]
                for each, facts in zip(found, evals, strict=True)
                if facts["inputs"][key]
            }
            if by_label:
                panels.append(_panel(title, by_label, first["media"]))
        parts.append(f"<div class=panels>{''.join(panels)}</div>")
        parts += [_common(each, facts) for each, facts in zip(found, evals, strict=True)]
    parts.append(_cards(name, found, backgrounds))
    return "\n".join(parts)


def _score_title(facts: Facts) -> str:
    return "CIDEr × 100" if facts["score"] == "cider" else "Correct answers, %"


def _panel(title: str, by_label: Mapping[str, Facts], media: str) -> str:
    """Return one measure of all subjects under all inputs, as dots with intervals."""
    factor = 1.0 if title.startswith("Loss") else 100.0
    ends = [
        factor * end
        for measured in by_label.values()
        for each in measured.values()
        for end in (*(each["interval"] or ()), each["value"])
    ]
    low, high = min(ends), max(ends)
    low, span = low - 0.04 * (high - low), 1.08 * (high - low) or 1.0

    def at(value: float) -> str:
        return f"{100 * (factor * value - low) / span:.1f}%"

    digits = 3 if factor == 1 else 1
    rows = []
    for label, measured in by_label.items():
        rows.append(f"<p class=who>{text(label)}</p>")
        for name, each in measured.items():
            start, end = each["interval"] or (each["value"],) * 2
            width = f"{100 * factor * (end - start) / span:.1f}%"
            minus = each.get("minus_right")
            change = ""  # to the right image
            if minus:
                value = _fixed(factor * minus["value"], digits, "+")
                if minus["interval"]:
                    ends = (_fixed(factor * e, digits, "+") for e in minus["interval"])
                    value += f" [{', '.join(ends)}]"
                change = f"<small>{value}</small>"
            shown = (_CLIP if media == "clip" else {}).get(name, _INPUTS[name])
            rows.append(
                f'<div class="row {name}"><span>{text(shown)}</span>'
                f"<span class=track><i style=left:{at(start)};width:{width}></i>"
                f"<b style=left:{at(each['value'])}></b></span>"
                f"<span class=value>{factor * each['value']:.{digits}f} {change}</span></div>"
            )
    return f"<article class=panel><h3>{text(title)}</h3>{''.join(rows)}</article>"


def _common(each: Inspected, facts: Facts) -> str:
    """Return the most frequent nearest words of a subject."""
    if "nearest" not in facts:
        return ""
    words = " ".join(
        f"<span class=chip>{_word(word)} <small>{100 * share:.0f} %</small></span>"
        for word, share in facts["nearest"]["common"]
        if share >= 0.005  # others would read 0 %
    )
    count = facts["nearest"]["distinct"]
    return (
        f"<p><b>{text(each.label)}</b>: its soft tokens are nearest to {quantity(count, 'word')}, "
        f"mostly {words}</p>"
    )


# -- items -----------------------------------------------------------------------------------------


def _cards(name: str, found: Sequence[Inspected], backgrounds: Backgrounds) -> str:
    """Return a card for each item that is shown, with all subjects beside each other."""
    by_item: dict[Any, list[tuple[str, Shown]]] = {}
    for each in found:
        for shown in each.shown[name]:
            key = shown.facts.get("index", shown.facts.get("file"))
            by_item.setdefault(key, []).append((each.label, shown))
    cards = "\n".join(_card(having, backgrounds) for having in by_item.values())
    return f"<div class=cards>{cards}</div>"


def _card(having: Sequence[tuple[str, Shown]], backgrounds: Backgrounds) -> str:
    shown = having[0][1]
    facts = shown.facts
    frames = "".join(
        f'<span class="frame {backgrounds.add(frame)}" role=img aria-label="frame {n}"></span>'
        for n, frame in enumerate(shown.frames)
    )
    kind = "clip" if len(shown.frames) > 1 else "still"
    parts = [f"<h3><bdi>{text(facts.get('file', facts.get('id', '')))}</bdi></h3>"]
    if "question" in facts:
        question = f"{text(facts['question'])} → {text(facts['answer'])}"
        parts.append(f"<p class=question dir=auto>{question}</p>")
    references = facts.get("references", ())
    if references:
        lines = "".join(f"<li dir=auto>{text(line)}</li>" for line in references)
        count = quantity(len(references), "reference")
        parts.append(f"<details><summary>{count}</summary><ul>{lines}</ul></details>")
    known = Vocabulary(references)
    head = f'<div class="media {kind}">{frames}</div><div>{"".join(parts)}</div>'
    arms = "".join(_arm(label, each, known, backgrounds) for label, each in having)
    return f"<article><header>{head}</header><div class=arms>{arms}</div></article>"


def _arm(label: str, shown: Shown, known: Vocabulary, backgrounds: Backgrounds) -> str:
    facts = shown.facts
    parts = [f"<h4>{text(label)}</h4>", _said(facts, len(shown.frames) > 1)]
    if "prefix_text" in facts:
        parts.append(f"<p class=prefix dir=auto>reads: {text(facts['prefix_text'])}</p>")
    tokens = facts.get("soft_tokens", [])
    maps = [m for m in shown.maps if not tokens or len(m.maps) == len(tokens)]
    others = [m for m in shown.maps if m not in maps[:1]]
    parts += [_strip(m, shown.frames, backgrounds) for m in (*maps[:1], *others)]
    tiles = max(len(tokens), len(maps[0].maps) if maps else 0)
    lens = {key[5:]: value for key, value in facts.items() if key.startswith("lens_")}
    cells = [
        _tile(
            i, tokens[i] if tokens else [], {n: each[i] for n, each in lens.items()},
            maps[0] if maps else None, known, shown.frames, backgrounds,
        )
        for i in range(min(tiles, MAX_TILES))
    ]  # fmt: skip
    if cells:
        parts.append(f"<div class=tiles>{''.join(cells)}</div>")
    if tiles > MAX_TILES:
        parts.append(f"<p class=note>the first {MAX_TILES} of {tiles}; all are in the JSON</p>")
    return f"<section>{''.join(parts)}</section>"


def _said(facts: Facts, is_clip: bool) -> str:
    """Return the generations of an item under each input."""
    if "inputs" not in facts:
        return f"<p class=said dir=auto>{_generation(facts)}</p>"
    rows = []
    names = _INPUTS | (_CLIP if is_clip else {})
    for name, entry in facts["inputs"].items():
        score = f" <small>{100 * entry['score']:.0f}</small>" if "score" in entry else ""
        said = f"{_generation(entry)}{score}"
        if name == "right":
            rows.append(f"<p class=said dir=auto>{said}</p>")
        else:
            rows.append(f"<p class=instead dir=auto><i>{names[name]}:</i> {said}</p>")
    return "".join(rows)


def _generation(entry: Facts) -> str:
    return (text(entry["text"]) or "<i>empty</i>") + ("" if entry["ended"] else " …")


def _strip(maps: Maps, frames: np.ndarray, backgrounds: Backgrounds) -> str:
    """Return the mean attention of all queries of a component."""
    mean = maps.maps.mean(0)
    uniform = 1 / mean.size
    frames = _behind(len(mean), frames)
    if maps.is_grid and len(frames):
        cells = "".join(
            _over(backgrounds.add(frame), each, uniform)
            for frame, each in zip(frames, mean, strict=True)
        )
    else:  # tokens without places in the image
        cells = "".join(
            f'<span class=bar><img src="{heat(each.reshape(1, -1), uniform)}" alt=""></span>'
            for each in mean
        )
    rest = f", {100 * maps.rest:.0f} % elsewhere" if maps.rest >= 0.005 else ""
    spread = f"{100 * maps.spread:.0f} % of the tokens"
    note = f"{text(maps.component)}: {_queries(len(maps.maps))}, on {spread}"
    return f"<div class=strip>{cells}</div><p class=note>{note}{rest}</p>"


def _behind(positions: int, frames: np.ndarray) -> np.ndarray:
    """Return the first frame of each time position, none if they do not fit together.

    Those of an encoder of whole clips have several frames each, and an image may be a clip there.
    """
    if positions % len(frames) == 0:
        return np.repeat(frames, positions // len(frames), axis=0)
    return frames[:: len(frames) // positions] if len(frames) % positions == 0 else frames[:0]


def _queries(count: int) -> str:
    return "1 query" if count == 1 else f"all {count:,} queries"


def _over(background: str, shares: np.ndarray, uniform: float) -> str:
    """Return an image with heat over it."""
    return (
        f'<span class=frame><span class="{background} gray"></span>'
        f'<img src="{heat(shares, uniform)}" alt=""></span>'
    )


def _tile(
    number: int, words: Sequence[Any], lens: Mapping[str, Sequence[Any]], maps: Maps | None,
    known: Vocabulary, frames: np.ndarray, backgrounds: Backgrounds,
) -> str:  # fmt: skip
    """Return a soft token: where its query looks, and the nearest words."""
    parts = []
    if maps is not None:
        own = maps.maps[number]
        uniform, place = 1 / own.size, int(own.sum((1, 2)).argmax())
        shown = _behind(len(own), frames)
        if maps.is_grid and len(shown):
            parts.append(_over(backgrounds.add(shown[place]), own[place], uniform))
        else:
            source = heat(own.reshape(len(own), -1), uniform)
            parts.append(f'<span class=bar><img src="{source}" alt=""></span>')
        if len(own) > 1:
            shares = heat(own.sum((1, 2))[None], 1 / len(own))
            title = f"frame {place} most"
            parts.append(f'<span class=time title="{title}"><img src="{shares}" alt=""></span>')
    best = words[:_TILE_WORDS]
    parts += [
        f"<span class=word>{_word(word, known)} <small>{score:.2f}</small></span>"
        for word, score in best
    ]
    for layer, nearest in lens.items():
        first = " ".join(_word(word, known) for word, _ in itertools.islice(nearest, 2))
        parts.append(f'<span class="word lens" title="layer {layer}">{layer}: {first}</span>')
    return f"<figure><figcaption>{number + 1}</figcaption>{''.join(parts)}</figure>"


def _word(word: str, known: Vocabulary | Iterable[str] = ()) -> str:
    own = " class=own" if word in known else ""
    return f"<bdi{own}>{text(word)}</bdi>"


_STYLE = """\
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 76em; padding: 1em; }
h1 { font-size: 1.5em; margin: .3em 0; }
h2 { border-bottom: 1px solid #8884; font-size: 1.25em; margin: 1.8em 0 .5em; padding-bottom:
 .2em; }
h3 { font-size: 1em; margin: 0 0 .4em; overflow-wrap: anywhere; }
h4 { font-size: .95em; margin: 0 0 .2em; }
p { margin: .4em 0; overflow-wrap: anywhere; }
small { opacity: .65; font-variant-numeric: tabular-nums; }
article { background: #8881; border-color: #8883; min-width: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { border-bottom: 1px solid #8883; padding: .3em .9em .3em 0; text-align: left;
 vertical-align: top; }
td { white-space: nowrap; } tbody th { font-weight: normal; min-width: 8em; opacity: .75; }
.panels { display: grid; gap: 1em; grid-template-columns: repeat(auto-fit, minmax(min(100%,
 30em), 1fr)); }
.who { font-weight: 600; margin: .6em 0 .1em; }
.row { align-items: center; display: grid; gap: .6em; grid-template-columns: 8.4em minmax(4em,
 1fr) 14.6em; }
.row > span { min-width: 0; }
.track { background: #8882; border-radius: 5px; height: 10px; position: relative; }
.track i { border-radius: 3px; height: 4px; opacity: .55; position: absolute; top: 3px; }
.track b { border-radius: 50%; height: 10px; margin-left: -5px; position: absolute; width: 10px; }
.track i, .track b { background: #0072b2; }
.wrong .track i, .wrong .track b { background: #d55e00; }
.blank .track i, .blank .track b { background: #888; }
.shuffled .track i, .shuffled .track b { background: #cc79a7; }
.value { font-variant-numeric: tabular-nums; }
.chip { background: #8882; border-radius: 1em; display: inline-block; margin: .1em 0; padding: 0
 .6em; }
.cards { display: grid; gap: 1em; margin-top: 1em; }
header { display: flex; flex-wrap: wrap; gap: .4em 1em; margin-bottom: .6em; }
header > div:last-child { flex: 1 1 14em; min-width: 0; }
.media { display: flex; flex-wrap: wrap; gap: 2px; }
.frame { background-size: 100% 100%; border-radius: 3px; display: block; height: 56px;
 overflow: hidden; position: relative; width: 56px; }
.still .frame { height: 104px; width: 104px; }
.frame > span { background-size: 100% 100%; display: block; height: 100%; }
.gray { filter: grayscale(.85) brightness(.8); }
.frame > img, .bar > img, .time > img { height: 100%; image-rendering: pixelated; left: 0;
 position: absolute; top: 0; width: 100%; }
.bar { background: #444; border-radius: 3px; display: block; height: 28px; position: relative;
 width: 72px; overflow: hidden; }
.strip { display: flex; flex-wrap: wrap; gap: 2px; margin-top: .5em; }
.strip .bar { width: 100%; max-width: 20em; }
.time { background: #444; border-radius: 2px; display: block; height: 5px; margin-top: 2px;
 overflow: hidden; position: relative; width: 56px; }
.arms { display: grid; gap: 1em 1.4em; grid-template-columns: repeat(auto-fit, minmax(min(100%,
 21em), 1fr)); }
.arms section { border-top: 1px solid #8883; min-width: 0; padding-top: .5em; }
.said { font-size: 1.05em; margin: .1em 0 .3em; unicode-bidi: isolate; }
.instead { font-size: .88em; margin: .1em 0; opacity: .8; unicode-bidi: isolate; }
.prefix { background: #8882; border-radius: 4px; padding: .3em .5em; unicode-bidi: isolate; }
.question { font-weight: 600; unicode-bidi: isolate; }
li { unicode-bidi: isolate; } ul { margin: .3em 0; padding-left: 1.2em; } summary { cursor:
 pointer; }
.note { font-size: .82em; margin: .2em 0; opacity: .65; }
.tiles { display: grid; gap: .5em; grid-template-columns: repeat(auto-fill, minmax(84px, 1fr));
 margin-top: .5em; }
figure { background: #8881; border-radius: 5px; margin: 0; min-width: 0; padding: 5px; position:
 relative; }
figcaption { font-size: .75em; opacity: .55; position: absolute; right: 6px; top: 3px; }
.word { display: block; font-size: .84em; line-height: 1.3; overflow-wrap: anywhere; }
.lens { border-top: 1px dotted #8886; margin-top: 2px; opacity: .8; padding-top: 2px; }
.own { background: #009e7340; border-radius: 3px; padding: 0 .2em; }
.ramp { border: 1px solid #8886; border-radius: 3px; display: inline-block; height: .8em;
 vertical-align: middle; width: 6em; }
@media (max-width: 600px) {
 .row { gap: 0 .6em; grid-template-columns: 7.2em 1fr; }
 .row .value { grid-column: 2; margin-bottom: .3em; }
 table { font-size: .9em; }
 td { min-width: 6.6em; white-space: normal; } tbody th { min-width: 6.2em; }
 td, th { padding-right: .6em; }
}
"""
_LEGEND = f"""\
<details><summary>How to read this</summary>
<p><b>Inputs</b>: loss and score of the same items with their own image, with the image of another
item, with a uniform gray one and, for clips, with their frames in another order. Differences are
paired, to the right image. If the right image is no better, the model does not use it.</p>
<p><b>Soft tokens</b> are the vectors that the language model reads in place of words. Below each is
the nearest whole word by cosine to the word embeddings, <bdi class=own>marked</bdi> if it occurs
in the captions of the image; below the dotted line the words that the head finds in the state at
that place after the layer before the colon (logit lens).</p>
<p><b>Heat</b>: mean attention of the connector's queries over its layers and heads, on what the
encoder sees: none below uniform attention, full at {FULL:.0f} times as much
<span class=ramp style="background: {ramp()}"></span>. Of a clip, a query is shown on the frame that
it attends to most; the bar below is its attention by frame.</p></details>
"""
