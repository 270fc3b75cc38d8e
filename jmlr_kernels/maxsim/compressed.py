"""What MaxSim against compressed documents shares whatever the format: argument checks, fakes, FLOPs.

Formats: quantized.py (int8 and float8 with a scale per token) and residual.py (ColBERT's residual codes).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arguments import _check_mask, _check_offsets
from .layout import layout_of, score_dtype

_QUERY_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_compressed(
    name: str,
    documents: Tensor,
    width: int,
    queries: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    candidates: bool,
    beside: dict[str, Tensor],
) -> None:
    """Checks of everything but the formats' own dtypes. `documents`, called `name`, hold `width` elements per token;
    `beside` are further tensors that must be on the queries' device.

    Raises:
        ValueError: a shape, an offset or a device does not fit, or a gradient is asked for.
        TypeError: a dtype does not fit.
    """
    if queries.dim() != 3 or queries.shape[2] == 0:
        raise ValueError(f"queries must be [Nq, Lq, D] with D >= 1, but its shape is {list(queries.shape)}")
    if queries.dtype not in _QUERY_DTYPES:
        raise TypeError(f"queries are {queries.dtype}; compressed documents meet float16, bfloat16 or float32 queries")
    if documents.is_nested:
        raise ValueError(f"{name} is a nested tensor; pass its values packed and its offsets as cu_seqlens")
    if cu_seqlens is not None:
        dims, wanted = 2, f"packed [T, {width}], as cu_seqlens is given"
    elif candidates:
        dims, wanted = 4, f"[Nq, K, Ld, {width}], or packed [T, {width}] with cu_seqlens"
    else:
        dims, wanted = 3, f"[Nd, Ld, {width}], or packed [T, {width}] with cu_seqlens"
    if documents.dim() != dims or documents.shape[-1] != width:
        raise ValueError(
            f"{name} must be {wanted}, for queries of D={queries.shape[2]}, but its shape is {list(documents.shape)}"
        )
    if dims == 4 and documents.shape[0] != queries.shape[0]:
        raise ValueError(
            f"{name} holds candidates for {documents.shape[0]} queries, but there are {queries.shape[0]} queries"
        )
    if cu_seqlens is not None:
        _check_offsets(cu_seqlens, documents, queries.shape[0] if candidates else None, None)
    _check_mask("query_mask", query_mask, queries.shape[:2])
    _check_mask("document_mask", document_mask, documents.shape[:-1])
    if query_weights is not None:
        if query_weights.shape != queries.shape[:2]:
            raise ValueError(
                f"query_weights must be [Nq, Lq] = {list(queries.shape[:2])}, but its shape is"
                f" {list(query_weights.shape)}"
            )
        if not query_weights.dtype.is_floating_point:
            raise TypeError(f"query_weights must be floating, but is {query_weights.dtype}; call .float() on it")
    named: dict[str, Tensor | None] = {
        name: documents,
        **beside,
        "query_mask": query_mask,
        "document_mask": document_mask,
        "query_weights": query_weights,
        "cu_seqlens": cu_seqlens,
    }
    for other, tensor in named.items():
        if tensor is not None and tensor.device != queries.device:
            raise ValueError(f"{other} is on {tensor.device} and queries on {queries.device}; move them together")
    if not torch.is_grad_enabled():
        return
    for other, tensor in {"queries": queries, **named}.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{other} requires a gradient, which compressed documents do not give; call under torch.no_grad(), or"
                " maxsim on decoded documents"
            )


def fake_quantized(
    queries: Tensor,
    values: Tensor,
    scales: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    candidates: bool,
    backend: str,
) -> Tensor:
    """Shape and dtype of the scores, for meta tensors and torch.compile."""
    sizes = layout_of(queries, values, cu_seqlens, candidates)
    return queries.new_empty((sizes.query_count, sizes.documents_per_query), dtype=score_dtype(queries))


def fake_residual(
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
    backend: str,
) -> Tensor:
    """The same for residual codes."""
    sizes = layout_of(queries, residuals, cu_seqlens, candidates)
    return queries.new_empty((sizes.query_count, sizes.documents_per_query), dtype=score_dtype(queries))


def quantized_flops(
    queries: Tensor,
    values: Tensor,
    scales: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    candidates: bool,
    *_: Any,
) -> int:
    """2 * D per (query token, document token) pair, as for uncompressed documents; decoding is not counted."""
    return _pair_flops(queries, scales.numel(), candidates)


def residual_flops(
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
    *_: Any,
) -> int:
    """The same for residual codes."""
    return _pair_flops(queries, codes.numel(), candidates)


def _pair_flops(queries: Tensor, tokens: int, candidates: bool) -> int:
    query_count, query_length, dimension = queries.shape
    return 2 * dimension * (1 if candidates else query_count) * query_length * tokens
