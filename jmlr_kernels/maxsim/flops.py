"""FLOPs of MaxSim, for torch.utils.flop_counter: what is computed, one multiply and one add per product term."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .layout import layout_of


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
    """2 * D per (query token, document token) pair; packed documents have no padding, so none is counted."""
    sizes = layout_of(queries, documents, cu_seqlens, candidates)
    tokens = documents.numel() // max(sizes.dimension, 1)
    queries_per_document = 1 if candidates else sizes.query_count
    return 2 * sizes.dimension * queries_per_document * sizes.query_length * tokens


def backward_flops(rule_tensors: list[Tensor], queries: Tensor, documents: Tensor, winners: Tensor, *_: Any) -> int:
    """2 * D per (query token, document) for each of the two gradients: a winner sends one row each way."""
    return 2 * 2 * queries.shape[-1] * winners.numel()
