"""Intervals cover as often as they say, only with clusters; paired tests see small differences."""

import math

import numpy as np
import pytest

from vadapter.errors import DataError
from vadapter.metrics.bootstrap import RESAMPLES, Sample, average, interval, intervals, paired
from vadapter.metrics.captioning import bleu, bleu4_of, score_captions


def of(scores, clusters=None, items=None):
    """Return a sample of means; by default each item is a cluster of its own."""
    names = range(len(scores))
    return Sample.of_means(items or names, names if clusters is None else clusters, scores)


def width(ends):
    return ends[1] - ends[0]


# -- Intervals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [300, 5000])
def test_the_interval_of_many_items_is_the_normal_one(n):
    scores = np.random.default_rng(n).gamma(2.0, size=n)
    error = scores.std() / math.sqrt(n)
    low, high = interval(of(scores))
    # An end has a standard deviation of 0.027 standard errors over the draws.
    assert low == pytest.approx(scores.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(scores.mean() + 1.96 * error, abs=0.2 * error)


def test_the_interval_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    scores = np.random.default_rng(0).exponential(size=60)  # skewed: not the normal interval
    theirs = stats.bootstrap(
        (scores,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=1
    ).confidence_interval
    error = scores.std() / math.sqrt(len(scores))
    assert interval(of(scores)) == pytest.approx((theirs.low, theirs.high), abs=0.15 * error)


def test_intervals_over_clusters_cover_the_truth_and_those_over_items_do_not():
    rng = np.random.default_rng(7)
    covered, covered_by_items, trials, sizes = 0, 0, 200, np.arange(80) % 5 + 1
    clusters = np.repeat(np.arange(len(sizes)), sizes)
    for _ in range(trials):
        # Items of one cluster have most of their score in common; the true mean is 0.
        scores = rng.normal(size=len(sizes))[clusters] + 0.3 * rng.normal(size=len(clusters))
        low, high = interval(of(scores, clusters))
        covered += low <= 0 <= high
        low, high = interval(of(scores))
        covered_by_items += low <= 0 <= high
    # 95 % of 200 trials has a standard deviation of 1.5 %.
    assert 0.90 <= covered / trials <= 0.985
    assert covered_by_items / trials < 0.85


def test_a_mean_over_clusters_is_the_mean_over_their_items():
    sample = of([1.0, 0.0, 0.0, 0.0], ["a", "b", "b", "b"])
    assert sample.value == 0.25
    low, high = interval(sample)
    assert (low, high) == (0.0, 1.0)  # one of four draws has only a, one only b


def test_a_cluster_whose_items_are_apart_counts_as_one():
    rng = np.random.default_rng(3)
    scores, clusters = rng.random(60), np.arange(60) // 3
    shuffled = rng.permutation(60)
    # The order of the clusters differs, and with it the draws.
    ends = interval(of(scores[shuffled], clusters[shuffled]))
    assert ends == pytest.approx(interval(of(scores, clusters)), abs=0.01)
    assert width(ends) != pytest.approx(width(interval(of(scores))), rel=0.02)


def test_intervals_are_the_same_every_time_and_alone_or_together():
    rng = np.random.default_rng(0)
    samples = {str(n): of(rng.random(n)) for n in (2, 50, 50, 3000)}
    samples["more"] = of(rng.random(50))
    together = intervals(samples)
    assert together == intervals(samples)
    for name, sample in samples.items():
        assert together[name] == pytest.approx(interval(sample), abs=1e-12)


def test_equal_scores_have_an_interval_without_width():
    assert interval(of([0.3] * 40)) == pytest.approx((0.3, 0.3), abs=1e-12)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_one_cluster_or_none_has_no_interval(count):
    sample = of([0.5] * count, ["image"] * count)
    assert interval(sample) is None
    assert intervals({"few": sample, "many": of([0.0, 1.0])}).keys() == {"many"}
    assert paired(sample, sample)[1:] == (None, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused_by_name(bad):
    with pytest.raises(DataError, match=r"item 'b' is not a finite number \(the first of 1 "):
        of([0.5, bad, 0.5], items=["a", "b", "c"])
    with pytest.raises(DataError, match="3 items, 2 clusters and 3 scores"):
        of([0.5, 0.5, 0.5], ["x", "y"])


# -- BLEU, which is not a mean -----------------------------------------------------------------


def corpus(seed, count=40):
    """Return predictions and two references each, of few words so that n-grams agree."""
    rng = np.random.default_rng(seed)
    caption = lambda: " ".join(rng.choice(["a", "dog", "runs", "on", "grass"], rng.integers(4, 9)))  # noqa: E731
    references = {i: [caption(), caption()] for i in range(count)}
    return {i: caption() for i in range(count)}, references


def bleu4_sample(scores):
    names = range(scores.n)
    return Sample(names, names, counts_of(scores), bleu4_of)


def counts_of(scores):
    return np.array(list(scores.bleu_counts_of.values()))


def test_bleu_from_the_sums_of_some_items_is_that_of_these_items():
    predictions, references = corpus(0)
    scores = score_captions(predictions, references)
    assert bleu4_sample(scores).value == scores.bleu4
    rng = np.random.default_rng(1)
    for _ in range(5):
        drawn = rng.integers(0, scores.n, scores.n)
        expected, _ = bleu(
            [predictions[i].split() for i in drawn],
            [[r.split() for r in references[i]] for i in drawn],
        )
        assert bleu4_of(counts_of(scores)[drawn].sum(0)) == pytest.approx(expected[3], abs=1e-12)


def test_the_interval_of_bleu_holds_the_corpus_score_and_not_the_mean_over_items():
    scores = score_captions(*corpus(2, 150))
    low, high = interval(bleu4_sample(scores))
    assert low < scores.bleu4 < high
    assert bleu4_of(counts_of(scores)).mean() < low


# -- Pairs -------------------------------------------------------------------------------------


def test_pairs_reveal_a_difference_that_two_intervals_hide():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=400)  # how hard each item is, for both systems
    first, second = (of(hard + shift + 0.1 * rng.normal(size=400)) for shift in (0.03, 0.0))
    apart = interval(first), interval(second)
    assert apart[0][0] < apart[1][1]  # they overlap
    found = paired(first, second)
    assert found.value == pytest.approx(first.value - second.value)
    assert 0 < found.interval[0] < found.value < found.interval[1]
    assert width(found.interval) < width(apart[0]) / 5
    assert found.p < 0.001


def test_the_p_value_is_that_of_the_normal_test():
    rng = np.random.default_rng(4)
    for shift in (0.02, 0.06, 0.1):
        difference = rng.normal(shift, 1.0, 800)
        expected = math.erfc(abs(difference.mean()) / (difference.std() / 800**0.5) / 2**0.5)
        base = rng.normal(size=800)
        found = paired(of(base + difference), of(base))
        assert found.p == pytest.approx(expected, abs=0.02)
        reverse = paired(of(base), of(base + difference))
        assert reverse.p == pytest.approx(found.p)
        assert reverse.interval == pytest.approx([-end for end in reversed(found.interval)])


def test_p_is_below_5_percent_where_the_interval_excludes_zero():
    rng = np.random.default_rng(5)
    seen = set()
    for _ in range(30):
        clusters = np.arange(90) // 3
        base, other = rng.random(90), rng.random(90)
        found = paired(of(base, clusters), of(other + 0.1, clusters))
        seen.add(excluded := not found.interval[0] <= 0 <= found.interval[1])
        assert (found.p < 0.05) == excluded
    assert seen == {True, False}


def test_clusters_make_a_difference_less_certain():
    rng = np.random.default_rng(6)
    clusters = np.arange(300) // 10
    difference = 0.3 + rng.normal(size=30)[clusters]
    scores = rng.random(300)
    alone = paired(of(scores + difference), of(scores))
    together = paired(of(scores + difference, clusters), of(scores, clusters))
    assert together.value == alone.value
    assert width(together.interval) > 2 * width(alone.interval)
    assert together.p > 5 * alone.p


def test_equal_systems_differ_by_nothing_with_p_1():
    rng = np.random.default_rng(8)
    scores = rng.random(200)
    assert paired(of(scores), of(scores.copy())) == (0.0, (0.0, 0.0), 1.0)
    bleus = bleu4_sample(score_captions(*corpus(3)))
    assert paired(bleus, bleus) == (0.0, (0.0, 0.0), 1.0)


def test_a_difference_on_every_item_has_the_smallest_p_and_never_0():
    scores = np.random.default_rng(9).random(30)
    assert paired(of(scores + 1), of(scores)).p == 2 / (RESAMPLES + 1)


def test_items_in_another_order_are_the_same_items():
    rng = np.random.default_rng(10)
    first, second, order = rng.random(50), rng.random(50), rng.permutation(50)
    moved = of(second[order], order.tolist(), order.tolist())
    assert paired(of(first), moved) == paired(of(first), of(second))


def test_different_items_are_refused_and_named():
    whole = of([0.0] * 6, items=list("abcdef"))
    with pytest.raises(DataError, match=r"3 \(first: 'd', 'e', 'f'\) only in the first, none only"):
        paired(whole, of([0.0] * 3, items=list("abc")))
    with pytest.raises(DataError, match=r"1 \(first: 'f'\) only .*, 1 \(first: 'x'\) only"):
        paired(whole, of([0.0] * 6, items=list("abcdex")))
    with pytest.raises(DataError, match="the second evaluation has several items named 'a'"):
        paired(whole, of([0.0] * 6, items=list("aacdef")))
    with pytest.raises(DataError, match="different items"):  # of other images
        paired(whole, of([0.0] * 6, clusters=[1] * 6, items=list("abcdef")))
    with pytest.raises(DataError, match="different kinds"):
        paired(bleu4_sample(score_captions(*corpus(4))), of([0.0] * 40))


def test_the_average_of_seeds_is_the_mean_of_their_scores_on_the_same_items():
    rng = np.random.default_rng(11)
    runs, order = [rng.random(30) for _ in range(3)], rng.permutation(30)
    moved = of(runs[2][order], order.tolist(), order.tolist())
    both = average([of(runs[0]), of(runs[1]), moved])
    assert both.value == pytest.approx(np.mean(runs))
    assert paired(both, of(np.mean(runs, axis=0))).value == pytest.approx(0, abs=1e-12)
    with pytest.raises(DataError, match="only in the first"):
        average([of(runs[0]), of(runs[1][:20])])
