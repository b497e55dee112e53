"""Captions and answers for the user's own images and clips.

Legend: F frames, H height, W width.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL.Image import Image

from vadapter.data.example import Example, Question
from vadapter.data.media.frames import load_media
from vadapter.data.media.images import CLIP_SUFFIXES, BadMedia, ImageTransform, resize, upright
from vadapter.data.pipeline import eval_batches
from vadapter.data.prompts import CAPTION, QUESTION
from vadapter.data.transforms import prompt_sample
from vadapter.distributed.mesh import filled
from vadapter.errors import ConfigError
from vadapter.evaluate.runner import Decoder
from vadapter.models.decoding import Decode
from vadapter.stages.restore import describing
from vadapter.stages.stage import Stage

# A file, an image, or pixels: u8[H,W,3] of an image, u8[F,H,W,3] of a clip.
Media = Path | Image | np.ndarray
# Question lengths are rounded up to a multiple of this many tokens, so that questions of similar
# lengths share a compiled program.
_LENGTH_STEP = 16


class Reply(NamedTuple):
    """The caption of an image or the answer to a question about it, or an error."""

    media: Media
    text: str = ""  # one line
    error: str = ""  # why there is no text


class Describer:
    """Captions and answers of a trained stage; compiles one program per shape.

    Raises:
      ConfigError: a text-only stage.
    """

    def __init__(self, loaded: Stage):
        require_images(loaded)
        self.loaded = loaded
        self.view, self.clip_frames = image_settings(loaded)
        self._decoder = Decoder(loaded)

    def replies(
        self, media: Sequence[Media], questions: Sequence[str] | None = None, *, max_new: int = 32,
        batch: int = 8,
    ) -> Iterator[Reply]:  # fmt: skip
        """Caption images, or answer a question about each. Greedy decoding: deterministic.

        Files with the suffix of a clip (.mp4, .gif, …) and arrays of several frames are clips, all
        others are images. An unreadable one gets a reply with `error`; the others are unaffected.
        Yields one reply per image, in order, of at most `max_new` tokens.

        Raises:
          ConfigError: a question that is empty or too long.
        """
        # The pixels below are already transformed: only the size is still needed, as `crop_pct`
        # must not be applied twice.
        row = functools.partial(
            prompt_sample,
            tokenizer=self.loaded.tokenizer,
            view=ImageTransform(self.view.size),
            text_len=self._text_len(questions, max_new),
        )
        rows = filled(min(batch, len(media)), self.loaded.mesh)
        for start in range(0, len(media), batch):
            replies: dict[int, Reply] = {}
            by_frames: dict[int, dict[int, Any]] = {}  # each number of frames has its own shape
            for i, item in enumerate(media[start : start + batch], start):
                pixels, reason = read_pixels(item, self.view, self.clip_frames)
                if pixels is None:
                    replies[i] = Reply(item, error=reason)
                    continue
                example = Example(str(i), pixels)
                pair = example if questions is None else (example, Question(questions[i]))
                by_frames.setdefault(len(pixels), {})[i] = pair
            for frames, group in by_frames.items():
                indices = list(group)
                items: Any = list(group.values())
                shaped = functools.partial(row, frames=frames)
                batches = eval_batches(items, shaped, rows, threads=0)
                for generations in self._decoder.generate(
                    self.loaded.params, batches, Decode(max_new), count=-(-len(media) // batch)
                ):
                    for generation in generations:
                        i = indices[generation.index]
                        replies[i] = Reply(media[i], " ".join((generation.text or "").split()))
            yield from (replies[i] for i in sorted(replies))

    def _text_len(self, questions: Sequence[str] | None, max_new: int) -> int:
        """Return the number of tokens between the image and the generation."""
        if max_new < 1:
            raise ConfigError(f"max_new={max_new}: must be at least 1")
        if not all(question.strip() for question in questions or ()):
            raise ConfigError("the question is empty")
        after = [QUESTION.after(question) for question in questions or ()] or [CAPTION.after]
        longest = max(len(self.loaded.tokenizer.encode(text)) for text in after)
        if longest + max_new > (limit := context_len(self.loaded)):
            raise ConfigError(
                f"a prompt of {longest} tokens and {max_new} new tokens exceed the context of "
                f"{self.loaded.config.lm} ({limit} tokens): shorten the question or lower "
                "--max-new"
            )
        return -(-longest // _LENGTH_STEP) * _LENGTH_STEP if questions else longest


def read_pixels(
    media: Media, view: ImageTransform, clip_frames: int
) -> tuple[np.ndarray | None, str]:
    """Return an image or clip as the encoder sees it, u8[F,S,S,3], or None and why not.

    Files with the suffix of a clip and arrays of several frames have `clip_frames`, others one.
    """
    frames = clip_frames if _is_clip(media) else 1
    try:
        pixels = np.array(upright(media)) if isinstance(media, Image) else media
        return resize(load_media(pixels, frames=frames), view), ""
    except BadMedia as error:
        missing = isinstance(media, Path) and not media.exists()
        return None, "no such file" if missing else error.reason
    except OSError as error:
        return None, error.strerror or str(error)


def require_images(loaded: Stage) -> None:
    """Raise ConfigError unless the stage takes images."""
    if loaded.view is None:
        raise ConfigError(
            f"stage {loaded.name} is text-only; choose a stage that takes images: "
            f"{', '.join(describing(loaded.recipe))}"
        )


def image_settings(loaded: Stage) -> tuple[ImageTransform, int]:
    """Return the image transform a stage was trained with, and its number of frames per clip.

    JPEGs are decoded exactly, whichever way training decoded them.
    """
    data = [loaded.recipe.data[name] for name in loaded.config.data]
    view = dataclasses.replace(data[0].view(loaded.view), decode="exact")
    return view, min(config.frames for config in data)


def context_len(loaded: Stage) -> int:
    """Return the number of tokens that the stage's language model has room for."""
    return loaded.outline.max_len


def _is_clip(media: Media) -> bool:
    if isinstance(media, Path):
        return media.suffix.lower() in CLIP_SUFFIXES
    return isinstance(media, np.ndarray) and media.ndim == 4 and len(media) > 1
