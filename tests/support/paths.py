"""Where the tests, the repository and the real data are."""

import os
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
README = ROOT / "README.md"
RECIPES = TESTS / "support" / "recipes.py"


def data_root() -> Path:
    """Return the folder of real data; it may not exist."""
    return Path(os.environ.get("VADAPTER_DATA", ROOT.parent / "shared" / "data"))


def cache_dir() -> Path:
    """Return the folder of compiled programs, which tests and later sessions share."""
    path = Path(tempfile.gettempdir()) / f"vadapter-tests-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    return path
