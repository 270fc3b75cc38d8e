"""Intervals, paired tests and retrieval measures, against simulation, enumeration and arithmetic by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from jmlr.evaluate import (
    mcnemar,
    mean_interval,
    ndcg_at_k,
    paired_difference,
    recall_at_k,
    reciprocal_rank,
    success_at_k,
)


def clustered_answers(generator: np.random.Generator, clusters: int, mean: float) -> tuple[np.ndarray, list[int]]:
    """One to five wordings per condition; most conditions are known or unknown in all of their wordings."""
    ability = generator.beta(mean, 1 - mean, size=clusters)
    sizes = generator.integers(1, 6, size=clusters)
    members = np.repeat(np.arange(clusters), sizes)
    return generator.random(len(members)) < ability[members], members.tolist()


@pytest.mark.parametrize("mean", [0.5, 0.8])
def test_coverage_on_clustered_data(mean: float) -> None:
    generator = np.random.default_rng(7)
    trials, covered, covered_if_independent = 300, 0, 0
    for trial in range(trials):
        correct, clusters = clustered_answers(generator, 60, mean)
        interval = mean_interval(correct, clusters, resamples=500, seed=trial)
        covered += interval.low <= mean <= interval.high
        naive = mean_interval(correct, resamples=200, seed=trial)
        covered_if_independent += naive.low <= mean <= naive.high
    # 95 % aimed at; four standard errors of 300 trials are 5 %.
    assert 0.90 <= covered / trials <= 0.99
    assert covered_if_independent / trials < 0.88


def test_interval_agrees_with_the_normal_approximation_on_many_questions() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=2000)
    interval = mean_interval(values, resamples=4000)
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_interval_of_skewed_values_is_scipys_bca_interval() -> None:
    values = [0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.6, 1.0, 2.5, 6.0, 9.0]
    interval = mean_interval(values, resamples=40_000)
    # scipy.stats.bootstrap 1.17, method="BCa", 400,000 resamples; its percentile interval is 0.408 to 3.433.
    assert (interval.low, interval.high) == pytest.approx((0.575, 4.075), abs=0.06)


def test_copies_of_a_question_add_no_certainty() -> None:
    answers = np.random.default_rng(3).random(50) < 0.6
    alone = mean_interval(answers, list(range(50)), seed=1)
    copied = mean_interval(np.repeat(answers, 4), np.repeat(np.arange(50), 4).tolist(), seed=1)
    assert (copied.mean, copied.low, copied.high) == pytest.approx((alone.mean, alone.low, alone.high))


def test_higher_confidence_is_wider_and_the_seed_decides() -> None:
    values = np.random.default_rng(5).random(40)
    at_80, at_99 = mean_interval(values, confidence=0.8), mean_interval(values, confidence=0.99)
    assert at_99.low < at_80.low < values.mean() < at_80.high < at_99.high
    assert mean_interval(values, seed=4) == mean_interval(values, seed=4) != mean_interval(values, seed=5)


def test_large_question_sets_go_through_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(5).random(40)
    whole = paired_difference(values, values[::-1].copy() - 0.1)
    monkeypatch.setattr("jmlr.evaluate.statistics._CELLS_AT_ONCE", 40 * 7)
    pieces = paired_difference(values, values[::-1].copy() - 0.1)
    assert pieces.low == pytest.approx(whole.low) and pieces.high == pytest.approx(whole.high)
    assert pieces.p_value == pytest.approx(whole.p_value, abs=0.02)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("questions", [1, 20])
def test_all_right_or_all_wrong_is_not_certainty(right: bool, questions: int) -> None:
    interval = mean_interval([right] * questions)
    bound = 0.025 ** (1 / questions)  # n right in a row with probability 2.5 %
    expected = (1.0, bound, 1.0) if right else (0.0, 0.0, 1 - bound)
    assert (interval.mean, interval.low, interval.high) == pytest.approx(expected)


def test_one_cluster_has_a_mean_and_no_interval() -> None:
    interval = mean_interval([0.2, 0.4], ["x", "x"])
    assert interval.mean == pytest.approx(0.3) and math.isnan(interval.low) and math.isnan(interval.high)
    difference = paired_difference([0.2, 0.4], [0.1, 0.0], ["x", "x"])
    assert difference.mean == pytest.approx(0.25) and math.isnan(difference.low) and difference.p_value == 1.0


def test_no_difference_at_all() -> None:
    difference = paired_difference([True, False, True], [True, False, True])
    assert (difference.mean, difference.low, difference.high, difference.p_value) == (0, 0, 0, 1)


def test_permutation_p_values_are_uniform_under_the_null() -> None:
    generator = np.random.default_rng(11)
    p_values = []
    for trial in range(300):
        members = np.repeat(np.arange(30), 3)
        # The clusters' own differences are as likely to favour either system; the questions within follow them.
        lean = generator.normal(size=30)[members]
        a, b = lean + generator.normal(size=90), generator.normal(size=90)
        p_values.append(paired_difference(a, b, members.tolist(), resamples=1, permutations=199, seed=trial).p_value)
    for level in (0.05, 0.2, 0.5, 0.8):
        tolerance = 4 * math.sqrt(level * (1 - level) / 300)
        assert np.mean(np.asarray(p_values) <= level) == pytest.approx(level, abs=tolerance)


def test_few_clusters_are_enumerated_exactly() -> None:
    differences = np.asarray([0.5, 0.25, 1.0, 0.125, 0.75, -0.25])
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=6)]
    expected = np.mean(np.asarray(sums) >= differences.sum())
    assert paired_difference(differences, np.zeros(6)).p_value == pytest.approx(expected)


def test_drawn_permutations_approach_the_enumerated_ones() -> None:
    differences = np.random.default_rng(2).normal(0.4, 1.0, size=12)
    exact = paired_difference(differences, np.zeros(12), permutations=2**12).p_value
    drawn = paired_difference(differences, np.zeros(12), permutations=2**12 - 1).p_value
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 4095)) and drawn != exact


def test_a_real_difference_is_found_and_changes_sign_with_the_order() -> None:
    generator = np.random.default_rng(0)
    b, clusters = clustered_answers(generator, 80, 0.5)
    a = b | (generator.random(len(b)) < 0.4)
    gain, loss = paired_difference(a, b, clusters), paired_difference(b, a, clusters)
    assert gain.mean == pytest.approx(np.mean(a.astype(float) - b)) and gain.low > 0
    assert gain.p_value == 1 / 10_000
    assert loss.mean == pytest.approx(-gain.mean) and loss.high < 0


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (5, 5), (10, 2), (3, 17), (40, 61)])
def test_mcnemar_is_the_two_sided_binomial(only_a: int, only_b: int) -> None:
    a = [True] * only_a + [False] * only_b + [True, False]
    b = [False] * only_a + [True] * only_b + [True, False]
    result = mcnemar(a, b)
    trials = only_a + only_b
    pmf = [math.comb(trials, i) * 0.5**trials for i in range(trials + 1)]
    expected = sum(p for p in pmf if p <= pmf[only_a] * (1 + 1e-9))
    assert (result.only_a, result.only_b) == (only_a, only_b)
    assert result.p_value == pytest.approx(expected)


def test_mcnemar_known_values_and_thousands_of_questions() -> None:
    assert mcnemar([True] * 6, [False] * 6).p_value == pytest.approx(0.03125)
    assert mcnemar([True] * 10 + [False] * 2, [False] * 10 + [True] * 2).p_value == pytest.approx(0.03857421875)
    assert 0 <= mcnemar([True] * 2500 + [False] * 2000, [False] * 2500 + [True] * 2000).p_value < 1e-10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([]), "non-empty"),
        (lambda: mean_interval([0.5, math.nan]), r"values\[1\] is nan"),
        (lambda: mean_interval([[1.0]]), "one number per question"),
        (lambda: mean_interval([1, 0], ["a"]), "2 questions, 1 labels"),
        (lambda: mean_interval([1, 0], confidence=95), "0.95 for 95 %"),
        (lambda: mean_interval([1, 0], resamples=0), "at least 1"),
        (lambda: paired_difference([1, 0], [1]), "a has 2, b has 1"),
        (lambda: mcnemar([True], []), "a has 1, b has 0"),
        (lambda: recall_at_k([["a"]], [{"a"}], 0), "at least 1"),
        (lambda: recall_at_k([["a"]], [], 1), "1 rankings for 0 questions"),
        (lambda: recall_at_k([["a", "a"]], [{"a"}], 1), "question 0: a passage is ranked twice"),
        (lambda: recall_at_k([["a"]], ["a"], 1), "got one string"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


RANKINGS = [["a", "b", "c", "d"], ["d", "c", "b", "a"], ["x", "y"], [], ["a", "b"]]
SUPPORTING = [{"a"}, ["a", "c"], {"a", "b", "c"}, {"a"}, set()]


def test_retrieval_measures_by_hand() -> None:
    nan = math.nan
    log = math.log2
    expected = {
        "recall@1": (recall_at_k(RANKINGS, SUPPORTING, 1), [1, 0, 0, 0, nan]),
        "recall@2": (recall_at_k(RANKINGS, SUPPORTING, 2), [1, 0.5, 0, 0, nan]),
        "recall@7": (recall_at_k(RANKINGS, SUPPORTING, 7), [1, 1, 0, 0, nan]),
        "success@2": (success_at_k(RANKINGS, SUPPORTING, 2), [1, 1, 0, 0, nan]),
        "reciprocal rank": (reciprocal_rank(RANKINGS, SUPPORTING), [1, 0.5, 0, 0, nan]),
        "reciprocal rank, first only": (reciprocal_rank(RANKINGS, SUPPORTING, 1), [1, 0, 0, 0, nan]),
        "ndcg@4": (
            ndcg_at_k(RANKINGS, SUPPORTING, 4),
            [1, (1 / log(3) + 1 / log(5)) / (1 + 1 / log(3)), 0, 0, nan],
        ),
        "ndcg@2": (ndcg_at_k(RANKINGS, SUPPORTING, 2), [1, (1 / log(3)) / (1 + 1 / log(3)), 0, 0, nan]),
    }
    for name, (computed, by_hand) in expected.items():
        np.testing.assert_allclose(computed, by_hand, err_msg=name)


def test_a_perfect_ranking_scores_one_and_a_worse_one_less() -> None:
    supporting = [{"a", "b", "c"}]
    assert ndcg_at_k([["c", "a", "b", "x"]], supporting, 4)[0] == pytest.approx(1)
    assert ndcg_at_k([["c", "a", "b"]], supporting, 2)[0] == pytest.approx(1)
    assert ndcg_at_k([["c", "a", "x", "b"]], supporting, 4)[0] < 1
