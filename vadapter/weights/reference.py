"""A component's public weights, by reference: where they lie, and the digest that tells them apart.

They may be a thousand times larger than what trains, so a run neither copies them nor reads them
before it needs them. It keeps the digest of their files; a folder may move, its content may not.
"""

import dataclasses
import json
import pkgutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax

from vadapter.errors import CheckpointError, ConfigError
from vadapter.io import storage
from vadapter.models.registry import expand

if TYPE_CHECKING:
    from vadapter.weights.hf_checkpoint import Report

PREFIX = "sha256:"  # of a digest of files, unlike that of stored arrays


class Weights(Protocol):
    """Open weights of one component, of whatever format."""

    def stamps(self) -> Mapping[Path, tuple[int, int]]:
        """The files, each with its size and time of change in ns."""
        ...

    def digest(self) -> str:
        """The sha256, in hex, of the files' bytes."""
        ...

    def match(self, abstract: Any) -> "Report":
        """Accounts forevery tensor of both sides by the headers alone."""
        ...

    def leaves(self, abstract: Any, dtype: Any = None) -> Iterator[tuple[str, jax.Array]]:
        """The parameters, one after the other, each shard read for its own device."""
        ...


# kind of component -> reader of a folder of its weights, imported when one is opened
FORMATS = {
    "mobilenet": "vadapter.weights.mobilenet:MobileNetFiles",
    "vit": "vadapter.weights.hf_checkpoint:Checkpoint",
    "lm": "vadapter.weights.hf_checkpoint:Checkpoint",
}


@dataclasses.dataclass(frozen=True)
class Reference:
    """The weights of a component.

    Attributes:
      component: its name in the recipe.
      weights: as the recipe says, a hub id with its commit.
      path: the folder.
      kind: of the component.
    """

    component: str
    weights: str
    path: Path
    kind: str

    @classmethod
    def of(cls, component: str, spec: Mapping[str, Any]) -> "Reference":
        """Finds the folder; one of a hub is fetched if need be.

        Args:
          spec: of the component, as in the recipe.

        Raises:
          ConfigError: it names no weights, or a kind for which none are read.
          CheckpointError: no such folder or hub id, see `hub.resolve`.
        """
        where = f"components.{component}"
        kind = expand(component, spec)["kind"]
        if not spec.get("weights"):
            raise ConfigError(f"start.{component}='weights', but {where}.weights names no file")
        if kind not in FORMATS:
            raise ConfigError(
                f"{where}.weights: read for {', '.join(FORMATS)}, not for kind {kind!r}"
            )
        from vadapter.weights.hf_checkpoint import locate

        found = locate(spec["weights"], f"{where}.weights")
        return cls(component, spec["weights"], found.path, kind)

    def open(self) -> Weights:
        """The headers of the weights, checked."""
        return pkgutil.resolve_name(FORMATS[self.kind]).open(self.path)

    def digest(self, folder: Path, *, write: bool = True) -> str:
        """`sha256:` and the digest of the files, from the run's record of it if they are the same.

        Args:
          folder: of the run's records, `<component>.json` each.
          write: leave a record.
        """
        weights, record = self.open(), folder / f"{self.component}.json"
        stamps = {file.name: list(stamp) for file, stamp in weights.stamps().items()}
        if (known := _read(record)) and known["files"] == stamps:
            return known["digest"]
        digest = PREFIX + weights.digest()
        if write:
            made = {"weights": self.weights, "digest": digest, "files": stamps}
            storage.write_bytes(record, json.dumps(made, indent=1).encode())
        return digest

    def expect(self, digest: str, folder: Path) -> None:
        """Checks that the weights are those that a run was made with.

        Raises:
          CheckpointError: they are others.
        """
        if (found := self.digest(folder, write=False)) != digest:
            raise CheckpointError(
                f"components.{self.component}.weights={self.weights}: not what this run was made "
                f"with ({found[:19]}…, then {digest[:19]}…). Bring back those weights, or give "
                f"their place with --config.components.{self.component}.weights=FOLDER"
            )


def _read(record: Path) -> dict[str, Any] | None:
    """The record; None if there is none that can be read, for then it is made again."""
    try:
        value = json.loads(record.read_text())
        return value if {"digest", "files"} <= value.keys() else None
    except (OSError, ValueError, AttributeError):
        return None
