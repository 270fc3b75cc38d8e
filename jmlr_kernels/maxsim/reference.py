"""The definition of MaxSim in plain PyTorch: what every backend must reproduce. Readable, differentiable, slow.

    score(q, d) = sum_i w_i * max_j <q_i, d_j>        i over kept query tokens, j over kept document tokens

Late interaction after ColBERT (Khattab and Zaharia, SIGIR 2020). Everything is computed in the inputs' own dtype;
pass float64 for an oracle.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pair_score(
    query: Tensor,
    document: Tensor,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    query_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Score of one query [Lq, D] against one document [Ld, D].

    Returns the score (scalar) and, per query token, the position in the document of the token that won (int32 [Lq],
    -1 where there is none: an excluded query token, or a document without kept tokens).
    """
    positions = torch.arange(document.shape[0], device=document.device)
    if document_mask is not None:
        positions = positions[document_mask]
    nothing = torch.full((query.shape[0],), -1, dtype=torch.int32, device=query.device)
    if positions.numel() == 0 or query.shape[0] == 0:
        # Zero, and still a function of every argument.
        zero = query[:0].sum() + document[:0].sum()
        return zero if query_weights is None else zero + query_weights[:0].sum(), nothing
    # max over one dimension returns the lowest of equal indices, and NaN if there is one.
    best, index = (query @ document[positions].T).max(dim=-1)
    winners = positions[index].to(torch.int32)
    if query_weights is not None:
        best = best * query_weights
    if query_mask is not None:
        best, winners = best[query_mask], torch.where(query_mask, winners, nothing)
    return best.sum(), winners


def maxsim_reference(
    queries: Tensor,
    documents: Tensor,
    *,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    query_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalize: bool = False,
    candidates: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scores and winners of :func:`jmlr_kernels.maxsim` (or, with `candidates`, of `maxsim_candidates`), pair by pair.

    Shapes are those of the public functions. Returns scores [Nq, N] in the inputs' dtype and winners int32
    [Nq, N, Lq], N being the number of documents per query.
    """
    if normalize:
        queries = queries / queries.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        documents = documents / documents.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    query_count = queries.shape[0]
    texts, masks = _split(documents, document_mask, cu_seqlens, candidates)
    per_query = len(texts) // query_count if candidates and query_count else len(texts)
    scores, winners = [], []
    for i in range(query_count):
        for j in range(per_query):
            flat = i * per_query + j if candidates else j
            score, winner = pair_score(
                queries[i],
                texts[flat],
                None if query_mask is None else query_mask[i],
                masks[flat],
                None if query_weights is None else query_weights[i].to(queries.dtype),
            )
            scores.append(score)
            winners.append(winner)
    shape = (query_count, per_query)
    if not scores:
        return queries.new_zeros(shape), queries.new_zeros((*shape, queries.shape[1]), dtype=torch.int32)
    return torch.stack(scores).view(shape), torch.stack(winners).view(*shape, queries.shape[1])


def _split(
    documents: Tensor, document_mask: Tensor | None, cu_seqlens: Tensor | None, candidates: bool
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Documents and their masks as lists of [length, D] and [length]."""
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
        spans = list(zip(offsets, offsets[1:], strict=False))
        masks = [None if document_mask is None else document_mask[start:end] for start, end in spans]
        return [documents[start:end] for start, end in spans], masks
    if candidates:
        documents = documents.flatten(0, 1)
        document_mask = None if document_mask is None else document_mask.flatten(0, 1)
    texts = list(documents.unbind(0))
    return texts, [None] * len(texts) if document_mask is None else list(document_mask.unbind(0))
