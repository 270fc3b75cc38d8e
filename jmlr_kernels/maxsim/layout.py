"""The sizes that every MaxSim backend derives from its arguments, in one place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Sizes of one MaxSim problem.

    `documents_per_query` is Nd when every query meets every document, K for candidates; `document_length` is None
    for packed documents, whose lengths only `cu_seqlens` holds.
    """

    query_count: int
    query_length: int
    dimension: int
    documents_per_query: int
    document_length: int | None
    candidates: bool

    @property
    def document_count(self) -> int:
        """Documents in memory: Nd, or Nq * K."""
        return self.documents_per_query * (self.query_count if self.candidates else 1)

    @property
    def winners_shape(self) -> tuple[int, int, int]:
        return (self.query_count, self.documents_per_query, self.query_length)


def layout_of(queries: Tensor, documents: Tensor, cu_seqlens: Tensor | None, candidates: bool) -> Layout:
    """Sizes from checked arguments: queries [Nq, Lq, D]; documents [Nd, Ld, D], [Nq, K, Ld, D] or packed [T, D]."""
    query_count, query_length, dimension = queries.shape
    if cu_seqlens is None:
        per_query, length = documents.shape[-3], documents.shape[-2]
    else:
        per_query, length = cu_seqlens.shape[0] - 1, None
        if candidates:
            per_query = per_query // query_count if query_count else 0
    return Layout(query_count, query_length, dimension, per_query, length, candidates)


def score_dtype(queries: Tensor) -> torch.dtype:
    """Scores are float32 whatever the inputs; float64 inputs keep float64, so that gradcheck can see through."""
    return torch.float64 if queries.dtype == torch.float64 else torch.float32
