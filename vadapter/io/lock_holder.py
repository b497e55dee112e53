"""What a lock records of its holder, in a file and in a bucket alike."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from vadapter.errors import ConfigError


def in_use(path: Path, holder: str) -> ConfigError:
    """Return the error for a lock file that another process holds."""
    return ConfigError(
        f"{path.parent} is in use by another run: {holder}. "
        "Stop that run, or choose another directory."
    )


def this_process() -> dict[str, Any]:
    """Return what a lock file records of its holder."""
    started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": started}


def holder_name(holder: dict[str, Any]) -> str:
    """Return what messages call the holder of a lock."""
    values = [holder.get(key, "?") for key in ("pid", "host", "started")]
    return "process {} on {}, started {}".format(*values)


def parse_holder(text: bytes) -> dict[str, Any]:
    """Return the record in a lock file; {} if it is empty or unreadable."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
