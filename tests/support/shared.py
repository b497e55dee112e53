"""Folders that several processes of a test session share, each made by the first that needs it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vadapter.io.lock import lock


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> Path:
    """Return a folder that `make` fills once for all processes; tests must not change it."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # shared by the workers
    folder = root / name
    folder.mkdir(exist_ok=True)
    with lock(folder / ".lock", wait=True):
        if not (folder / ".made").exists():
            make(folder)
            (folder / ".made").touch()
    return folder
