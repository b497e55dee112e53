"""Held-out images and clips with the predictions of each stage, in one HTML file."""

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vadapter import html_page
from vadapter.data.items import items_of
from vadapter.data.media.frames import load_media
from vadapter.data.media.images import BadMedia
from vadapter.data.open import make_source
from vadapter.errors import UserError
from vadapter.io.json_files import lines
from vadapter.recipe.schema import Recipe

MAX_BYTES = 2_900_000
EACH = 6  # items per group
SIZES = (160, 112, 80, 56)  # longest side of an image: the largest with which the file fits
_FRAME_MS = 200

Row = dict[str, Any]  # of predictions.jsonl


class Section(NamedTuple):
    """One evaluation."""

    title: str
    task: str  # "caption" or "question"
    rows: Mapping[str, Sequence[Row]]  # of each stage; the last one determines the items shown
    media: Callable[[Row], np.ndarray]  # frames u8[F,H,W,3]; raises UserError or OSError


def read_section(recipe: Recipe, name: str, predictions: Mapping[str, Path]) -> Section:
    """Return the section of an evaluation, from the predictions.jsonl of each stage."""
    dataset = recipe.evals[name].data
    rows = {stage: list(lines(path)) for stage, path in predictions.items()}
    config = recipe.data[dataset]

    @functools.cache
    def open_items() -> tuple[Any, int]:  # at the first image: there may be none
        source = make_source(dataset, config)
        return items_of(source, config.task), config.frames if source.kind == "clip" else 1

    nonempty = {stage: predicted for stage, predicted in rows.items() if predicted}
    return Section(name, config.task, nonempty, lambda row: load_frames(row, *open_items()))


def load_frames(row: Row, items: Any, frames: int) -> np.ndarray:
    """Return the image of a prediction, u8[F,H,W,3], from `items_of` the evaluated source."""
    item = items[row["index"]] if row["index"] < len(items) else None
    example = item[0] if isinstance(item, tuple) else item
    if example is None or example.id != row["id"]:
        raise BadMedia("the data set has changed since the evaluation")
    return load_media(example.media, frames=frames)


def write_gallery(
    path: Path, title: str, sections: Sequence[Section], table: str = "", max_bytes: int = MAX_BYTES
) -> Path:
    """Write the page, with images as large as `max_bytes` allows, after the summary `table`."""
    content = b""
    for size in SIZES:
        content = _page(title, sections, table, size).encode("utf-8", "replace")
        if len(content) <= max_bytes:
            break
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _page(title: str, sections: Sequence[Section], table: str, size: int) -> str:
    body = [f"<pre>{html_page.text(table)}</pre>"] if table else []
    for section in sections:
        if not section.rows:
            continue
        stage, rows = list(section.rows.items())[-1]
        groups = choose(rows, section.task)
        names = " and ".join(list(groups)[:2]).lower()
        noun = "questions" if section.task == "question" else "items"
        body.append(f"<h2>{_text(section.title)}</h2>")
        body.append(f"<p>{len(rows)} held-out {noun}; {names} by <b>{_text(stage)}</b>.</p>")
        for group, chosen in groups.items():
            cards = "\n".join(_card(section, row, size) for row in chosen)
            body.append(f"<h3>{group}</h3>\n<div class=cards>\n{cards}\n</div>")
    return html_page.page(title, _STYLE, "\n".join(body))


def choose(rows: Sequence[Row], task: str, each: int = EACH) -> dict[str, list[Row]]:
    """Return the best, the worst and some random items; ties are broken by a fixed seed.

    Answers are right or wrong, and so are captions that are judged. Without scores (no public
    answers) all groups but one are empty.
    """
    shuffled = list(rows)
    random.Random(0).shuffle(shuffled)
    ranked = sorted(shuffled, key=lambda row: -row.get("score", 0.0))
    key = "right" if all("right" in row for row in rows) else "score"
    if not all(key in row for row in rows):
        groups = {}
    elif task == "question" or key == "right":
        groups = {
            "Right": [row for row in ranked if row[key]][:each],
            "Wrong": [row for row in ranked if not row[key]][:each],
        }
    else:
        groups = {"Best": ranked[:each], "Worst": ranked[each:][-each:][::-1]}
    chosen = {id(row) for group in groups.values() for row in group}
    groups["Random"] = [row for row in shuffled if id(row) not in chosen][:each]
    return {name: group for name, group in groups.items() if group}


def _card(section: Section, row: Row, size: int) -> str:
    parts = []
    if section.task == "question":
        parts.append(f"<p class=question>{_text(row['question'])} → {_text(row['answer'])}</p>")
    for stage, rows in section.rows.items():
        same = (r for r in rows if r["index"] == row["index"] and r["id"] == row["id"])
        if (prediction := next(same, None)) is None:
            continue
        mark = _mark(section.task, prediction)
        words = _text(prediction["prediction"]) or "<i>empty</i>"
        parts.append(f"<p class=stage><b>{_text(stage)}</b> <span>{mark}</span></p><p>{words}</p>")
        if facts := prediction.get("facts"):
            parts.append(f"<p class=facts>{_facts(facts)}</p>")
        if prefix := prediction.get("prefix"):  # the image as words
            parts.append(f"<p class=reference>reads: {_text(prefix)}</p>")
    parts += [f"<p class=reference>{_text(ref)}</p>" for ref in row.get("references", ())[:5]]
    content = "\n".join(parts)
    return f"<article>{_image(section, row, size)}\n{content}</article>"


def _mark(task: str, row: Row) -> str:
    """Return ✓ or ✗ of what is right or wrong, or else the score."""
    right = row.get("right", row.get("score") if task == "question" else None)
    if right is not None:
        return "✓" if right else "✗"
    return f"{100 * row['score']:.0f}" if "score" in row else ""


def _facts(facts: Mapping[str, Sequence[int]]) -> str:
    """Return the facts of a caption by kind, marked as right or wrong."""
    marked = []
    for kind, (right, mentioned) in facts.items():
        name = f"{_text(kind)} {right} of {mentioned}" if mentioned > 1 else _text(kind)
        state, sign = ("right", "✓") if right == mentioned else ("wrong", "✗")
        marked.append(f"<span class={state}>{name}&nbsp;{sign}</span>")
    return " ".join(marked)


def _image(section: Section, row: Row, size: int) -> str:
    try:
        frames = section.media(row)
    except (UserError, OSError) as error:
        reason = error.reason if isinstance(error, BadMedia) else error
        return f"<p class=gone>no image: {_text(reason)}</p>"
    uri, small = thumbnail(frames, size)
    pixelated, name = " class=small" if small else "", _text(row["id"])
    return f'<img src="{uri}" alt="{name}" title="{name}"{pixelated}>'


def thumbnail(frames: np.ndarray, size: int) -> tuple[str, bool]:
    """Return frames u8[F,H,W,3] as a data URI, and whether they were smaller than `size` pixels.

    PNG if they were, else JPEG; clips are animated WebP.
    """
    images = [Image.fromarray(frame) for frame in frames]
    small = max(images[0].size) <= min(size, 96)
    for image in images:
        image.thumbnail((size, size))
    first, *more = images
    if more:
        animation = {"save_all": True, "append_images": more, "duration": _FRAME_MS, "loop": 0}
        return html_page.data_uri(first, "webp", quality=70, **animation), small
    kind, options = ("png", {"optimize": True}) if small else ("jpeg", {"quality": 82})
    return html_page.data_uri(first, kind, **options), small


_text = functools.partial(html_page.text, limit=400)

_STYLE = """\
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em; }
pre { overflow-x: auto; line-height: 1.3; }
h3 { margin: 1.2em 0 .4em; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: 1em; }
article { overflow-wrap: anywhere; }
article p { margin: .2em 0; unicode-bidi: isolate; }
img { display: block; width: 150px; height: auto; margin: 0 auto .5em; }
img.small { image-rendering: pixelated; }
.stage { display: flex; justify-content: space-between; font-size: 12px; opacity: .8; }
.facts { font-size: 12px; }
.right { color: light-dark(#00704a, #4cc38a); }
.wrong { color: light-dark(#b3261e, #ff8a80); text-decoration: underline; }
.reference { font-size: 12px; opacity: .65; }
.question { font-weight: 600; }
.gone { opacity: .6; font-style: italic; }
"""
