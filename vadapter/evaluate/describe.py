"""Captions and answers for images and clips of one's own.

Legend: F frames, H height, W width.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from vadapter.data.example import Example, Question
from vadapter.data.media.frames import load_media
from vadapter.data.media.images import CLIP_SUFFIXES, BadMedia, ImageTransform, pixels_of, resize
from vadapter.data.pipeline import eval_batches
from vadapter.data.prompts import CAPTION, QUESTION
from vadapter.data.transforms import prompt_sample
from vadapter.errors import ConfigError
from vadapter.evaluate.runner import Decoder
from vadapter.models.lm import LM
from vadapter.stages.restore import Loaded, describing

# A file, an image, or pixels u8[H,W,3] or, of a clip, u8[F,H,W,3].
Media = Path | Image | np.ndarray
_STEP = 16  # a question's room in tokens is a multiple: not every length compiles a program


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the model says about an image: a line of text, or why there is none in `error`."""

    media: Media
    text: str = ""
    error: str = ""


class Describer:
    """Writes about images with a trained stage; programs are compiled once forevery shape.

    Args:
      loaded: a stage that sees images.

    Raises:
      ConfigError: a stage without images.
    """

    def __init__(self, loaded: Loaded):
        if loaded.view is None:
            raise ConfigError(
                f"stage {loaded.stage} reads text alone; choose one that sees images: "
                f"{', '.join(describing(loaded.recipe))}"
            )
        self.loaded = loaded
        self.view, self.clip_frames = seen(loaded)
        self._decoder = Decoder(loaded.model, loaded.tokenizer, loaded.mesh)

    def replies(
        self,
        media: Sequence[Media],
        questions: Sequence[str] | None = None,
        *,
        max_new: int = 32,
        batch: int = 8,
    ) -> Iterator[Reply]:
        """Captions images, or answers a question about each; greedy, so always the same.

        Files named like clips (.mp4, .gif, …) and arrays of several frames are clips, all others
        are images. What cannot be read becomes a reply with `error`; the others are not affected.

        Args:
          media: images and clips.
          questions: one for each; None for captions.
          max_new: longest text in tokens.
          batch: images at a time.

        Yields:
          One reply for each, in their order.

        Raises:
          ConfigError: an empty or endless question.
        """
        room = self._room(questions, max_new)
        small = ImageTransform(
            self.view.size
        )  # of pixels that are so already: a share is cut off once
        row = functools.partial(
            prompt_sample, tokenizer=self.loaded.tokenizer, view=small, text_len=room
        )
        devices = self.loaded.mesh.size
        rows = -(-min(batch, len(media)) // devices) * devices

        for start in range(0, len(media), batch):
            chunk = media[start : start + batch]
            replies: dict[int, Reply] = {}
            readable: dict[int, list[tuple[int, Example]]] = {}  # frames -> images
            for i, item in enumerate(chunk):
                frames = self.clip_frames if _is_clip(item) else 1
                try:
                    pixels = resize(_frames(item, frames), self.view)
                except BadMedia as error:
                    gone = isinstance(item, Path) and not item.exists()
                    replies[i] = Reply(item, error="no such file" if gone else error.reason)
                except OSError as error:
                    replies[i] = Reply(item, error=error.strerror or str(error))
                else:
                    readable.setdefault(frames, []).append((i, Example(str(start + i), pixels)))
            for frames, group in readable.items():
                items: Any = [e for _, e in group]
                if questions is not None:
                    items = [(e, Question(questions[start + i])) for i, e in group]
                batches = eval_batches(
                    items, functools.partial(row, frames=frames), rows, threads=0
                )
                for at, text, _ in self._decoder.texts(self.loaded.params, batches, max_new):
                    i = group[at][0]
                    replies[i] = Reply(chunk[i], " ".join((text or "").split()))
            yield from (replies[i] for i in range(len(chunk)))

    def _room(self, questions: Sequence[str] | None, max_new: int) -> int:
        """Tokens for what stands between the image and the new text."""
        asked = questions or ()
        if max_new < 1 or not all(question.strip() for question in asked):
            raise ConfigError("a question needs words, and an answer at least one token")
        after = [QUESTION.after(question) for question in asked] or [CAPTION.after]
        longest = max(len(self.loaded.tokenizer.encode(text)) for text in after)
        name = self.loaded.model.lm
        lm = self.loaded.model.modules[name]
        assert isinstance(lm, LM)
        if longest + max_new > lm.config.max_len:
            raise ConfigError(
                f"{longest} tokens of prompt and {max_new} new ones, but {name} has room for "
                f"{lm.config.max_len}: shorten the question, or lower --max-new"
            )
        return -(-longest // _STEP) * _STEP if asked else longest


def seen(loaded: Loaded) -> tuple[ImageTransform, int]:
    """How a stage that sees images was shown them: its view, and the frames of a clip."""
    data = [loaded.recipe.data[name] for name in loaded.config.data]
    return data[0].view(loaded.view), min(config.frames for config in data)


def describe(
    loaded: Loaded,
    paths: Sequence[Path],
    *,
    question: str | None = None,
    max_new: int = 32,
    batch: int = 8,
) -> Iterator[Reply]:
    """Captions files, or answers one question about each: see `Describer`."""
    questions = None if question is None else [question] * len(paths)
    yield from Describer(loaded).replies(paths, questions, max_new=max_new, batch=batch)


def _is_clip(media: Media) -> bool:
    if isinstance(media, Path):
        return media.suffix.lower() in CLIP_SUFFIXES
    return isinstance(media, np.ndarray) and media.ndim == 4 and len(media) > 1


def _frames(media: Media, frames: int) -> np.ndarray:
    """u8[F,H,W,3]; BadMedia if it cannot be used."""
    return load_media(pixels_of(media) if isinstance(media, Image) else media, frames=frames)
