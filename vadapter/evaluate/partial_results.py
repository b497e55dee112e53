"""What an evaluation keeps and says while it runs, so that it can be killed at any moment."""

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from vadapter.io import storage
from vadapter.metrics.scoring import Text

_UPLOAD_EVERY = 30.0  # seconds between two uploads


class PartialResults:
    """Texts that are done, a JSON line each and in order, behind a line that says of what.

    Only the first host reads and writes. In a bucket the file is uploaded whole, every half minute:
    a kill loses the batches since.

    Args:
      path: of the file, predictions.jsonl.part.
      key: what the texts depend on, as a digest; a file of another key is begun again.
    """

    def __init__(self, path: Path, key: str):
        self._path, self._key = path, key
        self._uploaded: storage.Uploaded | None = None

    def read(self, batch: int) -> list[Text]:
        """The texts of whole batches; what is behind them is cut off.

        A batch that is torn is predicted again as a whole: in the company that it was in, so that
        not even the order of a sum differs from a run that was never stopped.
        """
        if jax.process_index():
            return []
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.is_file() else []
        head = (json.dumps({"key": self._key}) + "\n").encode()
        texts: list[Text] = []
        if lines[:1] == [head]:
            for line in lines[1:]:
                if (text := _parse(line, len(texts))) is None:
                    break
                texts.append(text)
        texts = texts[: len(texts) // batch * batch]
        if storage.remote(self._path):
            kept = b"".join(lines[: 1 + len(texts)]) if texts else head
            self._uploaded, self._last = storage.Uploaded(self._path, kept), time.monotonic()
            return texts
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "ab") as file:
            file.truncate(sum(map(len, lines[: 1 + len(texts)])) if texts else 0)
            if not texts:
                file.write(head)
        return texts

    def append(self, texts: Sequence[Text]) -> None:
        """Adds the texts of a batch, in order, in one write."""
        if jax.process_index():
            return
        data = "".join(json.dumps(text) + "\n" for text in texts).encode()
        if self._uploaded is None:
            with open(self._path, "ab") as file:
                file.write(data)
            return
        self._uploaded.write(data)
        if time.monotonic() - self._last > _UPLOAD_EVERY:
            self._last = time.monotonic()
            with contextlib.suppress(OSError):  # it only saves time, and the next try may do
                self._uploaded.flush()

    def remove(self) -> None:
        """Deletes the file, once its texts are elsewhere."""
        if not jax.process_index():
            self._path.unlink(missing_ok=True)


def _parse(line: bytes, index: int) -> Text | None:
    """The text of the item `index`; None if the line was torn."""
    try:
        i, text, ended = json.loads(line)
    except (ValueError, TypeError):
        return None
    return (i, text, ended) if line.endswith(b"\n") and i == index else None
