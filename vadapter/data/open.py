"""From the recipe's `data` section to sources, and on to streams of rows."""

import functools
import importlib
import inspect
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vadapter.config import nearest, require_one_of, resolve
from vadapter.data.config import DataConfig
from vadapter.data.example import Features, Source
from vadapter.data.items import Windows
from vadapter.data.media.images import BadMedia, ImageTransform
from vadapter.data.pipeline import Items, Transform
from vadapter.data.prompts import CAPTION, QUESTION
from vadapter.data.tokenizers import Tokenizer
from vadapter.errors import ConfigError

# Imported when a recipe first names them: a run on photos needs neither scenes nor parquet.
SOURCES = {
    "scenes": "vadapter.data.scenes.source:ScenesSource",
    "tars": "vadapter.data.sources.tars:CaptionTars",
    "folder": "vadapter.data.sources.table:ImageFolder",
    "table": "vadapter.data.sources.table:ImageFolder",
    "parquet": "vadapter.data.sources.parquet:ParquetImages",
    "tfds": "vadapter.data.sources.tfds:TfdsSource",
    "documents": "vadapter.data.documents:DocumentSource",
}
JUDGES = ("scenes",)  # the kinds whose examples judge captions, see `Example.judge`
TASKS = ("caption", "question", "document")


def make_source(name: str, config: DataConfig) -> Source:
    """Return the source of the data set `name` of a recipe.

    Raises:
      ConfigError: an unknown kind or argument, an environment variable that is not set, or `blank`
        where there are no images.
      DataError: the source's files are missing or invalid.
    """
    key = f"data.{name}.source"
    arguments = dict(config.source)
    kind = arguments.pop("kind", "")
    require_one_of(f"config.{key}.kind={kind!r}", kind, SOURCES)
    module, _, attribute = SOURCES[kind].partition(":")
    source = getattr(importlib.import_module(module), attribute)
    parameters = inspect.signature(source).parameters
    if unknown := [argument for argument in arguments if argument not in parameters]:
        suggestion = nearest(unknown[0], parameters)
        raise ConfigError(f"config.{key}.{unknown[0]}: unknown key{suggestion}")
    require_one_of(f"config.data.{name}.task={config.task!r}", config.task, TASKS)
    arguments = {k: resolve(v, f"{key}.{k}") for k, v in arguments.items()}
    try:
        opened = source(**arguments)
    except TypeError as error:  # a required argument is missing
        raise ConfigError(f"config.{key}: {error}") from None
    if not config.blank:
        return opened
    from vadapter.data.blank import BlankSource

    if opened.kind == "text":
        raise ConfigError(f"config.data.{name}.blank: its source has no images to replace")
    return BlankSource(opened)


def make_stream(
    name: str, config: DataConfig, source: Source, tokenizer: Tokenizer, view: ImageTransform | None
) -> tuple[Items, Transform]:
    """Return (items, transform) for `pipeline.make_loader` and `pipeline.eval_batches`.

    `view` is the encoder's image transform; None for text only.

    Raises:
      ConfigError: the source has clips and the recipe says images, or the reverse.
    """
    # With the readers of images and video, which a process that opens no data does without.
    from vadapter.data.transforms import caption_sample, document_sample, question_sample

    lengths = {"text_len": config.text_len, "target_len": config.target_len or config.text_len}
    if config.task == "document":
        items = Windows.to_fill(source, tokenizer, config.text_len)
        return items, functools.partial(
            document_sample, tokenizer=tokenizer, last_only=config.last_only, **lengths
        )
    if config.media not in ("", source.kind):
        raise ConfigError(
            f"data {name!r}: media={config.media!r}, but its source has {source.kind}s"
        )
    return source, functools.partial(
        caption_sample if config.task == "caption" else question_sample, tokenizer=tokenizer,
        view=config.view(view), frames=config.frames if source.kind == "clip" else 1,
        prompt_len=prompt_len(config.task, tokenizer), flip=config.flip,
        texts_per_image=config.texts, **lengths,
    )  # fmt: skip


def prompt_len(task: str, tokenizer: Tokenizer) -> int:
    """Return P, the number of tokens before the visual tokens, BOS included."""
    before = {"caption": CAPTION.before, "question": QUESTION.before}[task]
    return 1 + len(tokenizer.encode(before, start=True))


def describe(name: str, source: Source, index: int) -> str:
    """Return a data set's example by name, and why it cannot be used, for logs."""
    if source.kind == "text":
        return f"{name} row {index} (no text in it)"
    from vadapter.data.media.frames import load_media

    example = source[index]
    why = source.fault(index) or "no text that fits"
    if not (isinstance(example.media, Features) and example.media.readable):
        try:
            load_media(example.media, frames=1)
        except (BadMedia, OSError) as error:
            why = error.reason if isinstance(error, BadMedia) else str(error)
    return f"{name} {example.id!r} ({why})"


def require_texts(config: Any) -> None:
    """Raise ConfigError if the recipe's tokenizer has no texts to be trained on."""
    if not config.data:
        raise ConfigError("config.tokenizer.data: empty; name the data sets to train it on")


def train_tokenizer(config: Any, sources: Mapping[str, Source], path: Path) -> Tokenizer:
    """Return the run's tokenizer, read from `path` or else trained and saved there.

    It is trained on the first `config.texts` texts of the `sources` that `config.data` names, where
    `config` is the recipe's `tokenizer` section.
    """
    from vadapter.data.tokenizers.bpe import BPETokenizer

    if path.exists():
        return BPETokenizer.load(path)
    require_texts(config)
    prompts = [CAPTION.before, CAPTION.after, QUESTION.before, QUESTION.after("")]
    texts = itertools.chain.from_iterable(sources[name].texts() for name in config.data)
    texts = itertools.chain(prompts, itertools.islice(texts, config.texts))
    tokenizer = BPETokenizer.train(texts, config.vocab_size, lowercase=config.lowercase)
    tokenizer.save(path)
    return tokenizer
