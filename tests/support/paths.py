"""Where the tests, the repository and the real data are."""

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
README = ROOT / "README.md"
RECIPES = TESTS / "support" / "recipes.py"


def data_root() -> Path:
    """Return the folder of real data; it may not exist."""
    return Path(os.environ.get("VADAPTER_DATA", ROOT.parent / "shared" / "data"))
