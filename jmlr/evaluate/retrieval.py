"""Retrieval measures, one number per question, so that intervals and paired tests can be made from them.

Relevance is binary: a passage supports the question or it does not. A question without a known supporting passage
gets NaN. Definitions follow trec_eval (`recall_k`, `recip_rank`, `ndcg_cut_k`), `success_at_k` its `success_k`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray


def recall_at_k(
    rankings: Sequence[Sequence[str]], supporting: Sequence[Collection[str]], k: int
) -> NDArray[np.float64]:
    """Share of a question's supporting passages among its first `k`: [questions], in 0..1.

    Args:
        rankings: passage ids per question, best first, each id once. Shorter than `k` is allowed.
        supporting: ids of the passages that answer each question; with a single one, recall is 0 or 1.
        k: cut-off, at least 1.

    Raises:
        ValueError: `k` below 1, a different number of rankings and questions, an id ranked twice.
    """
    hits = _hits(rankings, supporting, k)
    return _per_question(
        [np.sum(row) / len(gold) if gold else np.nan for row, gold in zip(hits, supporting, strict=True)]
    )


def success_at_k(
    rankings: Sequence[Sequence[str]], supporting: Sequence[Collection[str]], k: int
) -> NDArray[np.float64]:
    """1 where any supporting passage is among the first `k`, else 0: [questions]. Arguments as in `recall_at_k`."""
    hits = _hits(rankings, supporting, k)
    return _per_question([float(np.any(row)) if gold else np.nan for row, gold in zip(hits, supporting, strict=True)])


def reciprocal_rank(
    rankings: Sequence[Sequence[str]], supporting: Sequence[Collection[str]], k: int | None = None
) -> NDArray[np.float64]:
    """1 / rank of the first supporting passage, 0 where none is ranked (within `k`): [questions]; its mean is MRR."""
    hits = _hits(rankings, supporting, k)
    first = [np.flatnonzero(row) for row in hits]
    return _per_question(
        [(1 / (1 + at[0]) if len(at) else 0.0) if gold else np.nan for at, gold in zip(first, supporting, strict=True)]
    )


def ndcg_at_k(rankings: Sequence[Sequence[str]], supporting: Sequence[Collection[str]], k: int) -> NDArray[np.float64]:
    """Normalised discounted cumulative gain of the first `k`, gains 0/1, discount log2(1 + rank): [questions]."""
    hits = _hits(rankings, supporting, k)
    values = []
    for row, gold in zip(hits, supporting, strict=True):
        discounts = 1 / np.log2(np.arange(2, 2 + max(len(row), min(k, len(gold)))))
        ideal = discounts[: min(k, len(gold))].sum()
        values.append((discounts[: len(row)] * row).sum() / ideal if gold else np.nan)
    return _per_question(values)


def _hits(
    rankings: Sequence[Sequence[str]], supporting: Sequence[Collection[str]], k: int | None
) -> list[NDArray[np.bool_]]:
    if k is not None and k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if len(rankings) != len(supporting):
        raise ValueError(
            f"{len(rankings)} rankings for {len(supporting)} questions: one ranking per question is needed"
        )
    hits = []
    for question, (ranking, gold) in enumerate(zip(rankings, supporting, strict=True)):
        if isinstance(ranking, str) or isinstance(gold, str):
            raise ValueError(f"question {question}: a list of passage ids is needed, got one string")
        if len(set(ranking)) != len(ranking):
            raise ValueError(f"question {question}: a passage is ranked twice; rank each passage once")
        gold = set(gold)
        hits.append(np.asarray([passage in gold for passage in ranking[:k]], dtype=bool))
    return hits


def _per_question(values: list[float]) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)
