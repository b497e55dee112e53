"""The guides: README.md and the README files of the rooms, with their sections and code blocks."""

import re
import shlex
from pathlib import Path

from support.paths import ROOT

NAMES = (
    "README.md",
    "configs/README.md",
    "launch/README.md",
    "vadapter/README.md",
    "vadapter/data/README.md",
    "vadapter/evaluate/README.md",
    "vadapter/hub/README.md",
    "vadapter/inspect/README.md",
    "vadapter/plan/README.md",
    "vadapter/weights/README.md",
    "vadapter/weights/packaged/README.md",
    "docs/index.md",
    "docs/results.md",
    "CONTRIBUTING.md",
)


def guides() -> dict[str, Path]:
    """Return the guides that exist, by their path in the repository."""
    return {name: ROOT / name for name in NAMES if (ROOT / name).is_file()}


def read(name: str) -> str:
    """Return a guide's text."""
    return (ROOT / name).read_text(encoding="utf-8")


def section(name: str, title: str) -> str:
    """Return the text below a heading, up to the next heading of its level or a higher one."""
    text = read(name)
    start = re.search(rf"^(#+) {re.escape(title)}$", text, re.MULTILINE)
    assert start, f"{name} has no heading {title!r}"
    level = len(start[1])
    return re.split(rf"^#{{1,{level}}} ", text[start.end() :], maxsplit=1, flags=re.MULTILINE)[0]


def blocks(text: str, language: str) -> list[str]:
    """Return the contents of the fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[list[str]]:
    """Return the commands of a bash block as words, with its own variables expanded."""
    variables: dict[str, str] = {}
    found = []
    without_comments = re.sub(r"(?m)(^|\s)#.*$", r"\1", block)
    joined = re.sub(r"\\\n\s*", " ", without_comments)
    for line in re.findall(r'(?:[^\n"\']|"[^"]*"|\'[^\']*\')+', joined):
        for name in sorted(variables, key=len, reverse=True):
            line = line.replace(f"${name}", variables[name])
        words = shlex.split(line)
        if words and words[0] == "export":
            words = words[1:]
        while words and re.fullmatch(r"[A-Z_]+=(.|\n)*", words[0]):
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        for part in " ".join(map(shlex.quote, words)).split(" '&&' "):
            if part:
                found.append(shlex.split(part))
    return found
