"""References to a component's public weights: their folder, and the digest that identifies them.

They may be a thousand times larger than what is trained, so a run neither copies them nor reads
them before it needs them. It records the digest of their files: the folder may move, but its
content may not change.
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
from vadapter.weights.files import Stamp

if TYPE_CHECKING:
    from vadapter.weights.hf_checkpoint import Report

PREFIX = "sha256:"  # of a digest of files, unlike that of stored arrays


class Weights(Protocol):
    """Open weights of one component, of whatever format; see `hf_checkpoint.Checkpoint`."""

    def stamps(self) -> Mapping[Path, Stamp]: ...
    def digest(self) -> str: ...
    def match(self, abstract: Any) -> "Report": ...
    def leaves(self, abstract: Any, dtype: Any = None) -> Iterator[tuple[str, jax.Array]]: ...


# kind of component -> the class that opens a folder of its weights, imported when it is used
FORMATS = {
    "mobilenet": "vadapter.weights.mobilenet:MobileNetFiles",
    "video_vit": "vadapter.weights.hf_checkpoint:Checkpoint",
    "vit": "vadapter.weights.hf_checkpoint:Checkpoint",
    "lm": "vadapter.weights.hf_checkpoint:Checkpoint",
    "qformer": "vadapter.weights.hf_checkpoint:Checkpoint",
}


@dataclasses.dataclass(frozen=True)
class Reference:
    """The weights of a component, named as in the recipe, in the folder `path`."""

    component: str
    weights: str  # as in the recipe; a hub id with its commit
    path: Path
    kind: str
    fresh: frozenset[str] = frozenset()  # paths of parameters that start random instead
    part: str = ""  # of a checkpoint of several parts, see `parts`

    @classmethod
    def of(cls, component: str, spec: Mapping[str, Any]) -> "Reference":
        """Find the folder of a component's weights, and download it from the hub if necessary.

        Raises:
          ConfigError: the spec has no weights, or its kind has no public weights.
          CheckpointError: no such folder or hub id, see `hub.resolve`.
        """
        key = f"components.{component}.weights"
        kind = expand(component, spec)["kind"]
        if not spec.get("weights"):
            raise ConfigError(f"start.{component}='weights', but {key} is not set")
        if kind not in FORMATS:
            raise ConfigError(f"{key}: supported for {', '.join(FORMATS)}, not for kind {kind!r}")
        from vadapter.weights.hf_checkpoint import locate

        part = spec.get("part", "")
        if part and FORMATS[kind] != FORMATS["vit"]:
            raise ConfigError(
                f"components.{component}.part: weights of kind {kind!r} have no parts"
            )
        path = locate(spec["weights"], key, part).path
        return cls(component, spec["weights"], path, kind, part=part)

    def open(self) -> Weights:
        """Read and check the headers of the weights."""
        named = {"part": self.part} if self.part else {}
        opened = pkgutil.resolve_name(FORMATS[self.kind]).open(self.path, **named)
        return dataclasses.replace(opened, fresh=self.fresh) if self.fresh else opened

    def digest(self, folder: Path, *, write: bool = True) -> str:
        """Return `sha256:` and the digest of the files; the recorded one if they are unchanged.

        `folder` holds the run's records, `<component>.json` each, one of which is written.
        """
        weights, record = self.open(), folder / f"{self.component}.json"
        stamps = {file.name: list(stamp) for file, stamp in weights.stamps().items()}
        if (recorded := _read(record)) and recorded["files"] == stamps:
            return recorded["digest"]
        digest = PREFIX + weights.digest()
        if write:
            value = {"weights": self.weights, "digest": digest, "files": stamps}
            storage.write_bytes(record, json.dumps(value, indent=1).encode())
        return digest

    def expect(self, digest: str, folder: Path) -> None:
        """Raise CheckpointError if the digest of the weights is not that of the run."""
        if (current := self.digest(folder, write=False)) != digest:
            key = f"components.{self.component}.weights"
            raise CheckpointError(
                f"{key}={self.weights}: not the weights of this run (SHA-256 {current[7:19]}…, "
                f"recorded {digest[7:19]}…). Restore them, or set --config.{key}=FOLDER to their "
                "folder"
            )


def _read(record: Path) -> dict[str, Any] | None:
    """Return the record; None if it cannot be read, as it can be computed again."""
    try:
        value = json.loads(record.read_text())
        return value if {"digest", "files"} <= value.keys() else None
    except (OSError, ValueError, AttributeError):
        return None
