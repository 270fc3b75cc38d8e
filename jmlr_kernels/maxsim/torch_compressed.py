"""MaxSim against compressed documents in plain PyTorch: decode a chunk, multiply, keep the maxima, forget the chunk.

Only kept tokens are decoded. Documents of about equal length share a matrix product; the shorter ones are filled up
with their own first token, which changes no maximum. Memory is bounded by the chunk whatever the number of documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .layout import Layout, layout_of, score_dtype
from .residual import decode

# Similarities, or decoded elements, of one chunk: 16 MiB in float32.
_CHUNK_ELEMENTS = 2**22


def quantized_forward(
    queries: Tensor,
    values: Tensor,
    scales: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    candidates: bool,
) -> Tensor:
    """Scores [Nq, N] float32 (float64 for float64 queries) against scales * values, checked by quantized.py."""
    sizes = layout_of(queries, values, cu_seqlens, candidates)
    dtype = score_dtype(queries)
    flat_scales = scales.reshape(-1)
    # Gathered as bytes: PyTorch indexes no float8 on a CPU.
    flat = values.view(torch.uint8).reshape(-1, sizes.dimension)

    def decoded(tokens: Tensor) -> Tensor:
        return flat[tokens].view(values.dtype).to(dtype) * flat_scales[tokens].to(dtype)[:, None]

    return _scores(sizes, queries, decoded, query_mask, document_mask, query_weights, cu_seqlens)


def residual_forward(
    queries: Tensor,
    codes: Tensor,
    residuals: Tensor,
    centroids: Tensor,
    field_weights: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    normalize: bool,
    candidates: bool,
) -> Tensor:
    """Scores [Nq, N] float32 (float64 for float64 queries) against decoded residual codes, checked by residual.py."""
    sizes = layout_of(queries, residuals, cu_seqlens, candidates)
    dtype = score_dtype(queries)
    flat_codes, flat = codes.reshape(-1), residuals.reshape(-1, residuals.shape[-1])

    def decoded(tokens: Tensor) -> Tensor:
        return decode(flat_codes[tokens], flat[tokens], centroids, field_weights, normalize, dtype)

    return _scores(sizes, queries, decoded, query_mask, document_mask, query_weights, cu_seqlens)


def _scores(
    sizes: Layout,
    queries: Tensor,
    decoded: Callable[[Tensor], Tensor],
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    dtype, device = score_dtype(queries), queries.device
    rows = queries.to(dtype)
    best = rows.new_zeros((sizes.query_count, sizes.query_length, sizes.documents_per_query))
    if best.numel() == 0:
        return best.sum(1)
    if cu_seqlens is None:
        length = sizes.document_length or 0
        edges = torch.arange(sizes.document_count + 1, device=device) * length
    else:
        edges = cu_seqlens.long()
    tokens = None
    if document_mask is not None:  # from here on, edges count kept tokens, and `tokens` says where they are
        kept = document_mask.reshape(-1)
        tokens = kept.nonzero().squeeze(1)
        edges = torch.nn.functional.pad(kept.cumsum(0), (1, 0))[edges]
    lengths, row_count = edges.diff(), sizes.query_length * (1 if sizes.candidates else sizes.query_count)
    with _without_autocast(device.type):
        for chunk, longest in _chunks(lengths, max(row_count, sizes.dimension)):
            position = torch.arange(longest, device=device)
            places = edges[chunk, None] + torch.where(position < lengths[chunk, None], position, 0)
            text = decoded((places if tokens is None else tokens[places]).reshape(-1))
            if sizes.candidates:
                owner = chunk // sizes.documents_per_query
                similarity = rows[owner] @ text.view(-1, longest, sizes.dimension).transpose(1, 2)
                best[owner, :, chunk % sizes.documents_per_query] = similarity.amax(-1)
            else:
                similarity = rows.flatten(0, 1) @ text.T
                best[:, :, chunk] = similarity.unflatten(1, (-1, longest)).amax(-1).view(*best.shape[:2], -1)
    if query_weights is not None:
        best = best * query_weights.to(dtype)[:, :, None]
    counts = (lengths > 0).view(-1, 1, sizes.documents_per_query)
    if query_mask is not None:
        counts = counts & query_mask[:, :, None]
    return best.masked_fill(~counts, 0).sum(1)


def _chunks(lengths: Tensor, width: int) -> Iterator[tuple[Tensor, int]]:
    """Documents of similar length and the longest of them, as many as `width` elements per token allow; empty ones
    are left out."""
    order = lengths.argsort(stable=True)
    ascending = lengths[order].tolist()
    first = sum(length == 0 for length in ascending)
    while first < len(ascending):
        limit = ascending[first] + max(16, ascending[first] // 8)
        last = first + 1
        while last < len(ascending) and ascending[last] <= limit:
            if (last + 1 - first) * ascending[last] * width > _CHUNK_ELEMENTS:
                break
            last += 1
        yield order[first:last], ascending[last - 1]
        first = last


def _without_autocast(device: str) -> AbstractContextManager[object]:
    """The operation's own precision holds: autocast has already had its say before it."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
