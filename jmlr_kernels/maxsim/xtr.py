"""XTR scoring: only the document tokens that a query token would retrieve from the whole batch count.

After "Rethinking the Role of Token Retrieval in Multi-Vector Retrieval" (Lee et al., NeurIPS 2023, arXiv 2304.01982).
Two passes: which documents each query token retrieves (no gradient, streamed in chunks), then the maxima of MaxSim with
their gradients. No similarity of all tokens with all tokens is stored. Why the two passes cannot disagree:
docs/maxsim-smooth-and-xtr.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit_length

from .arguments import autocast, check, from_jagged
from .function import maxsim_tokens
from .layout import score_dtype

# Similarities held at once, in elements: 64 MiB in float32.
_CHUNK_ELEMENTS = 2**24
# Document tokens in a chunk, at least: a merge into the k best of each row costs as much as a few times k similarities.
_CHUNK_TOKENS = 2**12

NORMALIZERS = ("retrieved", "positive")
# What PyLate divides by when no maximum is positive.
_LEAST_POSITIVE = 1e-3


def xtr_scores(
    queries: Tensor,
    documents: Tensor,
    k: int,
    *,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    query_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalize: bool = False,
    normalizer: str = "retrieved",
    backend: str = "auto",
) -> Tensor:
    """XTR's training score of every query against every document (in-batch token retrieval, Lee et al. 2023).

    A query token retrieves the k document tokens of the whole batch that are most similar to it; tokens as similar as
    the k-th are retrieved too, so that the result does not depend on the documents' order.
    ``score(q, d) = 1 / Z * sum_i w_i * max_j <q_i, d_j>`` over the query tokens i that retrieved at least one token of
    d, the maximum over its retrieved tokens j; Z is how many such query tokens there are. A document of which nothing
    was retrieved scores 0. With k at least the number of document tokens this is :func:`maxsim` over the number of
    kept query tokens. Gradients flow through the maxima that count; which ones do is taken as given.

    Args:
        queries: [Nq, Lq, D], float16, bfloat16, float32 or float64.
        documents: [Nd, Ld, D] of the same dtype, all documents of the batch; packed [T, D] with `cu_seqlens`; or a
            jagged nested tensor.
        k: how many document tokens each query token retrieves.
        query_mask: bool [Nq, Lq], True counts.
        document_mask: bool [Nd, Ld], or [T] for packed documents; excluded tokens are never retrieved.
        query_weights: floating [Nq, Lq], factors of the maxima; Z stays a number of tokens.
        cu_seqlens: int32 [Nd + 1], token offsets of packed documents.
        normalize: scale every token of both sides to unit length first; gradients pass through it.
        normalizer: what Z counts. "retrieved": the paper's, as in sentence-transformers 6.2. "positive": as in PyLate
            1.6 and PrimeQA, where a token that was not retrieved counts as a similarity of 0: negative maxima count 0,
            and Z is the number of positive ones, at least 0.001.
        backend: as in :func:`maxsim`; it computes the maxima and gradients. What is retrieved is found in PyTorch.

    Returns:
        Scores [Nq, Nd], float32 (float64 for float64 inputs).

    Memory beyond inputs and result: a few float32 tensors [Nq, Nd, Lq], and one chunk of similarities.

    Raises:
        ValueError: k, a shape or an option does not fit.
        TypeError: a dtype does not fit.
        RuntimeError: the forced backend cannot run here.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k={k!r} must be a positive integer: the tokens that each query token retrieves")
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer={normalizer!r}: choose one of {', '.join(NORMALIZERS)}")
    if documents.is_nested:
        documents, cu_seqlens, _ = from_jagged(documents, cu_seqlens, False)
    check(queries, documents, query_mask, document_mask, query_weights, cu_seqlens, False)
    if normalize:
        queries, documents = _unit(queries), _unit(documents)
    queries, documents = autocast(queries), autocast(documents)
    device = queries.device.type  # autocast has had its say: the search must not round its products again
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        retrieved = retrieved_documents(queries, documents, k, document_mask, cu_seqlens)
    if query_mask is not None:
        retrieved = retrieved & query_mask[:, None, :]
    maxima = maxsim_tokens(
        queries,
        documents,
        query_mask=query_mask,
        document_mask=document_mask,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    if normalizer == "positive":
        maxima = maxima.clamp_min(0)
        found = (retrieved & (maxima.detach() > 0)).sum(-1).to(maxima.dtype).clamp_min(_LEAST_POSITIVE)
    else:
        found = retrieved.sum(-1).to(maxima.dtype).clamp_min(1)
    if query_weights is not None:
        maxima = maxima * query_weights.to(maxima.dtype)[:, None, :]
    # Selected, not multiplied by zero: what was not retrieved may be infinite or NaN.
    return maxima.masked_fill(~retrieved, 0).sum(-1) / found


@torch.no_grad()
def retrieved_documents(
    queries: Tensor, documents: Tensor, k: int, document_mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Whether query token i is among those that retrieve a token of document d: bool [Nq, Nd, Lq].

    The threshold (the k-th largest similarity of a query token) and each document's largest similarity are taken from
    the same products, so that comparing them is exact: the token at the threshold is never lost to rounding. NaN is
    the largest of all, as in `torch.topk`, and so is always retrieved.
    """
    query_count, query_length, dimension = queries.shape
    dtype = score_dtype(queries)
    rows = queries.reshape(-1, dimension)
    tokens = documents.reshape(-1, dimension)
    kept = None if document_mask is None else document_mask.reshape(-1)
    owner, count = _owner_of_token(documents, cu_seqlens)
    has_token = torch.zeros(count, dtype=torch.int32, device=tokens.device)
    has_token.index_add_(0, owner, torch.ones_like(owner, dtype=torch.int32) if kept is None else kept.to(torch.int32))
    result = torch.zeros((rows.shape[0], count), dtype=torch.bool, device=rows.device)
    if tokens.shape[0] <= k:
        result[:] = True
    else:
        for part, starts in _chunks(rows.shape[0], tokens.shape[0], k):
            highest = torch.full((part.stop - part.start, count), -torch.inf, dtype=dtype, device=rows.device)
            best = highest.new_empty((highest.shape[0], 0))
            for chunk in starts:
                similarity = rows[part].to(dtype) @ tokens[chunk].to(dtype).T
                if kept is not None:
                    similarity.masked_fill_(~kept[chunk], -torch.inf)
                highest.scatter_reduce_(1, owner[chunk].expand_as(similarity), similarity, "amax")
                best = _largest(torch.cat((best, _largest(similarity, k)), 1), k)
            result[part] = (highest >= best[:, -1:]) | highest.isnan()
    result &= has_token > 0
    return result.view(query_count, query_length, count).transpose(1, 2)


def _largest(values: Tensor, k: int) -> Tensor:
    """The k largest of each row, or all of them, descending; NaN first."""
    return values.topk(min(k, values.shape[1]), dim=1, sorted=True).values


def _owner_of_token(documents: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, int]:
    """The document of each token in the flat list, int64, and the number of documents."""
    if cu_seqlens is None:
        count, length = documents.shape[:2]
        return torch.arange(count, device=documents.device).repeat_interleave(length, output_size=count * length), count
    positions = torch.arange(documents.shape[0], dtype=torch.int32, device=documents.device)
    return torch.searchsorted(cu_seqlens, positions, right=True) - 1, cu_seqlens.shape[0] - 1


def _chunks(rows: int, tokens: int, k: int) -> Iterator[tuple[slice, list[slice]]]:
    """Slices of query tokens, each with slices of all document tokens, whose similarities fit the memory limit."""
    width = min(tokens, max(_CHUNK_TOKENS, 4 * k), _CHUNK_ELEMENTS)
    step = max(1, _CHUNK_ELEMENTS // (width + k))
    columns = [slice(start, min(start + width, tokens)) for start in range(0, tokens, width)]
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows)), columns


def _unit(tokens: Tensor) -> Tensor:
    precise = tokens.float() if tokens.dtype in (torch.float16, torch.bfloat16) else tokens
    return unit_length(precise, dim=-1).to(tokens.dtype)
