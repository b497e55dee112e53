"""CIDEr-D, BLEU and ROUGE-L as the official COCO code defines them, from joined tokens.

ROUGE-L splits a caption at each space (U+0020), so that "" has one empty word and a token with
other white space inside is one word; CIDEr-D and BLEU split it at white space of every kind.

Legend: I items.
"""

import contextlib
import importlib
import io
import math
from collections import Counter
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

N = 4  # n-grams of 1 to 4 words

References = Sequence[Sequence[str]]
Scores = dict[str, Any]  # cider f64[I], bleu f64[I, 4], rouge_l f64[I]


def of_package(package: ModuleType, candidates: Sequence[str], references: References) -> Scores:
    """Return the scores by pycocoevalcap."""
    truth, given = dict(enumerate(references)), {i: [c] for i, c in enumerate(candidates)}
    scores = {}
    for name, module, arguments in (("cider", "Cider", ()), ("bleu", "Bleu", (N,)),
                                    ("rouge_l", "Rouge", ())):  # fmt: skip
        folder = module.lower()
        scorer = getattr(importlib.import_module(f"{package.__name__}.{folder}.{folder}"), module)
        with contextlib.redirect_stdout(io.StringIO()):
            scores[name] = np.array(scorer(*arguments).compute_score(truth, given)[1])
    return scores | {"bleu": scores["bleu"].T}


def of_definitions(candidates: Sequence[str], references: References) -> Scores:
    """Return the scores, computed word by word."""
    pairs = list(zip(candidates, references, strict=True))
    return {
        "cider": _cider(candidates, references),
        "bleu": [_bleu(candidate, refs) for candidate, refs in pairs],
        "rouge_l": [_rouge_l(candidate, refs) for candidate, refs in pairs],
    }


def _grams(caption: str, n: int) -> Counter:
    words = caption.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _cider(candidates: Sequence[str], references: References) -> list[float]:
    found: Counter = Counter()  # items whose references have the n-gram
    for refs in references:
        found.update({gram for ref in refs for n in range(1, N + 1) for gram in _grams(ref, n)})

    def vector(caption: str, n: int) -> dict[tuple[str, ...], float]:
        idf = {g: math.log(len(references)) - math.log(max(1, found[g])) for g in found}
        rare = math.log(len(references))
        return {g: count * idf.get(g, rare) for g, count in _grams(caption, n).items()}

    def similarity(candidate: str, reference: str) -> float:
        total = 0.0
        for n in range(1, N + 1):
            mine, other = vector(candidate, n), vector(reference, n)
            dot = sum(min(x, other.get(g, 0)) * other.get(g, 0) for g, x in mine.items())
            norm = math.hypot(*mine.values()) * math.hypot(*other.values())
            total += dot / norm if norm else dot
        bigrams = _grams(candidate, 2).total() - _grams(reference, 2).total()
        return total / N * math.exp(-(bigrams**2) / 72)

    return [
        10 * sum(similarity(candidate, ref) for ref in refs) / len(refs)
        for candidate, refs in zip(candidates, references, strict=True)
    ]


def _bleu(candidate: str, references: Sequence[str]) -> list[float]:
    length = len(candidate.split())
    closest = min((abs(len(ref.split()) - length), len(ref.split())) for ref in references)[1]
    ratio = (length + 1e-15) / (closest + 1e-9)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for n in range(1, N + 1):
        counts = [_grams(ref, n) for ref in references]
        correct = sum(
            min(count, max(c[gram] for c in counts)) for gram, count in _grams(candidate, n).items()
        )
        product *= (correct + 1e-15) / (max(0, length - n + 1) + 1e-9)
        scores.append(product ** (1 / n) * brevity)
    return scores


def _rouge_l(candidate: str, references: Sequence[str]) -> float:
    words = candidate.split(" ")
    common = [(_common(words, ref.split(" ")), len(ref.split(" "))) for ref in references]
    precision = max(shared / len(words) for shared, _ in common)
    recall = max(shared / size for shared, size in common)
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision) if precision else 0.0


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            row[j], diagonal = max(row[j], row[j - 1], diagonal + (x == y)), row[j]
    return row[-1]
