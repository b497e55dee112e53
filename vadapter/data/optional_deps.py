"""Libraries that only some data sets need."""

import importlib
from typing import Any

from vadapter.errors import ConfigError


def need(module: str, kind: str, extra: str) -> Any:
    """A module of an extra.

    Raises:
      ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"kind={kind!r} needs {module.split('.')[0]} ({error}): pip install 'vadapter[{extra}]'"
        ) from error
