"""Caption metrics equal to the official COCO ones: CIDEr-D, BLEU and ROUGE-L.

Source of the definitions: Vedantam et al. 2015 (CIDEr), Papineni et al. 2002 (BLEU), Lin 2004
(ROUGE-L) as fixed by the reference scorer pycocoevalcap 1.2, whose numbers these reproduce per item
(METEOR and SPICE need Java models and are left out). All scores are fractions on the official
scale: multiply by 100 to print them (CIDEr reaches 10.0).

The n-grams of a whole test set are counted at once with integer codes, so that MSRVTT (2,990 x 20
references) takes a second instead of twelve.

Dimensions: I items (images or clips), C captions (I candidates, then all references), K n-grams.
"""

import dataclasses
from collections.abc import Hashable, Iterator, Mapping, Sequence

import numpy as np

from vadapter.errors import DataError
from vadapter.evals.ptb import tokenize

_ORDERS = 4  # n-grams of 1 to 4 words
_SIGMA = 6.0  # width, in bigrams, of CIDEr-D's penalty on a difference in length
_BETA = 1.2  # weight of recall in ROUGE-L
_TINY, _SMALL = 1e-15, 1e-9  # BLEU's guards against 0/0, visible in short captions

Tokens = Sequence[str]


@dataclasses.dataclass(frozen=True)
class _Corpus:
    """Token ids of all captions, end to end.

    Attributes:
      words: i64[sum of lengths], the vocabulary id of each token.
      length: i64[C], tokens of each caption.
      owner: i64[C], the item of each caption; the candidate of item i is caption i.
      items: I.
    """

    words: np.ndarray
    length: np.ndarray
    owner: np.ndarray
    items: int

    @classmethod
    def build(cls, candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]):
        if len(candidates) != len(references):
            counts = f"{len(candidates)} candidates but {len(references)} sets of references"
            raise DataError(f"{counts}: give exactly one candidate per item.")
        if not candidates:
            raise DataError("Nothing to score: there is no candidate caption.")
        bare = [i for i, refs in enumerate(references) if not refs]
        if bare:
            raise DataError(f"Items without a reference, e.g. number {bare[:3]}: drop them.")
        captions = [*candidates, *(ref for refs in references for ref in refs)]
        ids: dict[str, int] = {}
        words = [ids.setdefault(word, len(ids)) for caption in captions for word in caption]
        counts = [len(refs) for refs in references]
        items = np.arange(len(candidates))
        return cls(
            words=np.array(words, np.int64),
            length=np.array([len(caption) for caption in captions], np.int64),
            owner=np.concatenate([items, np.repeat(items, counts)]),
            items=len(candidates),
        )

    def mean_over_references(self, values: np.ndarray) -> np.ndarray:
        """f64[C - I] -> f64[I]."""
        owner = self.owner[self.items :]
        return np.bincount(owner, values, self.items) / np.bincount(owner, minlength=self.items)


@dataclasses.dataclass(frozen=True)
class _Grams:
    """The distinct n-grams of each caption, for one n.

    Attributes:
      caption: i64[K], ascending, so that the candidates' n-grams come first.
      gram: i64[K], an id of the n-gram, below `kinds`.
      count: i64[K], occurrences in the caption.
      match: i64[K], the entry of the item's candidate with the same n-gram, -1 where it has none.
      candidates: how many entries belong to candidates.
      df: i64[kinds], the number of items whose references hold the n-gram.
    """

    caption: np.ndarray
    gram: np.ndarray
    count: np.ndarray
    match: np.ndarray
    candidates: int
    df: np.ndarray


def _grams(corpus: _Corpus) -> Iterator[_Grams]:
    """The n-grams of a corpus, n = 1 to 4."""
    caption_of = np.repeat(np.arange(len(corpus.length)), corpus.length)
    left = np.repeat(np.cumsum(corpus.length), corpus.length) - np.arange(len(corpus.words))
    start = np.arange(len(corpus.words))
    vocabulary = int(corpus.words.max(initial=0)) + 1
    gram = np.zeros(len(corpus.words), np.int64)
    for n in range(1, _ORDERS + 1):
        inside = left[start] >= n  # the n-gram that starts here ends inside its caption
        start = start[inside]
        code = gram[inside] * vocabulary + corpus.words[start + n - 1]
        gram = np.unique(code, return_inverse=True)[1].reshape(-1)  # small numbers again
        kinds = int(gram.max(initial=0)) + 1

        key, count = np.unique(caption_of[start] * kinds + gram, return_counts=True)
        caption, kind = np.divmod(key, kinds)
        candidates = int(np.searchsorted(caption, corpus.items))
        item_key = corpus.owner[caption] * kinds + kind
        match = np.full(len(key), -1)
        if candidates:
            at = np.minimum(np.searchsorted(key[:candidates], item_key), candidates - 1)
            match = np.where(key[at] == item_key, at, -1)
        # Without the counts numpy would hash instead of sort: thirty times slower here.
        in_references, _ = np.unique(item_key[candidates:], return_counts=True)
        df = np.bincount(in_references % kinds, minlength=kinds)
        yield _Grams(caption, kind, count, match, candidates, df)


def cider_d(
    candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> tuple[float, np.ndarray]:
    """CIDEr-D with document frequencies from the given references.

    Cosine of tf-idf vectors with clipped candidate counts and a Gaussian penalty on the difference
    in length, where the official code counts bigrams, averaged over n = 1..4 and the references.
    The idf comes from the evaluated set itself: a subset's score is not comparable with the whole.

    Args:
      candidates: tokens of one caption per item; may be empty, which scores 0.
      references: at least one tokenised caption per item.

    Returns:
      The corpus score (mean over items) and f64[I] scores per item, both in 0..10.

    Raises:
      DataError: fewer than two items (every idf would be 0), or an item without references.
    """
    corpus = _Corpus.build(candidates, references)
    if corpus.items < 2:
        raise DataError(
            "CIDEr needs at least 2 items: its idf comes from the evaluated references, and with "
            "one item every score is 0. Evaluate the whole test set."
        )
    bigrams = np.maximum(corpus.length - 1, 0)
    gap = (bigrams - bigrams[corpus.owner])[corpus.items :]
    similarity = np.zeros(len(gap))
    for grams in _grams(corpus):
        idf = np.log(float(corpus.items)) - np.log(np.maximum(1.0, grams.df))
        weight = grams.count * idf[grams.gram]
        norm = np.sqrt(np.bincount(grams.caption, weight**2, len(corpus.length)))
        shared = np.flatnonzero(grams.match >= 0)
        shared = shared[shared >= grams.candidates]
        overlap = np.minimum(weight[grams.match[shared]], weight[shared]) * weight[shared]
        dot = np.bincount(grams.caption[shared], overlap, len(corpus.length))
        norms = (norm * norm[corpus.owner])[corpus.items :]
        similarity += dot[corpus.items :] / np.where(norms > 0, norms, 1.0)
    similarity *= np.exp(-(gap**2) / (2 * _SIGMA**2)) / _ORDERS
    scores = 10.0 * corpus.mean_over_references(similarity)
    return float(scores.mean()), scores


def bleu(
    candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> tuple[np.ndarray, np.ndarray]:
    """BLEU-1 to BLEU-4 with the closest reference length (the shorter one of equals).

    Args: as `cider_d`; one item is enough.

    Returns:
      f64[4] of the corpus (from summed counts, not a mean) and f64[I, 4] per item, in 0..1.

    Raises:
      DataError: nothing to score, or an item without references.
    """
    corpus = _Corpus.build(candidates, references)
    length = corpus.length[: corpus.items]
    closest = [
        min((abs(len(ref) - len(candidate)), len(ref)) for ref in refs)[1]
        for candidate, refs in zip(candidates, references, strict=True)
    ]
    correct = np.zeros((corpus.items, _ORDERS))
    for n, grams in enumerate(_grams(corpus)):
        allowed = np.zeros(grams.candidates, np.int64)  # the most any one reference has
        own, shared = grams.match[grams.candidates :], grams.count[grams.candidates :]
        np.maximum.at(allowed, own[own >= 0], shared[own >= 0])
        clipped = np.minimum(allowed, grams.count[: grams.candidates])
        correct[:, n] = np.bincount(grams.caption[: grams.candidates], clipped, corpus.items)
    guessed = np.maximum(length[:, None] - np.arange(_ORDERS), 0)

    def score(correct: np.ndarray, guessed: np.ndarray, length, closest) -> np.ndarray:
        """[…, 4] counts, […] lengths -> […, 4]."""
        precision = np.cumprod((correct + _TINY) / (guessed + _SMALL), axis=-1)
        ratio = (length + _TINY) / (closest + _SMALL)
        brevity = np.exp(np.minimum(0.0, 1 - 1 / ratio))
        return precision ** (1 / np.arange(1, _ORDERS + 1)) * np.asarray(brevity)[..., None]

    corpus_score = score(correct.sum(0), guessed.sum(0), length.sum(), sum(closest))
    return corpus_score, score(correct, guessed, length, np.array(closest))


def _common(candidate: Tokens, reference: Tokens, places: Mapping[str, int]) -> int:
    """Length of the longest common subsequence; `places`: bit set of each word in the candidate.

    Bit-parallel dynamic programming (Crochemore et al. 2001): a zero bit is a step of the table.
    """
    row = full = (1 << len(candidate)) - 1
    for word in reference:
        hits = row & places.get(word, 0)
        row = (row + hits) | (row - hits)
    return (~row & full).bit_count()


def rouge_l(
    candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> tuple[float, np.ndarray]:
    """ROUGE-L, the F-measure of the best precision and the best recall over the references.

    The two maxima may come from different references, and an empty caption counts as one empty
    word, as in the official code.

    Args: as `cider_d`; one item is enough.

    Returns:
      The mean over items and f64[I] scores per item, in 0..1.

    Raises:
      DataError: nothing to score, or an item without references.
    """
    corpus = _Corpus.build(candidates, references)
    scores = np.zeros(corpus.items)
    for i, (candidate, refs) in enumerate(zip(candidates, references, strict=True)):
        candidate = candidate or [""]
        places: dict[str, int] = {}
        for at, word in enumerate(candidate):
            places[word] = places.get(word, 0) | 1 << at
        refs = [ref or [""] for ref in refs]
        common = [_common(candidate, ref, places) for ref in refs]
        precision = max(common) / len(candidate)
        recall = max(c / len(ref) for c, ref in zip(common, refs, strict=True))
        if precision:
            scores[i] = (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)
    return float(scores.mean()), scores


@dataclasses.dataclass(frozen=True)
class CaptionScores:
    """Scores of a captioning test set, as fractions on the official scale.

    Attributes:
      cider: CIDEr-D, 0..10. It depends on which items were evaluated: print `n` with it.
      bleu4: corpus BLEU-4, 0..1.
      rouge_l: 0..1.
      n: the number of items.
      cider_of: CIDEr-D of each item, by its id.
    """

    cider: float
    bleu4: float
    rouge_l: float
    n: int
    cider_of: Mapping[Hashable, float]


def score_captions(
    predictions: Mapping[Hashable, str], references: Mapping[Hashable, Sequence[str]]
) -> CaptionScores:
    """Scores raw captions: official tokenisation, then CIDEr-D, BLEU-4 and ROUGE-L.

    Line breaks inside captions are blanks; empty predictions are legal and score 0.

    Args:
      predictions: one caption per item id.
      references: the human captions of the same ids, at least one each.

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
    cider, per_item = cider_d(candidates, human)
    return CaptionScores(
        cider=cider,
        bleu4=float(bleu(candidates, human)[0][-1]),
        rouge_l=rouge_l(candidates, human)[0],
        n=len(references),
        cider_of=dict(zip(references, per_item.tolist(), strict=True)),
    )
