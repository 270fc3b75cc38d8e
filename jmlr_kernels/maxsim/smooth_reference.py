"""The definition of smooth MaxSim in plain PyTorch: what every backend must reproduce. Readable, not fast.

    score(q, d) = sum_i w_i * t * log sum_j exp(<q_i, d_j> / t)

over kept query tokens i and kept document tokens j, t being the temperature. Everything is computed in the inputs' own
dtype; pass float64 for an oracle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import _split


def smooth_pair_score(
    query: Tensor,
    document: Tensor,
    temperature: float,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    query_weights: Tensor | None = None,
) -> Tensor:
    """Score (a scalar) of one query [Lq, D] against one document [Ld, D]."""
    if document_mask is not None:
        document = document[document_mask]
    if query_mask is not None:
        query = query[query_mask]
        query_weights = None if query_weights is None else query_weights[query_mask]
    if document.shape[0] == 0 or query.shape[0] == 0:
        # Zero, and still a function of every argument.
        zero = query[:0].sum() + document[:0].sum()
        return zero if query_weights is None else zero + query_weights[:0].sum()
    maxima = temperature * torch.logsumexp(query @ document.T / temperature, dim=-1)
    return maxima.sum() if query_weights is None else (maxima * query_weights).sum()


def maxsim_smooth_reference(
    queries: Tensor,
    documents: Tensor,
    *,
    temperature: float,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    query_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    candidates: bool = False,
) -> Tensor:
    """Scores [Nq, N] of :func:`jmlr_kernels.maxsim_smooth` in the inputs' dtype, pair by pair; shapes are its own."""
    query_count = queries.shape[0]
    texts, masks = _split(documents, document_mask, cu_seqlens, candidates)
    per_query = len(texts) // query_count if candidates and query_count else len(texts)
    scores = [
        smooth_pair_score(
            queries[i],
            texts[i * per_query + j if candidates else j],
            temperature,
            None if query_mask is None else query_mask[i],
            masks[i * per_query + j if candidates else j],
            None if query_weights is None else query_weights[i].to(queries.dtype),
        )
        for i in range(query_count)
        for j in range(per_query)
    ]
    shape = (query_count, per_query)
    return torch.stack(scores).view(shape) if scores else queries.new_zeros(shape)
