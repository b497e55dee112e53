"""The protocols by name; each is a table benchmark -> protocol.

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
from collections.abc import Mapping

from vadapter.config import nearest
from vadapter.errors import ConfigError
from vadapter.evaluate.protocol import Protocol
from vadapter.models.generate import Decode


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


def find_protocol(name: str) -> Mapping[str, Protocol]:
    """Return the table of a protocol.

    Raises:
      ConfigError: there is no such protocol.
    """
    if name not in PROTOCOLS:
        raise ConfigError(f"--protocol={name}: unknown{nearest(name, PROTOCOLS)}")
    return PROTOCOLS[name]
