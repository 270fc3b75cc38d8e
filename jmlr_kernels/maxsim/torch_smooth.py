"""Smooth MaxSim in plain PyTorch, fast enough to train with on a CPU and a fallback on any device.

Forward and backward walk the documents in chunks; of each, the similarities are multiplied, used and dropped, so that
memory is bounded whatever the number of documents. What is kept between the two is one smooth maximum for each query
token and document, from which the backward gets the shares back: exp((similarity - maximum) / temperature).
Derivation: docs/maxsim-smooth-and-xtr.md.

Half-precision inputs are multiplied in float32, chunk by chunk; float64 inputs stay float64 throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from .layout import Layout, layout_of, score_dtype

# Similarities of one chunk, in elements: 4 MiB in float32, which stays in a core's outer cache.
_CHUNK_ELEMENTS = 2**20
# Packed documents are grouped by length rounded up to this many tokens: little padding, few matrix products.
_LENGTH_STEP = 16


class _Chunk(NamedTuple):
    """Some documents side by side. `places` index the flat list of tokens; `kept` is None when all of them count."""

    documents: Tensor | slice  # [n]
    places: Tensor | slice  # [n, L], or a slice of n * L tokens in order
    kept: Tensor | None  # bool [n, L]
    shape: tuple[int, int]  # n, L


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The operation's own precision holds: autocast has already had its say in smooth.py."""

    @wraps(function)
    def wrapped(first: Tensor, *args: Any) -> Any:
        device = first.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            return function(first, *args)

    return wrapped


@_without_autocast
def forward(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    candidates: bool,
    temperature: float,
    need_maxima: bool,
) -> tuple[Tensor, Tensor]:
    """Scores [Nq, N] and smooth maxima [Nq, N, Lq], -inf where nothing counts (empty without `need_maxima`).

    Both are float32, or float64 for float64 inputs. Arguments are checked by smooth.py.
    """
    sizes = layout_of(queries, documents, cu_seqlens, candidates)
    dtype = score_dtype(queries)
    rows = queries.to(dtype).reshape(-1, sizes.dimension)
    tokens = documents.reshape(-1, sizes.dimension)
    shape = (sizes.query_count, sizes.documents_per_query, sizes.query_length)
    maxima = torch.full(shape, -torch.inf, dtype=dtype, device=queries.device)
    counts = torch.zeros((shape[0] if candidates else 1, shape[1]), dtype=torch.bool, device=queries.device)
    for chunk in _chunks(sizes, rows.shape[0], tokens, document_mask, cu_seqlens):
        similarity = _similarity(sizes, chunk, rows, _text(chunk, tokens, dtype))
        if chunk.kept is not None:
            similarity = similarity.masked_fill(~chunk.kept[:, :, None], -torch.inf)
        found = _from_chunk(sizes, _smooth_maximum(similarity, temperature))
        _pairs(sizes, maxima)[_at(sizes, chunk)] = found
        counts.view(-1)[chunk.documents] = True if chunk.kept is None else chunk.kept.any(1)
    kept = counts[:, :, None]
    if query_mask is not None:
        kept = kept & query_mask[:, None, :]
    best = maxima if query_weights is None else maxima * query_weights.to(dtype)[:, None, :]
    scores = best.masked_fill(~kept, 0).sum(-1)
    if not need_maxima:
        return scores, scores.new_empty(0)
    return scores, maxima.masked_fill_(~kept, -torch.inf)


@_without_autocast
def backward(
    grad_scores: Tensor,
    queries: Tensor,
    documents: Tensor,
    maxima: Tensor,
    document_mask: Tensor | None,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    candidates: bool,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, documents and query_weights in their own shapes and dtypes.

    The third is an empty tensor when there are no weights. Two runs are bit-identical.
    """
    sizes = layout_of(queries, documents, cu_seqlens, candidates)
    dtype = score_dtype(queries)
    grad_scores = grad_scores.to(dtype)
    counts = maxima != -torch.inf
    row_counts = counts.any(1).view(-1, 1)  # [Nq * Lq, 1]: excluded query tokens never count
    rows = queries.to(dtype).reshape(-1, sizes.dimension).masked_fill(~row_counts, 0)
    weights = None if query_weights is None else query_weights.to(dtype).reshape(-1, 1).masked_fill(~row_counts, 0)
    weighted_rows = rows if weights is None else rows * weights
    tokens = documents.reshape(-1, sizes.dimension)
    grad_tokens = torch.zeros_like(tokens, memory_format=torch.contiguous_format)
    totals = rows.new_zeros(rows.shape)
    for chunk in _chunks(sizes, rows.shape[0], tokens, document_mask, cu_seqlens):
        text = _text(chunk, tokens, dtype)
        similarity = _similarity(sizes, chunk, rows, text)
        at = _at(sizes, chunk)
        centre = _to_chunk(sizes, _pairs(sizes, maxima)[at]).unsqueeze(1)
        share = similarity.sub_(centre).div_(temperature).exp_()
        # Selected, not multiplied by zero: what does not count may be infinite or NaN.
        valid = _to_chunk(sizes, _pairs(sizes, counts)[at]).unsqueeze(1)
        if chunk.kept is not None:
            valid = valid & chunk.kept[:, :, None]
        grad = _pairs(sizes, grad_scores[:, :, None].expand(maxima.shape))[at]
        share = share.mul_(_to_chunk(sizes, grad).unsqueeze(1)).masked_fill_(~valid, 0)
        if candidates:
            owner = _owner(sizes, chunk)
            totals += _sum_by_owner(sizes, owner, share.transpose(1, 2) @ text).view_as(totals)
            grad_text = share @ weighted_rows.view(sizes.query_count, -1, sizes.dimension)[owner]
        else:
            totals += share.flatten(0, 1).T @ text.flatten(0, 1)
            grad_text = share @ weighted_rows
        _scatter(chunk, grad_text.to(tokens.dtype), grad_tokens)
    totals = totals.masked_fill_(~row_counts, 0)
    grad_queries = (totals if weights is None else totals * weights).view(queries.shape).to(queries.dtype)
    grad_documents = grad_tokens.view(documents.shape)
    if query_weights is None:
        return grad_queries, grad_documents, queries.new_empty(0)
    grad_weights = (grad_scores[:, :, None] * maxima).masked_fill_(~counts, 0).sum(1)
    return grad_queries, grad_documents, grad_weights.to(query_weights.dtype)


def _chunks(
    sizes: Layout, row_count: int, tokens: Tensor, document_mask: Tensor | None, cu_seqlens: Tensor | None
) -> Iterator[_Chunk]:
    """Every document that may have a kept token, once; the similarities of a chunk stay within the memory limit."""
    rows = sizes.query_length if sizes.candidates else row_count
    if rows == 0 or tokens.shape[0] == 0:
        return
    if cu_seqlens is None:
        length = sizes.document_length or 0
        mask = None if document_mask is None else document_mask.reshape(-1, length)
        for part in _slices(sizes.document_count, max(1, _CHUNK_ELEMENTS // (rows * length))):
            places = slice(part.start * length, part.stop * length)
            yield _Chunk(part, places, None if mask is None else mask[part], (part.stop - part.start, length))
        return
    # Documents of about equal length share a product, and excluded tokens are left out of it.
    places_of_kept = torch.arange(tokens.shape[0], device=tokens.device)
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    if document_mask is not None:
        running = pad(document_mask.cumsum(0), (1, 0))
        places_of_kept, starts, ends = places_of_kept[document_mask], running[starts], running[ends]
    lengths = ends - starts
    buckets = (lengths + _LENGTH_STEP - 1) // _LENGTH_STEP
    for bucket in buckets.unique().tolist():
        if bucket == 0:
            continue
        length = bucket * _LENGTH_STEP
        position = torch.arange(length, device=tokens.device)
        members = (buckets == bucket).nonzero().squeeze(1)
        for chunk in members.split(max(1, _CHUNK_ELEMENTS // (rows * length))):
            kept = position < lengths[chunk, None]
            nth_kept = torch.where(kept, starts[chunk, None] + position, 0)
            yield _Chunk(chunk, places_of_kept[nth_kept], kept, (chunk.numel(), length))


def _text(chunk: _Chunk, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Document tokens [n, L, D], zero where they do not count."""
    text = tokens[chunk.places].to(dtype).view(*chunk.shape, -1)
    return text if chunk.kept is None else text.masked_fill(~chunk.kept[:, :, None], 0)


def _similarity(sizes: Layout, chunk: _Chunk, rows: Tensor, text: Tensor) -> Tensor:
    """[n, L, rows that meet these documents]: one matrix product, or one for each candidate."""
    if not sizes.candidates:
        return text @ rows.T
    return text @ rows.view(sizes.query_count, -1, sizes.dimension)[_owner(sizes, chunk)].transpose(1, 2)


def _smooth_maximum(similarity: Tensor, temperature: float) -> Tensor:
    """temperature * logsumexp(similarity / temperature) over dimension 1.

    The maximum is taken out before the division: a small temperature then overflows nothing and rounds nothing away.
    """
    best = similarity.amax(1)
    centre = best.masked_fill(best.isinf(), 0)
    total = (similarity - centre.unsqueeze(1)).div_(temperature).exp_().sum(1)
    return total.log_().mul_(temperature).add_(centre)


def _owner(sizes: Layout, chunk: _Chunk) -> Tensor:
    """The query of each candidate in the chunk."""
    if isinstance(chunk.documents, slice):
        return torch.arange(chunk.documents.start, chunk.documents.stop) // sizes.documents_per_query
    return chunk.documents // sizes.documents_per_query


def _sum_by_owner(sizes: Layout, owner: Tensor, parts: Tensor) -> Tensor:
    """Sum of parts [n, Lq, D] by query, [Nq, Lq * D]; a bag adds in the order of its entries, so it is repeatable."""
    per_query = torch.bincount(owner, minlength=sizes.query_count).to(parts.device)
    entries = torch.arange(parts.shape[0], device=parts.device)
    return embedding_bag(entries, parts.flatten(1), per_query.cumsum(0) - per_query, mode="sum")


def _pairs(sizes: Layout, values: Tensor) -> Tensor:
    """A view of values [Nq, N, Lq] that :func:`_at` indexes: candidates of all queries in one list."""
    return values.flatten(0, 1) if sizes.candidates else values


def _at(sizes: Layout, chunk: _Chunk) -> Any:
    return chunk.documents if sizes.candidates else (slice(None), chunk.documents)


def _to_chunk(sizes: Layout, values: Tensor) -> Tensor:
    """[n, rows] from [Nq, n, Lq], or from [n, Lq] for candidates."""
    return values if sizes.candidates else values.transpose(0, 1).reshape(values.shape[1], -1)


def _from_chunk(sizes: Layout, values: Tensor) -> Tensor:
    """The reverse of :func:`_to_chunk`."""
    if sizes.candidates:
        return values
    return values.view(-1, sizes.query_count, sizes.query_length).transpose(0, 1)


def _scatter(chunk: _Chunk, grad_text: Tensor, grad_tokens: Tensor) -> None:
    if isinstance(chunk.places, slice):
        grad_text = grad_text.flatten(0, 1)
        if chunk.kept is not None:
            grad_text = grad_text.masked_fill(~chunk.kept.reshape(-1, 1), 0)
        grad_tokens[chunk.places] = grad_text
    elif chunk.kept is not None:  # each kept token is in one chunk, once
        grad_tokens[chunk.places[chunk.kept]] = grad_text[chunk.kept]


def _slices(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))
