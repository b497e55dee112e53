"""Prompts of a benchmark: the instruction, few-shot examples, and whether they fit.

Legend: k examples in the prompt, F frames, Q queries, S pixels per side, E language model width.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vadapter.data.benchmarks.source import open_benchmark, training_questions
from vadapter.data.benchmarks.table import BENCHMARKS
from vadapter.data.example import Example
from vadapter.data.items import Questions
from vadapter.data.media.frames import load_media
from vadapter.data.media.images import BadMedia, resize
from vadapter.data.prompts import CAPTION
from vadapter.data.transforms import prompt_sample
from vadapter.distributed.compile import jit
from vadapter.errors import ConfigError, DataError
from vadapter.evaluate.describe import context_len, image_settings
from vadapter.evaluate.protocols import Protocol, draw, draw_questions
from vadapter.models.adapter_model import AdapterModel, Params
from vadapter.stages.stage import Stage

ImageShot = tuple[Example, str]  # and the text after its image, up to the next image


class Prompts(NamedTuple):
    """How the items of a benchmark become rows."""

    row: Callable[..., Any]  # turns an item into a row of a batch
    frames: int  # F of its images
    examples: tuple[str, ...] = ()  # text of the examples in the prompt
    shown: jax.Array | None = None  # embeddings of examples with images, see `generate.prefill`


def build_prompts(
    loaded: Stage, protocol: Protocol, folder: Path, kind: str, items: Any
) -> Prompts:
    """Return the prompts of a benchmark, of kind "image" or "clip", for the items of `items_of`.

    The folder has the official files. Examples need the annotations of the training split, and
    with `shot_kind=image` also its images.

    Raises:
      ConfigError: the longest row does not fit into the language model's context.
      DataError: training files, or the image of an example, are missing or unusable.
    """
    view, clip_frames = image_settings(loaded)
    frames = clip_frames if kind == "clip" else 1
    encode, prompt = loaded.tokenizer.encode, protocol.question_prompt
    text_shots: list[tuple[str, str]] = []
    image_shots: list[ImageShot] = []
    if protocol.shots and protocol.shot_kind == "text":
        text_shots = draw_questions(training_questions(protocol.benchmark, folder), protocol)
    elif protocol.shots and loaded.adapter_model.cross:
        raise ConfigError(
            f"config.protocol.shot_kind=image: {loaded.name} reads one image, by gated "
            "cross-attention; use shot_kind=text"
        )
    elif protocol.shots:
        image_shots = _draw_image_shots(protocol, folder)

    after, before = {CAPTION.after}, [CAPTION.before]
    if isinstance(items, Questions):
        after = {prompt.after(items.text_only(i)[1].text) for i in range(len(items))}
        before = [prompt.fill("", text_shots[:n]).before for n in range(len(text_shots) + 1)]
    longest = max(len(encode(text)) for text in after)
    queries = _prefix_length(loaded, view.size, frames)
    # Tokens before the image with 0, 1, … k examples; text shots are part of `before`.
    prompt_tokens = [1 + len(encode(text, start=True)) for text in before]
    for _, text in image_shots:
        prompt_tokens.append(prompt_tokens[-1] + queries + len(encode(text)))
    _check_context(loaded, protocol, prompt_tokens, queries + longest + protocol.decode.max_new)

    row = functools.partial(
        prompt_sample, tokenizer=loaded.tokenizer, view=view, frames=frames, text_len=longest,
        template=prompt, shots=tuple(text_shots),
    )  # fmt: skip
    if not image_shots:
        return Prompts(row, frames, tuple(prompt.shown(*pair) for pair in text_shots))
    pixels = np.stack([resize(_load(example, frames), view) for example, _ in image_shots])
    texts = tuple(text for _, text in image_shots)
    shown = embed_image_shots(loaded.adapter_model, loaded.params, pixels, list(map(encode, texts)))
    return Prompts(row, frames, texts, shown)


def embed_image_shots(
    model: AdapterModel, params: Params, frames: np.ndarray, texts: Sequence[Sequence[int]]
) -> jax.Array:
    """Return the embeddings between the prompt and the image, see `generate.prefill`.

    They are [1, k·Q + ids, E], each example's prefix, then its embedded text: of frames
    u8[k,F,S,S,3] and the token ids after each image, up to the next one.
    """

    def embed(params: Params, frames: jax.Array, texts: list[jax.Array]) -> jax.Array:
        lm, parts = model.modules[model.lm], []
        for prefix, ids in zip(_prefix(model, params, frames), texts, strict=True):
            words: Any = lm.apply({"params": params[model.lm]}, ids, method="embed")
            parts += [prefix.astype(words.dtype), words]
        return jnp.concatenate(parts)[None]

    return jit(embed)(params, frames, [np.array(ids, np.int32) for ids in texts])


def _prefix(model: AdapterModel, params: Params, frames: jax.Array) -> jax.Array:
    """Return [k,Q,E], what the language model reads of u8[k,F,S,S,3]."""
    visual = model.encode(params, {"frames": frames})
    assert visual is not None
    return model.prefix(params, visual)


def _prefix_length(loaded: Stage, size: int, frames: int) -> int:
    """Return Q, the length of an image's prefix, without computing it; 0 where there is none."""
    if loaded.adapter_model.cross:
        return 0
    pixels = jax.ShapeDtypeStruct((1, frames, size, size, 3), jnp.uint8)
    prefix = functools.partial(_prefix, loaded.adapter_model)
    return jax.eval_shape(prefix, loaded.params, pixels).shape[1]


def _draw_image_shots(protocol: Protocol, folder: Path) -> list[ImageShot]:
    benchmark = BENCHMARKS[protocol.benchmark]
    split = benchmark.training or "train"
    if split not in benchmark.splits:
        raise ConfigError(
            f"config.protocol.shot_kind=image: {protocol.benchmark} has no training split"
        )
    source = open_benchmark(protocol.benchmark, folder, split)
    if protocol.task == "caption":
        examples = [source[i] for i in draw(range(len(source)), protocol)]
        return [(e, f"{CAPTION.after} {e.captions[0]} {CAPTION.before}") for e in examples]
    questions = Questions(source)
    answered = [i for i in range(len(questions)) if questions.text_only(i)[1].answer.strip()]
    pairs = [questions[i] for i in draw(answered, protocol)]
    return [(e, protocol.question_prompt.shown(q.text, q.answer)) for e, q in pairs]


def _load(example: Example, frames: int) -> np.ndarray:
    """Return u8[F,H,W,3]; an unusable example is an error, as it is in the prompt of every item."""
    try:
        return load_media(example.media, frames=frames)
    except BadMedia as error:
        raise DataError(
            f"{example.id}, an example in the prompt: {error}; restore the file, or draw other "
            "examples with --config.protocol.shot_seed"
        ) from error


def _check_context(
    loaded: Stage, protocol: Protocol, prompt_tokens: Sequence[int], rest: int
) -> None:
    """Raise ConfigError if the longest row exceeds the language model's context.

    It is the prompt, with 0, 1, … k examples, and the rest: image, question and answer.
    """
    limit = context_len(loaded)
    if prompt_tokens[-1] + rest <= limit:
        return
    advice = "it does not fit without examples either: lower --config.protocol.decode.max_new"
    for n, tokens in enumerate(prompt_tokens):
        if tokens + rest <= limit:
            advice = f"{n} of {protocol.shots} examples fit: --config.protocol.shots={n}"
    raise ConfigError(
        f"{protocol.benchmark}: a row has up to {prompt_tokens[-1] + rest} tokens "
        f"({prompt_tokens[-1]} of prompt with {protocol.shots} examples, {rest} of image, longest "
        f"question and answer), but {loaded.adapter_model.lm} has a context of {limit}; {advice}"
    )
