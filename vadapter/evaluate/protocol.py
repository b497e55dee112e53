"""How a benchmark is run: a protocol says all that its score depends on but the model.

The protocols themselves are tables in `vadapter.evaluate.protocols`. A result is comparable with
another one only if the digests of their protocols are equal.
"""

import dataclasses
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from ml_collections import ConfigDict

from vadapter.config import build, nearest, override, plain
from vadapter.data.example import Question
from vadapter.data.prompts import QUESTION, UNANSWERABLE, VIDEO_QUESTION, QuestionPrompt
from vadapter.errors import ConfigError
from vadapter.metrics.scoring import METRICS
from vadapter.models.generate import Decode

Shots = Literal["text", "image"]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One benchmark's protocol; every field is part of its digest.

    Attributes:
      name: of the table that it is from.
      benchmark: in the registry of benchmarks.
      metric: a row of `scoring.METRICS`.
      prompt: of `PROMPTS`.
      split: of the benchmark.
      shots: examples in the prompt, from the training questions, the same forevery question.
      shot_kind: text: without an image, as the paper has them; image: each behind its own.
      shot_seed: another seed draws other examples.
      decode: how a text is written.
      post: of `POSTS`, what is done to a text before it is scored.
    """

    name: str
    benchmark: str
    metric: str
    prompt: str
    split: str
    shots: int = 0
    shot_kind: Shots = "text"
    shot_seed: int = 0
    decode: Decode = dataclasses.field(default_factory=Decode)
    post: str = "line"

    @property
    def task(self) -> str:
        """caption | question."""
        return METRICS[self.metric].task

    @property
    def asked(self) -> QuestionPrompt:
        """The prompt of a question."""
        return PROMPTS[self.prompt] or QUESTION


# The prompt of captions is prompts.CAPTION, and no choice.
PROMPTS: dict[str, QuestionPrompt | None] = {
    "caption": None,
    "question": QUESTION,
    "video_question": VIDEO_QUESTION,
    "unanswerable": UNANSWERABLE,
}

# What follows an answer in the prompt; a model that goes on after its answer goes on like this.
_NEXT = re.compile(r"\s(?:Given|Question:|Answer:|Answer in exactly one word:)", re.IGNORECASE)


def _line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return " ".join(lines[0].split()) if lines else ""


def _answer(text: str) -> str:
    return _line(_NEXT.split(text, maxsplit=1)[0]).removesuffix(".").strip()


POSTS: dict[str, Callable[[str], str]] = {
    "none": str,
    "line": _line,  # the first line that is not blank, single blanks
    "answer": _answer,  # that, up to the next example and without a final full stop
}


def resolve(
    table: Mapping[str, Protocol], benchmark: str, overrides: Sequence[str] = ()
) -> Protocol:
    """A benchmark's protocol with some of its fields changed.

    Args:
      table: benchmark -> protocol, from `protocols.PROTOCOLS`.
      benchmark: its name.
      overrides: `shots=0`, `decode.beams=3`, ….

    Raises:
      ConfigError: a benchmark without such a protocol, an unknown field or value.
    """
    if benchmark not in table:
        name = next(iter(table.values())).name
        raise ConfigError(
            f"--protocol={name}: none for benchmark {benchmark!r}{nearest(benchmark, table)}"
        )
    values: Any = ConfigDict({"protocol": plain(table[benchmark])})
    override(values, [f"protocol.{item}" for item in overrides])
    protocol = build(Protocol, values["protocol"], "config.protocol")
    for key, known in (("metric", METRICS), ("prompt", PROMPTS), ("post", POSTS)):
        if getattr(protocol, key) not in known:
            value = getattr(protocol, key)
            raise ConfigError(f"config.protocol.{key}={value!r}: unknown{nearest(value, known)}")
    how = protocol.decode
    if protocol.shots < 0 or how.max_new < 1 or how.beams < 1 or how.min_new > how.max_new:
        raise ConfigError(
            f"config.protocol: shots={protocol.shots} must be 0 or more, decode.max_new="
            f"{how.max_new} and decode.beams={how.beams} at least 1, and decode.min_new="
            f"{how.min_new} at most decode.max_new"
        )
    if protocol.shots and protocol.shot_kind == "text" and protocol.task == "caption":
        raise ConfigError(
            f"config.protocol.shots={protocol.shots}: text-only examples are of questions; for "
            f"{benchmark} set shots=0, or shot_kind=image"
        )
    return protocol


def draw(items: Sequence[Any], protocol: Protocol) -> list[Any]:
    """The examples that stand in the prompt: always the same ones of the same training set.

    Raises:
      ConfigError: there are not as many.
    """
    if len(items) < protocol.shots:
        raise ConfigError(
            f"config.protocol.shots={protocol.shots}: the training split of {protocol.benchmark} "
            f"has only {len(items)} that can be shown"
        )
    lot = random.Random(f"{protocol.benchmark} {protocol.shot_seed}")
    return lot.sample(items, protocol.shots)


def draw_questions(training: Sequence[Question], protocol: Protocol) -> list[tuple[str, str]]:
    """(question, answer) pairs for a prompt without their images."""
    asked = [q for q in training if q.text.strip() and q.answer.strip()]
    return [(q.text, q.answer) for q in draw(asked, protocol)]
