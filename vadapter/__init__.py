"""vadapter: align any frozen vision encoder with any frozen LLM by training a tiny LM."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vadapter.hub.api import VAdapter

__version__ = "0.1.0"
__all__ = ["VAdapter", "__version__"]


def __getattr__(name: str) -> Any:
    if name != "VAdapter":
        raise AttributeError(f"module 'vadapter' has no attribute {name!r}")
    from vadapter.hub.api import VAdapter  # with all of JAX, once it is asked for

    return VAdapter
