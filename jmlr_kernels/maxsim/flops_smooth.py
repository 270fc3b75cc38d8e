"""FLOPs of smooth MaxSim, for torch.utils.flop_counter: one multiply and one add per product term."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .flops import forward_flops as _similarity_flops


def forward_flops(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    candidates: bool,
    *_: Any,
) -> int:
    """2 * D per (query token, document token) pair, as for the hard maximum."""
    return _similarity_flops(queries, documents, query_mask, document_mask, query_weights, cu_seqlens, candidates)


def backward_flops(
    grad_scores: Tensor,
    queries: Tensor,
    documents: Tensor,
    maxima: Tensor,
    document_mask: Tensor | None,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    candidates: bool,
    *_: Any,
) -> int:
    """Three products of the forward's size: the similarities once more, d(queries) and d(documents)."""
    return 3 * _similarity_flops(queries, documents, None, document_mask, query_weights, cu_seqlens, candidates)
