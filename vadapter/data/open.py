"""From the recipe's data section to streams of rows."""

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vadapter.config import nearest, resolve
from vadapter.data.config import DataConfig
from vadapter.data.documents import DocumentSource, Windows
from vadapter.data.example import Source
from vadapter.data.media.frames import load_media
from vadapter.data.media.images import BadMedia, ImageTransform
from vadapter.data.prompts import CAPTION, QUESTION
from vadapter.data.scenes import ScenesSource
from vadapter.data.sources.parquet import ParquetImages
from vadapter.data.sources.table import ImageFolder
from vadapter.data.sources.tars import CaptionTars
from vadapter.data.sources.tfds import TfdsSource
from vadapter.data.tokenizers import Tokenizer
from vadapter.data.tokenizers.bpe import BPETokenizer
from vadapter.data.transforms import caption_sample, document_sample, question_sample
from vadapter.errors import ConfigError

SOURCES: dict[str, Callable[..., Any]] = {
    "scenes": ScenesSource,
    "tars": CaptionTars,
    "folder": ImageFolder,
    "table": ImageFolder,
    "parquet": ParquetImages,
    "tfds": TfdsSource,
    "documents": DocumentSource,
}
TASKS = {"caption": caption_sample, "question": question_sample, "document": document_sample}
_BEFORE = {"caption": CAPTION.before, "question": QUESTION.before}


def make_source(name: str, config: DataConfig) -> Source:
    """The data set's source.

    Raises:
      ConfigError: unknown kind or argument, or a variable that is not set.
      DataError: what the source finds wrong with its files.
    """
    where = f"data.{name}.source"
    spec = dict(config.source)
    kind = spec.pop("kind", "")
    if kind not in SOURCES:
        raise ConfigError(f"config.{where}.kind={kind!r}: unknown{nearest(str(kind), SOURCES)}")
    known = inspect.signature(SOURCES[kind]).parameters
    for key in spec:
        if key not in known:
            raise ConfigError(f"config.{where}.{key}: unknown key{nearest(key, known)}")
    if config.task not in TASKS:
        raise ConfigError(f"config.data.{name}.task={config.task!r}: one of {', '.join(TASKS)}")
    arguments = {k: resolve(v, f"{where}.{k}") for k, v in spec.items()}
    try:
        return SOURCES[kind](**arguments)
    except TypeError as error:
        raise ConfigError(f"config.{where}: {error}") from None


def make_stream(
    name: str, config: DataConfig, source: Source, tokenizer: Tokenizer, view: ImageTransform | None
) -> tuple[Any, Callable[..., Any]]:
    """(items, transform) of a data set, ready for `pipeline.make_loader` and `eval_batches`.

    Args:
      view: the encoder's; None for text only.
    """
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
    many = {"caption": "captions_per_image", "question": "questions_per_image"}[config.task]
    return source, functools.partial(
        TASKS[config.task],
        tokenizer=tokenizer,
        view=config.view(view),
        frames=config.frames if source.kind == "clip" else 1,
        prompt_len=prompt_len(config.task, tokenizer),
        flip=config.flip,
        **{many: config.texts},
        **lengths,
    )


def prompt_len(task: str, tokenizer: Tokenizer) -> int:
    """P, tokens in front of the visual tokens, BOS among them."""
    return 1 + len(tokenizer.encode(_BEFORE[task], start=True))


def describe(name: str, source: Source, index: int) -> str:
    """An example of a data set as people know it, and what is wrong with it if it is unusable."""
    example = source[index] if source.kind != "text" else None
    if example is None:
        return f"{name} row {index} (no text in it)"
    why = source.fault(index) or "no text that fits"
    try:
        load_media(example.media, frames=1)
    except BadMedia as error:
        why = error.reason
    except OSError as error:
        why = str(error)
    return f"{name} {example.id!r} ({why})"


def require_texts(config: Any) -> None:
    """ConfigError if the tokenizer has no texts to be trained on."""
    if not config.data:
        raise ConfigError("config.tokenizer.data: empty; name the data sets whose texts it learns")


def train_tokenizer(config: Any, sources: Mapping[str, Source], path: Path) -> Tokenizer:
    """The run's tokenizer: read from `path`, or trained on the recipe's texts and written there."""
    if path.exists():
        return BPETokenizer.load(path)
    require_texts(config)
    prompts = [CAPTION.before, CAPTION.after, QUESTION.before, QUESTION.after("")]
    stream = itertools.chain.from_iterable(sources[name].texts() for name in config.data)
    lines = itertools.chain(prompts, itertools.islice(stream, config.texts))
    tokenizer = BPETokenizer.train(lines, config.vocab_size, lowercase=config.lowercase)
    tokenizer.save(path)
    return tokenizer
