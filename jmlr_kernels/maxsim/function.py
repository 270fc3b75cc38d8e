"""The public MaxSim functions: argument checks, autograd, and the call into the registered operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops
from .layout import layout_of, score_dtype

# Of a vector shorter than this, the direction is noise: it is divided by the floor instead (torch's own default).
_NORM_FLOOR = 1e-12


def maxsim(
    queries: Tensor,
    documents: Tensor,
    *,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    query_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalize: bool = False,
    return_alignment: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Late-interaction score of every query against every document (ColBERT, Khattab and Zaharia 2020).

    ``score(q, d) = sum_i w_i * max_j <q_i, d_j>`` over kept query tokens i and kept document tokens j. Ties go to the
    lowest position, in the score and in the gradient; NaN in a kept token propagates to the score; a document or a
    query without kept tokens scores 0 with zero gradient. Differentiable, once, in queries, documents and
    query_weights; the gradients are deterministic and have the inputs' dtypes.

    Args:
        queries: [Nq, Lq, D], float16, bfloat16, float32 or float64.
        documents: [Nd, Ld, D] of the same dtype; packed [T, D] with `cu_seqlens`; or a jagged nested tensor.
        query_mask: bool [Nq, Lq], True counts; holes are allowed.
        document_mask: bool [Nd, Ld], or [T] for packed documents; True counts, holes are allowed.
        query_weights: floating [Nq, Lq], one factor per query token.
        cu_seqlens: int32 [Nd + 1], token offsets of packed documents: starts at 0, ends at T, never decreases. The
            values are checked on a CPU only, because looking at them would stall a GPU.
        normalize: scale every token of both sides to unit length first; gradients pass through it.
        return_alignment: also return the winners.
        backend: "auto", "cuda", "triton", "cpu" or "torch"; a named backend that cannot run raises.

    Returns:
        Scores [Nq, Nd], float32 whatever the inputs (float64 for float64 inputs), sums taken in that precision. With
        `return_alignment` also int32 [Nq, Nd, Lq]: the winner's position within its document, -1 where there is none.

    Under autocast, floating inputs other than float64 are cast to the autocast dtype, as for a matrix product; the
    scores stay float32.

    Raises:
        ValueError: shapes, offsets or an option do not fit; the message names the argument and the remedy.
        TypeError: a dtype does not fit.
        RuntimeError: the forced backend cannot run here.
    """
    return _maxsim(
        queries,
        documents,
        query_mask,
        document_mask,
        query_weights,
        cu_seqlens,
        normalize,
        return_alignment,
        backend,
        candidates=False,
    )


def maxsim_candidates(
    queries: Tensor,
    documents: Tensor,
    *,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    query_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalize: bool = False,
    return_alignment: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Late-interaction score of every query against its own K candidates: :func:`maxsim` query by query.

    Args:
        queries: [Nq, Lq, D].
        documents: [Nq, K, Ld, D], or packed [T, D] with `cu_seqlens`, the K candidates of a query side by side.
        document_mask: bool [Nq, K, Ld], or [T] for packed documents.
        cu_seqlens: int32 [Nq * K + 1].

    The other arguments, the semantics and the errors are those of :func:`maxsim`.

    Returns:
        Scores [Nq, K]; with `return_alignment` also int32 [Nq, K, Lq].
    """
    return _maxsim(
        queries,
        documents,
        query_mask,
        document_mask,
        query_weights,
        cu_seqlens,
        normalize,
        return_alignment,
        backend,
        candidates=True,
    )


def _maxsim(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    normalize: bool,
    return_alignment: bool,
    backend: str,
    candidates: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    if documents.is_nested:
        documents, cu_seqlens = _from_jagged(documents, cu_seqlens, candidates)
    _check(queries, documents, query_mask, document_mask, query_weights, cu_seqlens, candidates)
    if normalize:
        # In plain PyTorch for now; folding it and its Jacobian into the kernels saves one pass over each side.
        queries, documents = _normalized(queries), _normalized(documents)
    queries, documents = _autocast(queries), _autocast(documents)
    resolved = ops.resolve_backend(backend, queries)
    differentiable = torch.is_grad_enabled() and (
        queries.requires_grad or documents.requires_grad or (query_weights is not None and query_weights.requires_grad)
    )
    arguments = (queries, documents, query_mask, document_mask, query_weights, cu_seqlens, candidates)
    if differentiable:
        scores, winners = _MaxSim.apply(*arguments, resolved)
    else:
        scores, winners = torch.ops.jmlr_kernels.maxsim_forward(*arguments, return_alignment, resolved)
    return (scores, winners) if return_alignment else scores


class _MaxSim(torch.autograd.Function):
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
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        scores, winners = torch.ops.jmlr_kernels.maxsim_forward(
            queries, documents, query_mask, document_mask, query_weights, cu_seqlens, candidates, True, backend
        )
        ctx.save_for_backward(queries, documents, winners, query_weights, cu_seqlens)
        ctx.mark_non_differentiable(winners)
        ctx.candidates, ctx.backend = candidates, backend
        return scores, winners

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_scores: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        queries, documents, winners, query_weights, cu_seqlens = ctx.saved_tensors
        grad_queries, grad_documents, grad_weights = torch.ops.jmlr_kernels.maxsim_backward(
            grad_scores, queries, documents, winners, query_weights, cu_seqlens, ctx.candidates, ctx.backend
        )
        if query_weights is None:
            grad_weights = None
        return grad_queries, grad_documents, None, None, grad_weights, None, None, None


def fake_forward(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    candidates: bool,
    need_winners: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of the forward operation, for meta tensors and torch.compile."""
    sizes = layout_of(queries, documents, cu_seqlens, candidates)
    scores = queries.new_empty((sizes.query_count, sizes.documents_per_query), dtype=score_dtype(queries))
    return scores, queries.new_empty(sizes.winners_shape if need_winners else (0,), dtype=torch.int32)


def fake_backward(
    grad_scores: Tensor,
    queries: Tensor,
    documents: Tensor,
    winners: Tensor,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    candidates: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the backward operation."""
    return (
        queries.new_empty(queries.shape),
        documents.new_empty(documents.shape),
        queries.new_empty(0) if query_weights is None else query_weights.new_empty(query_weights.shape),
    )


def _normalized(tokens: Tensor) -> Tensor:
    precise = tokens.float() if tokens.dtype in (torch.float16, torch.bfloat16) else tokens
    norm = torch.linalg.vector_norm(precise, dim=-1, keepdim=True)
    return (precise / norm.clamp_min(_NORM_FLOOR)).to(tokens.dtype)


def _autocast(tensor: Tensor) -> Tensor:
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


def _from_jagged(documents: Tensor, cu_seqlens: Tensor | None, candidates: bool) -> tuple[Tensor, Tensor]:
    if candidates:
        raise ValueError(
            "documents is a nested tensor, which maxsim_candidates cannot take; pass values and cu_seqlens"
        )
    if cu_seqlens is not None:
        raise ValueError("documents is a nested tensor, which has its own offsets; leave cu_seqlens out")
    if documents.layout != torch.jagged:
        raise ValueError("documents is a strided nested tensor; build it with layout=torch.jagged")
    jagged: Any = documents  # its class, which has lengths and offsets, is private
    if jagged.dim() != 3 or jagged.lengths() is not None:
        raise ValueError("documents must be a gapless jagged tensor [Nd, jagged length, D]; call .contiguous() on it")
    return jagged.values(), jagged.offsets().to(torch.int32)


def _check(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    candidates: bool,
) -> None:
    if queries.dim() != 3 or queries.shape[2] == 0:
        raise ValueError(f"queries must be [Nq, Lq, D] with D >= 1, but its shape is {list(queries.shape)}")
    if cu_seqlens is not None:
        dims, wanted = 2, "packed [T, D], as cu_seqlens is given"
    elif candidates:
        dims, wanted = 4, "[Nq, K, Ld, D], or packed [T, D] with cu_seqlens"
    else:
        dims, wanted = 3, "[Nd, Ld, D], or packed [T, D] with cu_seqlens"
    if documents.dim() != dims:
        raise ValueError(f"documents must be {wanted}, but its shape is {list(documents.shape)}")
    if documents.shape[-1] != queries.shape[2]:
        raise ValueError(
            f"documents have D={documents.shape[-1]} and queries D={queries.shape[2]}; encode both to one dimension"
        )
    if dims == 4 and documents.shape[0] != queries.shape[0]:
        raise ValueError(
            f"documents hold candidates for {documents.shape[0]} queries, but there are {queries.shape[0]} queries"
        )
    if not queries.dtype.is_floating_point or queries.dtype != documents.dtype:
        raise TypeError(
            f"queries are {queries.dtype} and documents {documents.dtype}; both must share one floating dtype"
        )
    if cu_seqlens is not None:
        _check_offsets(cu_seqlens, documents, queries.shape[0] if candidates else None)
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
    named = {
        "documents": documents,
        "query_mask": query_mask,
        "document_mask": document_mask,
        "query_weights": query_weights,
        "cu_seqlens": cu_seqlens,
    }
    for name, tensor in named.items():
        if tensor is not None and tensor.device != queries.device:
            raise ValueError(f"{name} is on {tensor.device} and queries on {queries.device}; move them together")


def _check_mask(name: str, mask: Tensor | None, shape: torch.Size) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool (True counts), but is {mask.dtype}; call .bool() on it")
    if mask.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, but its shape is {list(mask.shape)}")


def _check_offsets(cu_seqlens: Tensor, documents: Tensor, query_count: int | None) -> None:
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"cu_seqlens must be int32 and one-dimensional, one more than documents, but is {cu_seqlens.dtype}"
            f" {list(cu_seqlens.shape)}"
        )
    if query_count is not None:
        count = cu_seqlens.shape[0] - 1
        if (count % query_count if query_count else count) != 0:
            raise ValueError(
                f"cu_seqlens holds {count} documents, which {query_count} queries cannot share evenly; it must be"
                " [Nq * K + 1]"
            )
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling() or _is_fake(cu_seqlens):
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != documents.shape[0] or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(
            f"cu_seqlens must rise from 0 to T={documents.shape[0]} without decreasing, but runs from {first} to {last}"
        )


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)
