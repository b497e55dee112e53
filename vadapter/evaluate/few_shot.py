"""What a protocol puts in front of a benchmark's images and questions, and whether it fits.

Legend: k examples in the prompt, F frames, Q queries, S pixels a side.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vadapter.data.benchmarks.source import open_benchmark, training_questions
from vadapter.data.benchmarks.table import BENCHMARKS
from vadapter.data.example import Example
from vadapter.data.media.frames import load_media
from vadapter.data.media.images import BadMedia, resize
from vadapter.data.prompts import CAPTION
from vadapter.data.transforms import prompt_sample
from vadapter.errors import ConfigError, DataError
from vadapter.evaluate.describe import seen
from vadapter.evaluate.image_shots import show
from vadapter.evaluate.protocol import Protocol, draw, draw_questions
from vadapter.metrics.scoring import Questions
from vadapter.models.lm import LM
from vadapter.stages.restore import Loaded


@dataclasses.dataclass(frozen=True)
class Prompts:
    """How the items of a benchmark become rows.

    Attributes:
      row: makes a row of an item.
      frames: F of its images.
      examples: texts of those in the prompt.
      shown: the examples that have images, see `generate.prefill`; None: there are none.
    """

    row: Callable[..., Any]
    frames: int
    examples: tuple[str, ...] = ()
    shown: jax.Array | None = None

    def facts(self) -> dict[str, Any]:
        """What the record of a result says of them."""
        return {"frames": self.frames, "examples": list(self.examples)}


@dataclasses.dataclass(frozen=True)
class _Shot:
    """An example with its image: `text` stands behind it, up to the next image."""

    example: Example
    text: str


def prompting(loaded: Loaded, protocol: Protocol, folder: Path, kind: str, items: Any) -> Prompts:
    """The prompts of a benchmark for a stage.

    Args:
      folder: with the benchmark's official files; of the training split, where examples come
        from, the annotations, and for examples with images those, too.
      kind: image | clip.
      items: from `scoring.items_of`.

    Raises:
      ConfigError: the longest row does not fit into the language model; tells how much would.
      DataError: training files that are missing or cannot be used, or the image of an example.
    """
    view, clip_frames = seen(loaded)
    frames = clip_frames if kind == "clip" else 1
    encode, asked = loaded.tokenizer.encode, protocol.asked
    pairs: list[tuple[str, str]] = []
    shots: list[_Shot] = []
    if protocol.shots and protocol.shot_kind == "text":
        pairs = draw_questions(training_questions(protocol.benchmark, folder), protocol)
    elif protocol.shots:
        shots = _with_images(protocol, folder)

    after, before = {CAPTION.after}, [CAPTION.before]
    if isinstance(items, Questions):
        after = {asked.after(items.text_only(i)[1].text) for i in range(len(items))}
        before = [asked.fill("", pairs[:n]).before for n in range(len(pairs) + 1)]
    longest = max(len(encode(text)) for text in after)
    queries = _queries(loaded, view.size, frames)
    front = [1 + len(encode(text, start=True)) for text in before]
    for shot in shots:
        front.append(front[-1] + queries + len(encode(shot.text)))
    _check_room(loaded, protocol, front, queries + longest + protocol.decode.max_new)

    row = functools.partial(
        prompt_sample, tokenizer=loaded.tokenizer, view=view, frames=frames, text_len=longest,
        asked=asked, shots=tuple(pairs),
    )  # fmt: skip
    if not shots:
        return Prompts(row, frames, tuple(asked.shown(*pair) for pair in pairs))
    media = np.stack([resize(_frames(shot.example, frames), view) for shot in shots])
    texts = [encode(shot.text) for shot in shots]
    shown = show(loaded.model, loaded.params, media, texts)
    return Prompts(row, frames, tuple(shot.text for shot in shots), shown)


def _with_images(protocol: Protocol, folder: Path) -> list[_Shot]:
    benchmark = BENCHMARKS[protocol.benchmark]
    split = benchmark.training or "train"
    if split not in benchmark.splits:
        raise ConfigError(
            f"config.protocol.shot_kind=image: {protocol.benchmark} has no training split"
        )
    source = open_benchmark(protocol.benchmark, folder, split)
    if protocol.task == "caption":
        found = [source[i] for i in draw(range(len(source)), protocol)]
        behind = f"{CAPTION.after} {{}} {CAPTION.before}"
        return [_Shot(e, behind.format(e.captions[0])) for e in found]
    questions = Questions(source)
    answered = [i for i in range(len(questions)) if questions.text_only(i)[1].answer.strip()]
    asked = [questions[i] for i in draw(answered, protocol)]
    return [_Shot(e, protocol.asked.shown(q.text, q.answer)) for e, q in asked]


def _frames(example: Example, count: int) -> np.ndarray:
    """u8[F,H,W,3]. What is in the prompt of every item has to be readable."""
    assert example.media is not None
    try:
        return load_media(example.media, frames=count)
    except BadMedia as error:
        raise DataError(
            f"{example.id}, an example in the prompt: {error}; get it again, or draw other "
            "examples: --config.protocol.shot_seed"
        ) from error


def _queries(loaded: Loaded, size: int, frames: int) -> int:
    """Q, the length of an image's prefix; nothing is computed."""
    shape = jax.ShapeDtypeStruct((1, frames, size, size, 3), jnp.uint8)

    def prefix(params: Any, pixels: jax.Array) -> jax.Array:
        visual = loaded.model.encode(params, {"frames": pixels})
        assert visual is not None
        return loaded.model.prefix(params, visual)

    return jax.eval_shape(prefix, loaded.params, shape).shape[1]


def _check_room(loaded: Loaded, protocol: Protocol, front: Sequence[int], rest: int) -> None:
    """ConfigError if the row is longer than the language model's room.

    Args:
      front: tokens of the prompt with 0, 1, … k examples; rest: of image, question and answer.
    """
    lm = loaded.model.modules[loaded.model.lm]
    assert isinstance(lm, LM)
    room = lm.config.max_len
    if front[-1] + rest <= room:
        return
    fitting = [n for n, tokens in enumerate(front) if tokens + rest <= room]
    advice = (
        f"{fitting[-1]} of {protocol.shots} examples fit: --config.protocol.shots={fitting[-1]}"
        if fitting
        else "it does not fit without examples either: lower --config.protocol.decode.max_new"
    )
    raise ConfigError(
        f"{protocol.benchmark}: {front[-1]} tokens of prompt with {protocol.shots} examples and "
        f"{rest} of image, longest question and answer, but {loaded.model.lm} has room for "
        f"{room}; {advice}"
    )
