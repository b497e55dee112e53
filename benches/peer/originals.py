"""transformers, importable beside a torchvision that was built for another torch."""

import importlib.util
from typing import Any

from benches.peer.measure import Skipped


def transformers() -> Any:
    """Return the library; it finds no torchvision where that cannot be loaded.

    Raises:
      Skipped: it is not installed.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        pass
    except RuntimeError:  # its operators were built for another version
        find = importlib.util.find_spec

        def without(name: str, package: str | None = None) -> Any:
            return None if name.partition(".")[0] == "torchvision" else find(name, package)

        importlib.util.find_spec = without
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise Skipped(f"{error}: pip install 'vadapter[parity]'") from error
