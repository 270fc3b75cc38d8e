"""The public smooth MaxSim function: argument checks, autograd, and the call into the registered operations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops
from .function import prepare, wants_gradient
from .layout import layout_of, score_dtype

# Below float32's smallest normal number 1 / temperature is infinite there.
_LEAST_TEMPERATURE = 2.0**-126


def maxsim_smooth(
    queries: Tensor,
    documents: Tensor,
    *,
    temperature: float,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    query_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    candidates: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Late interaction with a smooth maximum: every kept document token has a share in score and gradient.

    ``score(q, d) = sum_i w_i * temperature * log sum_j exp(<q_i, d_j> / temperature)`` over kept query tokens i and
    kept document tokens j. It tends to :func:`maxsim` from above as the temperature falls, at most
    ``temperature * log(tokens)`` away per query token. Excluded tokens have no share; NaN in a kept token propagates to
    the score; a document or a query without kept tokens scores 0 with zero gradient. Differentiable, once, in queries,
    documents and query_weights; the gradients are deterministic and have the inputs' dtypes.

    Args:
        queries: [Nq, Lq, D], float16, bfloat16, float32 or float64.
        documents: [Nd, Ld, D] of the same dtype; packed [T, D] with `cu_seqlens`; or a jagged nested tensor. With
            `candidates` [Nq, K, Ld, D] or packed, the K candidates of a query side by side.
        temperature: positive number, in the unit of the similarities.
        query_mask: bool [Nq, Lq], True counts; holes are allowed.
        document_mask: bool in the documents' shape less D; True counts, holes are allowed.
        query_weights: floating [Nq, Lq], one factor per query token.
        cu_seqlens: int32 [Nd + 1] (or [Nq * K + 1]), token offsets of packed documents: starts at 0, ends at T, never
            decreases. The values are checked on a CPU only, because looking at them would stall a GPU.
        candidates: every query meets its own K documents instead of all.
        backend: "auto", "cuda", "triton", "cpu" or "torch"; a named backend that cannot run raises.

    Returns:
        Scores [Nq, Nd], or [Nq, K] with `candidates`: float32 whatever the inputs (float64 for float64 inputs).

    Under autocast, floating inputs other than float64 are cast to the autocast dtype, as for a matrix product; the
    scores stay float32.

    Raises:
        ValueError: shapes, offsets, temperature or an option do not fit; the message names argument and remedy.
        TypeError: a dtype does not fit.
        RuntimeError: the forced backend cannot run here.
    """
    temperature = _checked_temperature(temperature)
    tensors, switches = prepare(
        queries, documents, query_mask, document_mask, query_weights, cu_seqlens, None, False, candidates, backend,
        "maxsim_smooth_forward",
    )  # fmt: skip
    if wants_gradient(tensors):
        return ops.apply(_MaxSimSmooth, *tensors, candidates, temperature, switches.backend)
    return ops.call("maxsim_smooth_forward", *tensors, candidates, temperature, False, switches.backend)[0]


class _MaxSimSmooth(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        documents: Tensor,
        query_mask: Tensor | None,
        document_mask: Tensor | None,
        query_weights: Tensor | None,
        cu_seqlens: Tensor | None,
        candidates: bool,
        temperature: float,
        backend: str,
    ) -> Tensor:
        tensors = (queries, documents, query_mask, document_mask, query_weights, cu_seqlens)
        scores, maxima = ops.call("maxsim_smooth_forward", *tensors, candidates, temperature, True, backend)
        # Excluded query tokens are known by their maxima, so the query mask is not needed again.
        ctx.save_for_backward(queries, documents, maxima, document_mask, query_weights, cu_seqlens)
        ctx.candidates, ctx.temperature, ctx.backend = candidates, temperature, backend
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_scores: Tensor) -> tuple[Tensor | None, ...]:
        grad_queries, grad_documents, grad_weights = ops.call(
            "maxsim_smooth_backward", grad_scores, *ctx.saved_tensors, ctx.candidates, ctx.temperature, ctx.backend
        )
        if ctx.saved_tensors[4] is None:
            grad_weights = None
        return grad_queries, grad_documents, None, None, grad_weights, None, None, None, None


def fake_forward(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    candidates: bool,
    temperature: float,
    need_maxima: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of the forward operation, for meta tensors and torch.compile."""
    sizes = layout_of(queries, documents, cu_seqlens, candidates)
    dtype = score_dtype(queries)
    shape = (sizes.query_count, sizes.documents_per_query)
    maxima_shape = (*shape, sizes.query_length) if need_maxima else (0,)
    return queries.new_empty(shape, dtype=dtype), queries.new_empty(maxima_shape, dtype=dtype)


def fake_backward(
    grad_scores: Tensor,
    queries: Tensor,
    documents: Tensor,
    maxima: Tensor,
    document_mask: Tensor | None,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    candidates: bool,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the backward operation."""
    return (
        queries.new_empty(queries.shape),
        documents.new_empty(documents.shape),
        queries.new_empty(0) if query_weights is None else query_weights.new_empty(query_weights.shape),
    )


def _checked_temperature(temperature: float) -> float:
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature must be a Python number, but is {type(temperature).__name__}; pass a float")
    if not _LEAST_TEMPERATURE <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be positive and finite; for the hard maximum call maxsim")
    return float(temperature)
