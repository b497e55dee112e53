"""Rows of data sets as a single HTML file that loads nothing else."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vadapter.errors import ConfigError
from vadapter.html_page import data_uri, page, text
from vadapter.inspect.show_data import Shown, Token

_LOSSLESS = 160  # pixels per side up to which images are PNG


def write_page(path: Path, title: str, rows: Iterable[Shown]) -> Path:
    """Write the page; ConfigError if that fails."""
    body = _LEGEND + "\n".join(_card(row) for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(page(title, _STYLE, body).encode("utf-8", "replace"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    return path


def _card(row: Shown) -> str:
    head = f"<b>{text(row.data)}[{row.index}]</b> {text(row.name)}"
    if row.mirrored:
        head += " <span class=mark>mirrored</span>"
    bad = f"<p class=bad>unusable row, weight 0: {text(row.bad)}</p>" if row.bad else ""
    frames = ""
    if row.frames is not None:
        count, size = row.frames.shape[:2]
        decode = "" if row.decode == "exact" else f", JPEGs decoded {row.decode}"
        head += f" <span class=size>{count} × {size} × {size}{decode}</span>"
        images = "".join(
            f'<img src="{_uri(frame)}" alt="frame {n}" title="frame {n}">'
            for n, frame in enumerate(row.frames)
        )
        frames = f"<div class=frames>{images}</div>"
    lines = [_line("prompt", row.prompt, row.padding[0])] if row.prompt else []
    lines += [_line(f"text {n}", tokens, 0) for n, tokens in enumerate(row.texts, 1)]
    if row.padding[1]:
        lines.append(_line("", (), row.padding[1]))
    return f"<article><h2>{head}</h2>{bad}{frames}<table>{''.join(lines)}</table></article>"


def _line(head: str, tokens: Sequence[Token], padding: int) -> str:
    pad = f"<i class=padding>{padding} × padding</i>" if padding else ""
    return f"<tr><th>{head}</th><td>{pad}{''.join(map(_token, tokens))}</td></tr>"


def _token(token: Token) -> str:
    title = f"id {token.id}"
    if token.segment:
        title += f", segment {token.segment}, position {token.position}, {token.role}"
    title += "" if token.read else ", not read"
    kind = token.role if token.read else f"{token.role} unread"
    return f'<span class="{kind}" title="{title}">{text(token.text)}</span>'


def _uri(frame: np.ndarray) -> str:
    image = Image.fromarray(frame)
    if max(image.size) <= _LOSSLESS:
        return data_uri(image, "png")
    return data_uri(image, "jpeg", quality=90)


_STYLE = """\
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 90em; padding: 0 1em; }
h2 { font-size: 1em; font-weight: normal; margin: 0 0 .5em; overflow-wrap: anywhere; }
article { margin: 0 0 1em; }
.frames { display: flex; flex-wrap: wrap; gap: 2px; margin-bottom: .5em; }
.frames img { width: 144px; height: 144px; }
table { border-collapse: collapse; }
th { font-weight: normal; opacity: .6; text-align: left; vertical-align: top; padding-right: 1em;
 white-space: nowrap; }
td { overflow-wrap: anywhere; white-space: pre-wrap; unicode-bidi: isolate; }
td span { border-radius: 3px; border-left: 1px solid #8883; padding: 1px 0; }
.context { background: #4a90d92e; }
.target { background: #2fa84f55; }
.unread { border-bottom: 2px dotted #2fa84f; }
.padding { opacity: .5; padding-right: .6em; }
.bad { background: #d33c; color: #fff; padding: .3em .6em; border-radius: 3px; }
.mark { background: #c80; color: #fff; border-radius: 3px; padding: 0 .4em; }
.size { opacity: .6; }
"""
_LEGEND = """\
<p><span class="context">context</span> is read by the model; <span class="target">target</span> is
counted by the loss; <span class="target unread">target, not read</span> is the end of a text;
<span class="padding">padding</span> is neither. The pixels are what the encoder receives, before
normalization. Hover over a token for its id and position.</p>
"""
