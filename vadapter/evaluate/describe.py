"""Captions and answers for the user's own images and clips.

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
from vadapter.data.media.images import CLIP_SUFFIXES, BadMedia, ImageTransform, resize, upright
from vadapter.data.pipeline import eval_batches
from vadapter.data.prompts import CAPTION, QUESTION
from vadapter.data.transforms import prompt_sample
from vadapter.errors import ConfigError
from vadapter.evaluate.runner import Decoder
from vadapter.models.generate import Decode
from vadapter.models.lm import LM
from vadapter.stages.restore import describing
from vadapter.stages.stage import Stage

# A file, an image, or pixels: u8[H,W,3] of an image, u8[F,H,W,3] of a clip.
Media = Path | Image | np.ndarray
# Question lengths are rounded up to a multiple of this many tokens, so that questions of similar
# lengths share a compiled program.
_LENGTH_STEP = 16


@dataclasses.dataclass(frozen=True)
class Reply:
    """The caption of an image or the answer to a question about it, or an error.

    Attributes:
      media: the image.
      text: one line.
      error: why there is no text; "" if there is.
    """

    media: Media
    text: str = ""
    error: str = ""


class Describer:
    """Captions and answers of a trained stage; compiles one program per shape.

    Args:
      loaded: a stage that takes images.

    Raises:
      ConfigError: a text-only stage.
    """

    def __init__(self, loaded: Stage):
        require_images(loaded)
        self.loaded = loaded
        self.view, self.clip_frames = image_settings(loaded)
        self._decoder = Decoder(loaded.adapter_model, loaded.tokenizer, loaded.mesh)

    def replies(
        self,
        media: Sequence[Media],
        questions: Sequence[str] | None = None,
        *,
        max_new: int = 32,
        batch: int = 8,
    ) -> Iterator[Reply]:
        """Caption images, or answer a question about each. Greedy decoding: deterministic.

        Files with the suffix of a clip (.mp4, .gif, …) and arrays of several frames are clips, all
        others are images. An unreadable one gets a reply with `error`; the others are unaffected.

        Args:
          media: images and clips.
          questions: one per image; None for captions.
          max_new: maximum number of generated tokens.
          batch: images per batch.

        Yields:
          One reply per image, in order.

        Raises:
          ConfigError: a question that is empty or too long.
        """
        text_len = self._text_len(questions, max_new)
        # The pixels below are already transformed: only the size is still needed, as `crop_pct`
        # must not be applied twice.
        view = ImageTransform(self.view.size)
        row = functools.partial(
            prompt_sample, tokenizer=self.loaded.tokenizer, view=view, text_len=text_len
        )
        devices = self.loaded.mesh.size
        rows = -(-min(batch, len(media)) // devices) * devices

        for start in range(0, len(media), batch):
            chunk = media[start : start + batch]
            replies: dict[int, Reply] = {}
            by_frames: dict[int, list[tuple[int, Example]]] = {}  # each number has its own shape
            for i, item in enumerate(chunk):
                frames = self.clip_frames if _is_clip(item) else 1
                try:
                    pixels = resize(_load(item, frames), self.view)
                except BadMedia as error:
                    missing = isinstance(item, Path) and not item.exists()
                    replies[i] = Reply(item, error="no such file" if missing else error.reason)
                except OSError as error:
                    replies[i] = Reply(item, error=error.strerror or str(error))
                else:
                    by_frames.setdefault(frames, []).append((i, Example(str(start + i), pixels)))
            for frames, group in by_frames.items():
                items: Any = [e for _, e in group]
                if questions is not None:
                    items = [(e, Question(questions[start + i])) for i, e in group]
                batches = eval_batches(
                    items, functools.partial(row, frames=frames), rows, threads=0
                )
                for generations in self._decoder.generate(
                    self.loaded.params, batches, Decode(max_new)
                ):
                    for index, text, _ in generations:
                        i = group[index][0]
                        replies[i] = Reply(chunk[i], " ".join((text or "").split()))
            yield from (replies[i] for i in range(len(chunk)))

    def _text_len(self, questions: Sequence[str] | None, max_new: int) -> int:
        """Return the number of tokens between the image and the generation."""
        if max_new < 1:
            raise ConfigError(f"max_new={max_new}: must be at least 1")
        if not all(question.strip() for question in questions or ()):
            raise ConfigError("a question is empty: pass at least one word")
        after = [QUESTION.after(question) for question in questions or ()] or [CAPTION.after]
        longest = max(len(self.loaded.tokenizer.encode(text)) for text in after)
        name = self.loaded.adapter_model.lm
        lm = self.loaded.adapter_model.modules[name]
        assert isinstance(lm, LM)
        if longest + max_new > lm.config.max_len:
            raise ConfigError(
                f"a prompt of {longest} tokens and {max_new} new tokens exceed the context of "
                f"{name} ({lm.config.max_len} tokens): shorten the question or lower --max-new"
            )
        return -(-longest // _LENGTH_STEP) * _LENGTH_STEP if questions else longest


def require_images(loaded: Stage) -> None:
    """Raise ConfigError unless the stage takes images."""
    if loaded.view is None:
        raise ConfigError(
            f"stage {loaded.name} is text-only; choose a stage that takes images: "
            f"{', '.join(describing(loaded.recipe))}"
        )


def image_settings(loaded: Stage) -> tuple[ImageTransform, int]:
    """Return the image transform a stage was trained with, and its number of frames per clip."""
    data = [loaded.recipe.data[name] for name in loaded.config.data]
    return data[0].view(loaded.view), min(config.frames for config in data)


def describe(
    loaded: Stage,
    paths: Sequence[Path],
    *,
    question: str | None = None,
    max_new: int = 32,
    batch: int = 8,
) -> Iterator[Reply]:
    """Caption files, or answer one question about each, see `Describer.replies`."""
    questions = None if question is None else [question] * len(paths)
    yield from Describer(loaded).replies(paths, questions, max_new=max_new, batch=batch)


def _is_clip(media: Media) -> bool:
    if isinstance(media, Path):
        return media.suffix.lower() in CLIP_SUFFIXES
    return isinstance(media, np.ndarray) and media.ndim == 4 and len(media) > 1


def _load(media: Media, frames: int) -> np.ndarray:
    """Return u8[F,H,W,3]; raise BadMedia if it is unusable."""
    pixels = np.array(upright(media)) if isinstance(media, Image) else media
    return load_media(pixels, frames=frames)
