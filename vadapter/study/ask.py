"""Captions and answers for pictures and clips of one's own.

Legend: F frames, S pixels a side.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vadapter.data.images import CLIP_SUFFIXES, BadMedia, resize
from vadapter.data.media import load_media
from vadapter.data.pipeline import eval_batches
from vadapter.data.prompts import CAPTION, QUESTION
from vadapter.data.sources import Example
from vadapter.data.transforms import prompt_sample
from vadapter.errors import ConfigError
from vadapter.evals.runner import Decoder
from vadapter.models.lm import LM
from vadapter.train.restore import Loaded, describing


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the model says about a file: one line of text, or why there is none in `error`."""

    path: Path
    text: str = ""
    error: str = ""


def describe(
    loaded: Loaded,
    paths: Sequence[Path],
    *,
    question: str | None = None,
    max_new: int = 32,
    batch: int = 8,
) -> Iterator[Reply]:
    """Captions files, or answers a question about each; greedy, so always the same.

    Files named like clips (.mp4, .gif, …) are read as clips, all others as images. One that cannot
    be read becomes a reply with `error`; the others are not affected by it.

    Args:
      loaded: a stage that sees pictures.
      paths: of the files.
      question: None for captions.
      max_new: longest text in tokens.
      batch: files at a time.

    Yields:
      One reply a file, in their order.

    Raises:
      ConfigError: a stage without pictures, an empty or endless question.
    """
    if not loaded.image_size:
        raise ConfigError(
            f"stage {loaded.stage} reads text alone; choose one that sees pictures: "
            f"{', '.join(describing(loaded.recipe))}"
        )
    if max_new < 1 or (question is not None and not question.strip()):
        raise ConfigError("a question needs words, and an answer at least one token")
    after = CAPTION.after if question is None else QUESTION.after(question)
    text_len = len(loaded.tokenizer.encode(after))
    lm = loaded.model.modules[loaded.model.lm]
    assert isinstance(lm, LM)
    if text_len + max_new > lm.config.max_len:
        raise ConfigError(
            f"{text_len} tokens of prompt and {max_new} new ones, but {loaded.model.lm} has room "
            f"for {lm.config.max_len}: shorten the question, or lower --max-new"
        )
    data = [loaded.recipe.data[name] for name in loaded.config.data]
    row = functools.partial(
        prompt_sample, tokenizer=loaded.tokenizer, size=loaded.image_size, text_len=text_len,
        fit=data[0].fit,
    )  # fmt: skip
    clip_frames = min(config.frames for config in data)
    decoder = Decoder(loaded.model, loaded.tokenizer, loaded.mesh)
    rows = -(-min(batch, len(paths)) // loaded.mesh.size) * loaded.mesh.size

    for start in range(0, len(paths), batch):
        chunk = paths[start : start + batch]
        replies: dict[int, Reply] = {}
        readable: dict[int, list[tuple[int, Example]]] = {}  # frames -> files
        for i, path in enumerate(chunk):
            frames = clip_frames if path.suffix.lower() in CLIP_SUFFIXES else 1
            try:
                pixels = resize(load_media(path, frames=frames), loaded.image_size, fit=data[0].fit)
            except BadMedia as error:
                replies[i] = Reply(path, error=error.reason if path.exists() else "no such file")
            except OSError as error:
                replies[i] = Reply(path, error=error.strerror or str(error))
            else:
                readable.setdefault(frames, []).append((i, Example(str(path), pixels)))
        for frames, group in readable.items():
            items: Any = [e if question is None else (e, (question, "", "")) for _, e in group]
            batches = eval_batches(items, functools.partial(row, frames=frames), rows, threads=0)
            for at, text, _ in decoder.texts(loaded.params, batches, max_new):
                i = group[at][0]
                replies[i] = Reply(chunk[i], " ".join(text.split()))
        yield from (replies[i] for i in range(len(chunk)))
