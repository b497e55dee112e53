"""Caption metrics equal to the official COCO ones: CIDEr-D, BLEU and ROUGE-L.

Definitions: Vedantam et al. 2015 (CIDEr), Papineni et al. 2002 (BLEU) and Lin 2004 (ROUGE-L), as
implemented by the reference scorer pycocoevalcap 1.2, whose numbers these reproduce per item. All
scores are fractions on the official scale: multiply by 100 to print them (CIDEr reaches 10.0).

Dimensions: I items (images or clips), R references of all of them, K n-grams of all captions.
"""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from vadapter.errors import DataError
from vadapter.metrics.ngrams import ORDERS, Corpus, References, Tokens
from vadapter.metrics.ptb import tokenize

_SIGMA = 6.0  # width, in bigrams, of CIDEr-D's penalty on a difference in length
_BETA = 1.2  # weight of recall in ROUGE-L
_TINY, _SMALL = 1e-15, 1e-9  # BLEU's guards against 0/0, visible in short captions


def cider_d(candidates: Sequence[Tokens], references: References) -> tuple[float, np.ndarray]:
    """Return CIDEr-D, with document frequencies from the given references.

    The cosine of tf-idf vectors with clipped candidate counts and a Gaussian penalty on the
    difference in length (in bigrams, as in the official code), averaged over n = 1..4 and the
    references. The idf comes from the evaluated set itself, so the score of a subset is not
    comparable with that of the full set. Returned are the corpus score (mean over items) and f64[I]
    scores per item, both in 0..10. An empty candidate scores 0.

    Raises:
      DataError: fewer than two items (each idf would be 0), or an item without references.
    """
    corpus = _one_each(candidates, references)
    scores = _cider(corpus, corpus.owner)
    return float(scores.mean()), scores


def _one_each(candidates: Sequence[Tokens], references: References) -> Corpus:
    if len(candidates) != len(references):
        counts = f"{len(candidates)} candidates but {len(references)} sets of references"
        raise DataError(f"got {counts}: pass exactly one candidate per item.")
    return Corpus.build(candidates, references)


def cider_of_constants(captions: Sequence[Tokens], references: References) -> np.ndarray:
    """Return the CIDEr-D of giving all items the same caption, f64[captions, I] in 0..10.

    Equal to `cider_d` of each, but the n-grams of the references are counted only once.
    """
    corpus = Corpus.build(captions, references)
    constants = (np.full_like(corpus.owner, i) for i in range(len(captions)))
    return np.array([_cider(corpus, candidate_of) for candidate_of in constants])


def _cider(corpus: Corpus, candidate_of: np.ndarray) -> np.ndarray:
    """Return f64[I] scores; candidate_of: i64[R], the candidate each reference is compared with."""
    if corpus.items < 2:
        raise DataError(
            "CIDEr needs at least 2 items: its idf comes from the evaluated references, and with "
            "one item every score is 0. Evaluate more items, or the whole test set."
        )
    C = corpus.candidates
    bigrams = np.maximum(corpus.length - 1, 0)
    gap = bigrams[C:] - bigrams[candidate_of]
    similarity = np.zeros(len(gap))
    for grams in corpus.grams:
        idf = np.log(float(corpus.items)) - np.log(np.maximum(1.0, grams.df))
        weight = grams.count * idf[grams.gram]
        norm = np.sqrt(np.bincount(grams.caption, weight**2, len(corpus.length)))
        shared, match = grams.shared(candidate_of)
        overlap = np.minimum(weight[match], weight[shared]) * weight[shared]
        dot = np.bincount(grams.caption[shared], overlap, len(corpus.length))[C:]
        norms = norm[C:] * norm[candidate_of]
        similarity += dot / np.where(norms > 0, norms, 1.0)
    similarity *= np.exp(-(gap**2) / (2 * _SIGMA**2)) / ORDERS
    references = np.bincount(corpus.owner, minlength=corpus.items)
    return 10.0 * (np.bincount(corpus.owner, similarity, corpus.items) / references)


def bleu(candidates: Sequence[Tokens], references: References) -> tuple[np.ndarray, np.ndarray]:
    """Return BLEU-1 to BLEU-4 with the closest reference length (the shorter one at a tie).

    Like `cider_d`, but one item is enough: f64[4] of the corpus (from summed counts, not a mean)
    and f64[I, 4] per item, in 0..1.
    """
    counts = _bleu_counts(_one_each(candidates, references))
    return bleu_of(counts.sum(0)), bleu_of(counts)


def _bleu_counts(corpus: Corpus) -> np.ndarray:
    """Return what each item adds to the sums of `bleu_of`, f64[I, 10]."""
    length = corpus.length[: corpus.candidates]
    others = corpus.length[corpus.candidates :]
    nearest = np.lexsort((others, np.abs(others - length[corpus.owner]), corpus.owner))
    first = np.searchsorted(corpus.owner[nearest], np.arange(corpus.items))
    closest = others[nearest[first]]
    correct = np.zeros((corpus.items, ORDERS))
    for n, grams in enumerate(corpus.grams):
        own = grams.candidate_entries
        allowed = np.zeros(own, np.int64)  # the largest count in any one reference
        shared, match = grams.shared(corpus.owner)
        np.maximum.at(allowed, match, grams.count[shared])
        clipped = np.minimum(allowed, grams.count[:own])
        correct[:, n] = np.bincount(grams.caption[:own], clipped, corpus.items)
    guessed = np.maximum(length[:, None] - np.arange(ORDERS), 0)
    return np.column_stack([correct, guessed, length, closest])


def bleu_of(counts: np.ndarray) -> np.ndarray:
    """Return BLEU-1 to BLEU-4, f64[…, 4] in 0..1, from counts f64[…, 10] of items or their sums.

    The counts are the candidate's correct n-grams (clipped) and all its n-grams, for n = 1 to 4,
    its length and that of the closest reference, in words.
    """
    correct, guessed = counts[..., :ORDERS], counts[..., ORDERS : 2 * ORDERS]
    length, closest = counts[..., -2], counts[..., -1]
    precision = np.cumprod((correct + _TINY) / (guessed + _SMALL), axis=-1)
    ratio = (length + _TINY) / (closest + _SMALL)
    brevity = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    return precision ** (1 / np.arange(1, ORDERS + 1)) * brevity[..., None]


def bleu4_of(counts: np.ndarray) -> np.ndarray:
    """Return BLEU-4, f64[…], see `bleu_of`."""
    return bleu_of(counts)[..., -1]


def _common_subsequence(candidate: Tokens, reference: Tokens, positions: Mapping[str, int]) -> int:
    """Return the length of the longest common subsequence.

    `positions` maps each word to the bit set of its positions in the candidate. Bit-parallel
    dynamic programming (Crochemore et al. 2001): a zero bit is a step of the table.
    """
    row = full = (1 << len(candidate)) - 1
    for word in reference:
        hits = row & positions.get(word, 0)
        row = (row + hits) | (row - hits)
    return (~row & full).bit_count()


def rouge_l(candidates: Sequence[Tokens], references: References) -> tuple[float, np.ndarray]:
    """Return ROUGE-L, the F-measure of the best precision and the best recall over the references.

    The two maxima may come from different references, and an empty caption counts as one empty
    word, as in the official code. Like `cider_d`, but one item is enough and scores are in 0..1.
    """
    scores = np.zeros(_one_each(candidates, references).items)
    for i, (candidate, refs) in enumerate(zip(candidates, references, strict=True)):
        candidate = candidate or [""]
        positions: dict[str, int] = {}
        for position, word in enumerate(candidate):
            positions[word] = positions.get(word, 0) | 1 << position
        refs = [ref or [""] for ref in refs]
        common = [_common_subsequence(candidate, ref, positions) for ref in refs]
        precision = max(common) / len(candidate)
        recall = max(c / len(ref) for c, ref in zip(common, refs, strict=True))
        if precision:
            scores[i] = (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)
    return float(scores.mean()), scores


@dataclasses.dataclass(frozen=True)
class CaptionScores:
    """Scores of a captioning test set, as fractions on the official scale.

    CIDEr-D depends on which items were evaluated: print `n` with it.
    """

    cider: float  # 0..10
    bleu4: float  # of the corpus, 0..1
    rouge_l: float  # 0..1
    n: int  # items
    cider_of: Mapping[Hashable, float]  # by the item's id
    rouge_l_of: Mapping[Hashable, float]
    bleu_counts_of: Mapping[Hashable, Sequence[float]]  # 10 each, see `bleu_of`


def score_captions(
    predictions: Mapping[Hashable, str], references: Mapping[Hashable, Sequence[str]]
) -> CaptionScores:
    """Score raw captions: official tokenization, then CIDEr-D, BLEU-4 and ROUGE-L.

    Line breaks inside captions count as spaces; empty predictions are allowed and score 0. Keys are
    the items' ids.

    Raises:
      DataError: the ids differ, an item has no references, or there are fewer than two items.
    """
    if predictions.keys() != references.keys():
        missing = [key for key in references if key not in predictions]
        unknown = [key for key in predictions if key not in references]
        raise DataError(
            f"Predictions and references must have the same ids: {len(missing)} without a "
            f"prediction (e.g. {missing[:3]}), {len(unknown)} without references "
            f"(e.g. {unknown[:3]})."
        )
    candidates = [tokenize(predictions[key]) for key in references]
    human = [[tokenize(caption) for caption in captions] for captions in references.values()]
    corpus = _one_each(candidates, human)
    ciders = _cider(corpus, corpus.owner)
    counts = _bleu_counts(corpus)
    rouge, rouges = rouge_l(candidates, human)
    return CaptionScores(
        cider=float(ciders.mean()),
        bleu4=float(bleu4_of(counts.sum(0))),
        rouge_l=rouge,
        n=len(references),
        cider_of=dict(zip(references, ciders.tolist(), strict=True)),
        rouge_l_of=dict(zip(references, rouges.tolist(), strict=True)),
        bleu_counts_of=dict(zip(references, counts.tolist(), strict=True)),
    )
