"""The protocols by name; each is a table benchmark -> protocol, in a file of its own."""

from collections.abc import Mapping

from vadapter.config import nearest
from vadapter.errors import ConfigError
from vadapter.evaluate.protocol import Protocol
from vadapter.evaluate.protocols import paper, unanswerable

PROTOCOLS: dict[str, Mapping[str, Protocol]] = {
    "paper": paper.PROTOCOL,
    "unanswerable": unanswerable.PROTOCOL,
}


def find_protocol(name: str) -> Mapping[str, Protocol]:
    """Return the table of a protocol.

    Raises:
      ConfigError: there is no such protocol.
    """
    if name not in PROTOCOLS:
        raise ConfigError(f"--protocol={name}: unknown{nearest(name, PROTOCOLS)}")
    return PROTOCOLS[name]
