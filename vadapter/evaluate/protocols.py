"""Protocols of benchmarks: everything a score depends on, except the model.

Two results are comparable only if the digests of their protocols are equal. `PROTOCOLS` has them by
name; each is a table benchmark -> protocol.

`paper` is that of PaLM2-VAdapter (arXiv:2402.10896), section 3 and Tables 10 and 11: zero-shot.
Captions follow `Describe the following: <visual tokens> :` and are scored by CIDEr. Questions
follow `Answer the question given the images. Given <visual tokens>. Question: … Answer:`, with four
examples without images from the training questions; prompts for videos end in `Answer in exactly
one word:`. Decoding is greedy. The paper states neither the maximum lengths, nor the postprocessing
of answers, nor all splits; flickr8k and daquar are not part of it.

`unanswerable` is the same for VizWiz with the sentence that LLaVA-style results assume: no model
guesses the word `unanswerable`, a third of the answers, unless the prompt mentions it.
"""

import dataclasses
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from ml_collections import ConfigDict

from vadapter.config import build, nearest, override, plain, require_one_of
from vadapter.data.example import Question
from vadapter.data.prompts import QUESTION, UNANSWERABLE, VIDEO_QUESTION, QuestionPrompt
from vadapter.errors import ConfigError
from vadapter.metrics.scoring import METRICS
from vadapter.models.decoding import Decode

ShotKind = Literal["text", "image"]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The protocol of one benchmark; every field is part of its digest.

    Attributes:
      name: of the table it comes from.
      metric: name in `scoring.METRICS`.
      prompt: name in `PROMPTS`.
      shots: number of examples in the prompt, drawn from the training questions; the same ones for
        every item.
      shot_kind: "text" for examples without images, as in the paper; "image" for examples that
        each follow their image.
      shot_seed: a different seed draws different examples.
      post: name in `POSTS`, the postprocessing before scoring.
    """

    name: str
    benchmark: str
    metric: str
    prompt: str
    split: str
    shots: int = 0
    shot_kind: ShotKind = "text"
    shot_seed: int = 0
    decode: Decode = dataclasses.field(default_factory=Decode)
    post: str = "line"

    @property
    def task(self) -> str:
        """Either "caption" or "question"."""
        return METRICS[self.metric].task

    @property
    def question_prompt(self) -> QuestionPrompt:
        """The prompt of questions."""
        return PROMPTS[self.prompt]


PROMPTS: dict[str, QuestionPrompt] = {
    "caption": QUESTION,  # not used: captions always follow prompts.CAPTION
    "question": QUESTION,
    "video_question": VIDEO_QUESTION,
    "unanswerable": UNANSWERABLE,
}

# What follows an answer in the prompt: a model that does not stop after its answer writes this.
_NEXT_EXAMPLE = re.compile(r"\s(?:Given|Question:|Answer:|Answer in exactly one word:)", re.I)


def _first_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return " ".join(lines[0].split()) if lines else ""


def _answer(text: str) -> str:
    return _first_line(_NEXT_EXAMPLE.split(text, maxsplit=1)[0]).removesuffix(".").strip()


POSTS: dict[str, Callable[[str], str]] = {
    "none": str,
    "line": _first_line,  # the first line that is not blank, with single spaces
    "answer": _answer,  # the same, up to the next example and without a final full stop
}


def _captions(benchmark: str, split: str) -> Protocol:
    return Protocol("paper", benchmark, "cider", "caption", split)


def _questions(benchmark: str, split: str, metric: str, prompt: str = "question") -> Protocol:
    return Protocol(
        "paper", benchmark, metric, prompt, split, shots=4, decode=Decode(max_new=10), post="answer"
    )


_PAPER = (
    _captions("coco", "test"),  # Karpathy's
    _captions("msrvtt", "test"),
    _captions("vatex", "test"),  # the public one
    _questions("vqav2", "val", "vqav2"),
    _questions("textvqa", "val", "textvqa"),
    _questions("vizwiz", "val", "vizwiz"),
    _questions("okvqa", "val", "okvqa"),
    _questions("msrvtt_qa", "test", "exact", "video_question"),
    _questions("msvd_qa", "test", "exact", "video_question"),
    _questions("ivqa", "test", "ivqa", "video_question"),
    _captions("flickr8k", "test"),
    _questions("daquar", "test", "exact"),
)
_VIZWIZ = _questions("vizwiz", "val", "vizwiz", "unanswerable")
PROTOCOLS: dict[str, Mapping[str, Protocol]] = {
    "paper": {protocol.benchmark: protocol for protocol in _PAPER},
    "unanswerable": {"vizwiz": dataclasses.replace(_VIZWIZ, name="unanswerable")},
}


def resolve(
    table: Mapping[str, Protocol], benchmark: str, overrides: Sequence[str] = ()
) -> Protocol:
    """Return the protocol of a benchmark with some fields overridden, such as `decode.beams=3`.

    Raises:
      ConfigError: the table lacks the benchmark, or a field or value is invalid.
    """
    if benchmark not in table:
        name = next(iter(table.values())).name
        raise ConfigError(
            f"--protocol={name} has no benchmark {benchmark!r}{nearest(benchmark, table)}"
        )
    values: Any = ConfigDict({"protocol": plain(table[benchmark])})
    override(values, [f"protocol.{item}" for item in overrides])
    protocol = build(Protocol, values["protocol"], "config.protocol")
    for key, names in (("metric", METRICS), ("prompt", PROMPTS), ("post", POSTS)):
        value = getattr(protocol, key)
        require_one_of(f"config.protocol.{key}={value!r}", value, names)
    how = protocol.decode
    if protocol.shots < 0 or how.max_new < 1 or how.beams < 1 or how.min_new > how.max_new:
        raise ConfigError(
            f"config.protocol: shots={protocol.shots} must be 0 or more, decode.max_new="
            f"{how.max_new} and decode.beams={how.beams} at least 1, and decode.min_new="
            f"{how.min_new} at most decode.max_new"
        )
    if protocol.shots and protocol.shot_kind == "text" and protocol.task == "caption":
        raise ConfigError(
            f"config.protocol.shots={protocol.shots}: text-only examples exist for questions only; "
            f"set shots=0 or shot_kind=image for {benchmark}"
        )
    return protocol


def draw(items: Sequence[Any], protocol: Protocol) -> list[Any]:
    """Return the examples for the prompt, always the same ones from the same training set.

    Raises:
      ConfigError: there are not enough items.
    """
    if len(items) < protocol.shots:
        raise ConfigError(
            f"config.protocol.shots={protocol.shots}: the training split of {protocol.benchmark} "
            f"has only {len(items)} usable examples"
        )
    seed = f"{protocol.benchmark} {protocol.shot_seed}"
    return random.Random(seed).sample(items, protocol.shots)


def draw_questions(training: Sequence[Question], protocol: Protocol) -> list[tuple[str, str]]:
    """Return (question, answer) pairs for a prompt without their images."""
    usable = [q for q in training if q.text.strip() and q.answer.strip()]
    return [(q.text, q.answer) for q in draw(usable, protocol)]
