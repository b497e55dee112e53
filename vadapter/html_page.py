"""A page as one HTML file that needs nothing else and may load nothing else.

Captions, questions and names come from data sets and models: all of them are text, never markup.
"""

import html
import re
from typing import Any


def text(value: Any, limit: int = 0) -> str:
    """Any value as text of a page or of an attribute; 0: of any length."""
    shown = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", str(value))
    return html.escape(shown if len(shown) <= (limit or len(shown)) else shown[: limit - 1] + "…")


def page(title: str, style: str, body: str) -> str:
    """The whole file.

    Args:
      title: as it is, not yet escaped.
      style: rules of CSS; body: markup.
    """
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
