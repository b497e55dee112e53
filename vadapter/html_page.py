"""Pages as single HTML files that load nothing else.

Captions, questions and names come from data sets and models: they are always text, never markup.
"""

import base64
import html
import io
import re
from typing import Any

from PIL import Image


def text(value: Any, limit: int = 0) -> str:
    """Return a value escaped for text and attributes, its first `limit` characters; 0: all."""
    string = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", str(value))
    return html.escape(string[: limit - 1] + "…" if 0 < limit < len(string) else string)


def data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    """Return an image, or an animation by its first frame, as a data URI.

    Args:
      image, options: as in `PIL.Image.Image.save`.
      kind: "png", "jpeg" or "webp".
    """
    file = io.BytesIO()
    image.save(file, kind.upper(), **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def page(title: str, style: str, body: str) -> str:
    """Return a complete HTML file of a title, not yet escaped, CSS rules and markup."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{text(title)}</title>
<style>
:root {{ color-scheme: light dark; }}
article {{ border: 1px solid #8884; border-radius: 6px; padding: .8em; }}
{style}</style>
</head>
<body>
<h1>{text(title)}</h1>
{body}
</body>
</html>
"""
