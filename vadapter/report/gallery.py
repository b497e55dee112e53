"""Held-out images and clips with what the stages say about them, in a single HTML file."""

import base64
import dataclasses
import functools
import io
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vadapter.data.media.frames import load_media
from vadapter.data.media.images import BadMedia
from vadapter.data.open import make_source
from vadapter.errors import UserError
from vadapter.html_page import page, text
from vadapter.io.json_files import lines
from vadapter.metrics.scoring import Questions
from vadapter.recipe.schema import Recipe

MAX_BYTES = 2_900_000
EACH = 6  # items of each group
SIZES = (160, 112, 80, 56)  # longest side of an image, the first that fits into the file
_FRAME_MS = 200
_MAX_TEXT = 400  # characters

Row = dict[str, Any]  # of predictions.jsonl


@dataclasses.dataclass(frozen=True)
class Section:
    """One evaluation.

    Attributes:
      title: its name.
      task: caption | question.
      rows: stage -> what it predicted; the last stage decides which items are shown.
      media: row -> frames u8[F,H,W,3]; raises UserError or OSError.
    """

    title: str
    task: str
    rows: Mapping[str, Sequence[Row]]
    media: Callable[[Row], np.ndarray]


def read_section(recipe: Recipe, name: str, predictions: Mapping[str, Path]) -> Section:
    """The section of an evaluation.

    Args:
      recipe: of the run; the data set's source is made again for the images.
      name: of the evaluation.
      predictions: stage -> its predictions.jsonl.
    """
    spec = recipe.evals[name]
    rows = {stage: list(lines(path)) for stage, path in predictions.items()}
    rows = {stage: found for stage, found in rows.items() if found}
    config = recipe.data[spec.data]
    items: list[Any] = []  # made at the first image, and only once

    def media(row: Row) -> np.ndarray:
        if not items:
            source = make_source(spec.data, config)
            items.append(Questions(source) if config.task == "question" else source)
            items.append(config.frames if source.kind == "clip" else 1)
        item = items[0][row["index"]] if row["index"] < len(items[0]) else None
        example = item[0] if isinstance(item, tuple) else item
        if example is None or example.id != row["id"]:
            raise BadMedia("the data set has changed since")
        return load_media(example.media, frames=items[1])

    return Section(name, config.task, rows, media)


def write_gallery(path: Path, title: str, sections: Sequence[Section], table: str = "") -> Path:
    """Writes the page, with images as large as the size of the file allows.

    Args:
      path: of the file.
      title: its heading.
      sections: in order.
      table: text of the summary, shown in front.
    """
    content = b""
    for size in SIZES:
        content = _page(title, sections, table, size).encode("utf-8", "replace")
        if len(content) <= MAX_BYTES:
            break
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _page(title: str, sections: Sequence[Section], table: str, size: int) -> str:
    body = []
    if table:
        body.append(f"<pre>{text(table)}</pre>")
    for section in sections:
        if not section.rows:
            continue
        chosen = list(section.rows)[-1]
        rows = section.rows[chosen]
        groups = choose(rows, section.task)
        by = " and ".join(list(groups)[:2]).lower()
        what = "questions" if section.task == "question" else "items"
        body.append(f"<h2>{_text(section.title)}</h2>")
        body.append(f"<p>{len(rows)} held-out {what}; {by} by <b>{_text(chosen)}</b>.</p>")
        for group, rows in groups.items():
            cards = "\n".join(_card(section, row, size) for row in rows)
            body.append(f"<h3>{group}</h3>\n<div class=cards>\n{cards}\n</div>")
    return page(title, _STYLE, "\n".join(body))


def choose(rows: Sequence[Row], task: str, each: int = EACH) -> dict[str, list[Row]]:
    """The best, the worst and some random items; equal scores by lot, which falls always the same.
    Rows without scores, whose answers are not public, are all random.

    Args:
      rows: of predictions.jsonl.
      task: caption, or question, whose answers are right or wrong.
      each: items of a group.
    """
    shuffled = list(rows)
    random.Random(0).shuffle(shuffled)
    ranked = sorted(shuffled, key=lambda row: -row.get("score", 0.0))
    if not all("score" in row for row in rows):
        groups = {}
    elif task == "question":
        groups = {
            "Right": [row for row in ranked if row["score"]][:each],
            "Wrong": [row for row in ranked if not row["score"]][:each],
        }
    else:
        groups = {"Best": ranked[:each], "Worst": ranked[each:][-each:][::-1]}
    taken = {id(row) for group in groups.values() for row in group}
    groups["Random"] = [row for row in shuffled if id(row) not in taken][:each]
    return {name: group for name, group in groups.items() if group}


def _card(section: Section, row: Row, size: int) -> str:
    lines = []
    if section.task == "question":
        lines.append(f"<p class=question>{_text(row['question'])} → {_text(row['answer'])}</p>")
    for stage, rows in section.rows.items():
        other = next((r for r in rows if r["index"] == row["index"] and r["id"] == row["id"]), None)
        if other is None:
            continue
        mark = _mark(section.task, other.get("score"))
        said = _text(other["prediction"]) or "<i>nothing</i>"
        lines.append(f"<p class=stage><b>{_text(stage)}</b> <span>{mark}</span></p><p>{said}</p>")
    for reference in row.get("references", ())[:5]:
        lines.append(f"<p class=reference>{_text(reference)}</p>")
    text = "\n".join(lines)
    return f"<article>{_image(section, row, size)}\n{text}</article>"


def _mark(task: str, score: float | None) -> str:
    if score is None:
        return ""
    return f"{100 * score:.0f}" if task == "caption" else "✓" if score else "✗"


def _image(section: Section, row: Row, size: int) -> str:
    try:
        frames = section.media(row)
    except BadMedia as error:
        return f"<p class=gone>no image: {_text(error.reason)}</p>"
    except (UserError, OSError) as error:
        return f"<p class=gone>no image: {_text(str(error))}</p>"
    uri, small = thumbnail(frames, size)
    pixelated = " class=small" if small else ""
    return f'<img src="{uri}" alt="{_text(row["id"])}" title="{_text(row["id"])}"{pixelated}>'


def thumbnail(frames: np.ndarray, size: int) -> tuple[str, bool]:
    """A data URI: PNG where the image is small by itself, else JPEG; an animated WebP of a clip.

    Args:
      frames: u8[F,H,W,3].
      size: longest side in pixels.

    Returns:
      The URI, and whether the image was that small.
    """
    images = [Image.fromarray(frame) for frame in frames]
    small = max(images[0].size) <= min(size, 96)
    for image in images:
        image.thumbnail((size, size))
    out, (first, *more) = io.BytesIO(), images
    if more:
        kind = "webp"
        first.save(
            out, "WEBP", save_all=True, append_images=more, duration=_FRAME_MS, loop=0, quality=70
        )
    elif small:
        kind = "png"
        first.save(out, "PNG", optimize=True)
    else:
        kind = "jpeg"
        first.save(out, "JPEG", quality=82)
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}", small


_text = functools.partial(text, limit=_MAX_TEXT)

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
.reference { font-size: 12px; opacity: .65; }
.question { font-weight: 600; }
.gone { opacity: .6; font-style: italic; }
"""
