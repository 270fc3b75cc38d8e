"""Intervals and paired tests for accuracies and other per-question measures.

Several wordings of one question, or several questions on one condition, are not independent: a system that knows the
condition gets all of them right. Every function therefore takes `clusters`, one label per question, and treats the
cluster as the unit that was sampled. Intervals are BCa bootstrap intervals (Efron 1987, "Better bootstrap confidence
intervals"; Davison and Hinkley 1997, chapters 3.8 and 5.3) of the mean over questions, clusters drawn with
replacement. In simulations at an accuracy of 0.9, with one to five wordings each of 60 or 142 conditions, plain
percentile intervals cover 93 % and BCa intervals 94 to 95 %. p-values come from flipping the sign of whole clusters'
differences (Fisher's randomisation test).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

_NORMAL = NormalDist()
_CELLS_AT_ONCE = 4_000_000  # of a [resamples, clusters] matrix: 32 MB in float64


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its confidence interval. `low` and `high` are NaN where the data allow none (see `mean_interval`)."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean of `a - b` over questions, its confidence interval, and the two-sided p-value of "no difference"."""

    mean: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True, slots=True)
class McNemar:
    """Counts of the questions that only one of two systems got right, and the exact two-sided p-value."""

    only_a: int
    only_b: int
    p_value: float


def mean_interval(
    values: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """BCa cluster-bootstrap interval of the mean of `values`.

    Args:
        values: [questions], bool or float; 0/1 for accuracy. No NaN.
        clusters: [questions] labels of what was sampled (a condition, a source question); None: every question alone.
        confidence: coverage aimed at, between 0 and 1.
        resamples: bootstrap draws.
        seed: of the draws; the same input gives the same interval.

    Returns:
        Interval in the unit of `values`. A bootstrap sees no spread when all values are 0 or all are 1; they are taken
        for a proportion, and the missing bound is Clopper and Pearson's exact one with clusters as the trials. Other
        constant values give an interval of zero width, and a single cluster gives NaN bounds.

    Raises:
        ValueError: nothing to average, NaN among the values, lengths that differ, confidence outside (0, 1).
    """
    values = _vector(values, "values")
    _check_settings(confidence, resamples)
    sums, counts = _cluster_sums(values, clusters)
    mean = float(values.mean())
    if np.all(values == values[0]) and values[0] in (0.0, 1.0):
        bound = ((1 - confidence) / 2) ** (1 / len(sums))
        return Interval(mean, bound, 1.0) if mean == 1.0 else Interval(mean, 0.0, 1 - bound)
    low, high = _bca(sums, counts, confidence, resamples, seed)
    return Interval(mean, low, high)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    permutations: int = 9999,
    seed: int = 0,
) -> PairedDifference:
    """How much better `a` is than `b` on the same questions: BCa cluster-bootstrap interval and a permutation test.

    The test swaps the two systems within a cluster, all of its questions together, which leaves the clusters'
    dependence intact. All 2**clusters swaps are enumerated where they are no more than `permutations`; otherwise that
    many are drawn and the observed one is counted among them, so that p is never 0 (Phipson and Smyth 2010).

    Args:
        a, b: [questions] values of the two systems, same order, no NaN.
        clusters, confidence, resamples, seed: as in `mean_interval`.
        permutations: random sign flips, hence the smallest p-value, 1 / (permutations + 1).

    Returns:
        PairedDifference in the unit of the values. Its interval has NaN bounds for a single cluster and zero width
        when every cluster differs by the same amount.

    Raises:
        ValueError: as in `mean_interval`, and when `a` and `b` differ in length.
    """
    a, b = _vector(a, "a"), _vector(b, "b")
    if len(a) != len(b):
        raise ValueError(f"a paired difference needs the same questions on both sides: a has {len(a)}, b has {len(b)}")
    _check_settings(confidence, resamples)
    sums, counts = _cluster_sums(a - b, clusters)
    low, high = _bca(sums, counts, confidence, resamples, seed)
    p_value = _sign_flip_p_value(sums, permutations, seed + 1)
    return PairedDifference(float((a - b).mean()), low, high, p_value)


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> McNemar:
    """Exact McNemar test of two systems' right and wrong answers to the same questions.

    Under "no difference" each question that exactly one system got right is a fair coin. The questions count as
    independent: with several wordings per question the p-value is too small, and `paired_difference` is the one to
    trust.

    Raises:
        ValueError: when the lists differ in length.
    """
    if len(a) != len(b):
        raise ValueError(f"McNemar's test needs the same questions on both sides: a has {len(a)}, b has {len(b)}")
    only_a = sum(1 for x, y in zip(a, b, strict=True) if x and not y)
    only_b = sum(1 for x, y in zip(a, b, strict=True) if y and not x)
    return McNemar(only_a, only_b, _two_sided_fair_coin(min(only_a, only_b), only_a + only_b))


def _two_sided_fair_coin(fewer: int, trials: int) -> float:
    if 2 * fewer == trials:
        return 1.0
    # Integers until the last division: 2**trials overflows a float from 1024 discordant questions on.
    tail = sum(math.comb(trials, i) for i in range(fewer + 1))
    return min(1.0, (2 * tail) / (1 << trials))


def _bca(
    sums: NDArray[np.float64], counts: NDArray[np.float64], confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    clusters = len(sums)
    if clusters == 1:
        return math.nan, math.nan
    mean = sums.sum() / counts.sum()
    draws = _bootstrap_means(sums, counts, resamples, seed)
    # Rounding must not turn draws that equal the observed mean into draws below it.
    tolerance = 1e-12 * max(1.0, float(np.abs(sums).max()))
    below = np.count_nonzero(draws < mean - tolerance) + 0.5 * np.count_nonzero(np.abs(draws - mean) <= tolerance)
    share = min(max(below / resamples, 0.5 / resamples), 1 - 0.5 / resamples)
    bias = _NORMAL.inv_cdf(share)
    left_out = (sums.sum() - sums) / (counts.sum() - counts)
    spread = left_out.mean() - left_out
    variance = float((spread**2).sum())
    acceleration = float((spread**3).sum()) / (6 * variance**1.5) if variance > 0 else 0.0

    def level(normal_quantile: float) -> float:
        shifted = bias + normal_quantile
        return _NORMAL.cdf(bias + shifted / max(1 - acceleration * shifted, 1e-6))

    tail = _NORMAL.inv_cdf((1 + confidence) / 2)
    low, high = np.quantile(draws, [level(-tail), level(tail)])
    return float(low), float(high)


def _bootstrap_means(
    sums: NDArray[np.float64], counts: NDArray[np.float64], resamples: int, seed: int
) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    clusters = len(sums)
    rows = max(1, _CELLS_AT_ONCE // clusters)
    means = []
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        times_drawn = generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=size).astype(np.float64)
        means.append((times_drawn @ sums) / (times_drawn @ counts))
    return np.concatenate(means)


def _sign_flip_p_value(sums: NDArray[np.float64], permutations: int, seed: int) -> float:
    # Clusters without a difference contribute nothing under either sign.
    sums = sums[sums != 0]
    observed = abs(float(sums.sum())) - 1e-12 * float(np.abs(sums).sum())
    clusters = len(sums)
    if clusters == 0:
        return 1.0
    if clusters < 63 and 2**clusters <= permutations:
        bits = np.arange(2**clusters)[:, None] >> np.arange(clusters)[None, :] & 1
        return float(np.mean(np.abs((2.0 * bits - 1) @ sums) >= observed))
    generator = np.random.default_rng(seed)
    rows = max(1, _CELLS_AT_ONCE // clusters)
    as_extreme = 0
    for start in range(0, permutations, rows):
        size = min(rows, permutations - start)
        signs = 2.0 * generator.integers(0, 2, size=(size, clusters), dtype=np.int8) - 1
        as_extreme += int(np.count_nonzero(np.abs(signs @ sums) >= observed))
    return (as_extreme + 1) / (permutations + 1)


def _vector(values: ArrayLike, name: str) -> NDArray[np.float64]:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or len(vector) == 0:
        raise ValueError(f"{name} must be a non-empty list with one number per question, got shape {vector.shape}")
    missing = np.flatnonzero(~np.isfinite(vector))
    if len(missing):
        raise ValueError(f"{name}[{missing[0]}] is {vector[missing[0]]}: leave questions without a measure out")
    return vector


def _cluster_sums(
    values: NDArray[np.float64], clusters: Sequence[Hashable] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if clusters is None:
        return values, np.ones_like(values)
    if len(clusters) != len(values):
        raise ValueError(f"one cluster label per question is needed: {len(values)} questions, {len(clusters)} labels")
    positions: dict[Hashable, int] = {}
    members = np.asarray([positions.setdefault(label, len(positions)) for label in clusters])
    sums = np.bincount(members, weights=values).astype(np.float64)
    return sums, np.bincount(members).astype(np.float64)


def _check_settings(confidence: float, resamples: int) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1 (0.95 for 95 %), got {confidence}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
