"""Generations of an evaluation that is still running, so that it can be killed at any moment."""

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

from vadapter.distributed import hosts
from vadapter.io import storage
from vadapter.metrics.scoring import Generation

FILE = "predictions.jsonl.part"
_UPLOAD_EVERY = 30.0  # seconds between two uploads


class PartialResults:
    """A file of finished generations: a header, then one JSON line per item, in order.

    Only the first host reads and writes it. In a bucket the whole file is uploaded every
    `_UPLOAD_EVERY` seconds: a kill loses the batches since the last upload.

    Args:
      key: digest of everything the generations depend on; a file with another key is discarded.
    """

    def __init__(self, path: Path, key: str):
        self._path, self._key = path, key
        self._uploaded: storage.Uploaded | None = None

    def read(self, batch: int) -> list[Generation]:
        """Return the generations of complete batches and truncate the file after them.

        An incomplete batch is generated again as a whole: with the same rows beside it, even the
        order of a sum is the same as in a run that was never stopped.
        """
        if not hosts.first():
            return []
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.is_file() else []
        header = (json.dumps({"key": self._key}) + "\n").encode()
        generations: list[Generation] = []
        if lines[:1] == [header]:
            for index, line in enumerate(lines[1:]):
                try:
                    generation = Generation(*json.loads(line))
                except (ValueError, TypeError):  # incomplete
                    break
                if generation.index != index or not line.endswith(b"\n"):
                    break
                generations.append(generation)
        generations = generations[: len(generations) // batch * batch]
        kept = b"".join(lines[: 1 + len(generations)]) if generations else header
        if storage.remote(self._path):
            self._uploaded, self._last = storage.Uploaded(self._path, kept), time.monotonic()
        else:
            storage.write_bytes(self._path, kept)
        return generations

    def append(self, generations: Sequence[Generation]) -> None:
        """Append the generations of a batch, in order, in one write."""
        if not hosts.first():
            return
        data = "".join(json.dumps(generation) + "\n" for generation in generations).encode()
        if self._uploaded is None:
            with open(self._path, "ab") as file:
                file.write(data)
            return
        self._uploaded.write(data)
        if time.monotonic() - self._last > _UPLOAD_EVERY:
            self._last = time.monotonic()
            with contextlib.suppress(OSError):  # a lost upload only costs time, and is retried
                self._uploaded.flush()

    def remove(self) -> None:
        """Delete the file, once its generations are stored elsewhere."""
        if hosts.first():
            self._path.unlink(missing_ok=True)
