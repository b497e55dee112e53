"""The glossary of CONTRIBUTING holds: words that it replaces are used nowhere in the project."""

import re
import subprocess

import pytest
from support.paths import ROOT

# A pattern, and the paths where it is right all the same.
EVERYWHERE = {
    r"pictures?": ("vadapter/data/scenes/", "configs/quickstart.py", "tests/"),  # words of captions
    r"colours?": ("vadapter/data/scenes/", "tests/"),  # a kind of question is called so
    r"learnt": (),
    r"anew": (),
    r"hand(s|ed|ing)?[- ]?over": (),
    r"for ever": (),
    r"mend(s|ed|ing)?": (),
    r"licence[ds]?": (),
    # tests/metrics reads a file of that name.
    r"(normal|token|initial|optim|recogn|summar|organ)is(e|es|ed|er|ing|ation)": (
        "tests/metrics/",
    ),
    r"neighbour\w*|behaviour\w*|favour\w*": (),
    r"grey": ("vadapter/data/scenes/",),  # a word of captions
    r"roll ?call": (),
    r"whole weights|split weights|weights whole": (),
}
# What the tests may still say of their own stand-ins, the product and its documents may not.
PRODUCT = {
    r"bring(s)? back a copy": (),
    r"worth nothing|suspect the memory": (),
    r"at rest|in vain": (),
    r"stands? (there|in|for|behind|beside|before)": (),
    r"lies? (there|in|on|beside|behind|below|under|at|where)": (),
    r"is told|are told(?! apart)|was told|were told|whoever|wants? to be": (),
}
REPLACED = EVERYWHERE | {pattern: (*paths, "tests/") for pattern, paths in PRODUCT.items()}
WRITTEN = (".py", ".md", ".sh", ".yaml", ".toml", ".yml")
EXCEPT = ("tests/test_words.py", "CONTRIBUTING.md", "LICENSE")


def files():
    """Return the tracked files that people read."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    listed = done.stdout.split() or [p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*")]
    assert len(listed) > 100
    return [name for name in listed if name.endswith(WRITTEN) and name not in EXCEPT]


@pytest.mark.parametrize("words", REPLACED)
def test_a_word_that_the_glossary_replaces_is_not_used(words):
    pattern = re.compile(rf"(?<![A-Za-z])({words})(?![A-Za-z])", re.IGNORECASE)
    found = [
        f"{name}:{number}: {line.strip()[:80]}"
        for name in files()
        if not name.startswith(REPLACED[words] or ("-",))
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line.replace("_", " "))  # words of identifiers too
    ]
    assert not found, "\n".join(found)
