"""The public MaxSim functions: autograd, and the call into the registered operations."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops
from . import arguments
from .layout import decode_winners, layout_of, score_dtype, winner_code


@overload
def maxsim(
    queries: Tensor,
    documents: Tensor,
    *,
    query_mask: Tensor | None = ...,
    document_mask: Tensor | None = ...,
    query_weights: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    max_seqlen: int | None = ...,
    normalize: bool = ...,
    return_alignment: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def maxsim(
    queries: Tensor,
    documents: Tensor,
    *,
    query_mask: Tensor | None = ...,
    document_mask: Tensor | None = ...,
    query_weights: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    max_seqlen: int | None = ...,
    normalize: bool = ...,
    return_alignment: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
def maxsim(
    queries: Tensor,
    documents: Tensor,
    *,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    query_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
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
        max_seqlen: length of the longest packed document in tokens, where known: winners are then saved in one or two
            bytes even if all documents together have more than 65,536 tokens. A longer document is an error where
            the offsets are looked at, and scores NaN elsewhere: on a GPU and under torch.compile.
        normalize: scale every token of both sides to unit length first; gradients pass through it. No normalised copy
            is made.
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
        max_seqlen,
        normalize,
        return_alignment,
        backend,
        candidates=False,
    )


@overload
def maxsim_candidates(
    queries: Tensor,
    documents: Tensor,
    *,
    query_mask: Tensor | None = ...,
    document_mask: Tensor | None = ...,
    query_weights: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    max_seqlen: int | None = ...,
    normalize: bool = ...,
    return_alignment: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def maxsim_candidates(
    queries: Tensor,
    documents: Tensor,
    *,
    query_mask: Tensor | None = ...,
    document_mask: Tensor | None = ...,
    query_weights: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    max_seqlen: int | None = ...,
    normalize: bool = ...,
    return_alignment: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
def maxsim_candidates(
    queries: Tensor,
    documents: Tensor,
    *,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    query_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
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
        max_seqlen,
        normalize,
        return_alignment,
        backend,
        candidates=True,
    )


def maxsim_tokens(
    queries: Tensor,
    documents: Tensor,
    *,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    normalize: bool = False,
    candidates: bool = False,
    backend: str = "auto",
) -> Tensor:
    """What each query token adds to the score: its maximum over a document's kept tokens, before weights and sum.

    The building block for scores that are not a plain sum (a floor, a threshold, a learned pooling). Arguments as for
    :func:`maxsim`; with `candidates`, as for :func:`maxsim_candidates`.

    Returns:
        float32 [Nq, N, Lq] (float64 for float64 inputs), 0 where there is no maximum: for an excluded query token and a
        document without kept tokens. Differentiable in queries and documents; entries with gradient zero send none,
        whatever their tokens hold.

    Raises:
        As :func:`maxsim`.
    """
    tensors, switches = prepare(
        queries, documents, query_mask, document_mask, None, cu_seqlens, max_seqlen, normalize, candidates, backend
    )
    return _forward(tensors, switches, True, False)[0]


# queries, documents, query_mask, document_mask, query_weights, cu_seqlens
Tensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Switches(NamedTuple):
    """What else the operations need to know of one MaxSim problem. `max_length` is 0 where it is unknown."""

    candidates: bool
    normalize: bool
    max_length: int
    backend: str


def prepare(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    normalize: bool,
    candidates: bool,
    backend: str,
    operation: str = "maxsim_forward",
) -> tuple[Tensors, Switches]:
    """Checked arguments of one MaxSim problem, jagged documents unpacked, autocast applied, the backend resolved."""
    if documents.is_nested:
        documents, cu_seqlens, longest = arguments.from_jagged(documents, cu_seqlens, candidates)
        max_seqlen = max_seqlen or longest or None
    longest = arguments.check(
        queries, documents, query_mask, document_mask, query_weights, cu_seqlens, candidates, max_seqlen
    )
    if ops.any_autocast():
        queries, documents = arguments.autocast(queries), arguments.autocast(documents)
    tensors = (queries, documents, query_mask, document_mask, query_weights, cu_seqlens)
    return tensors, Switches(candidates, normalize, longest, ops.resolve_backend(backend, queries, operation))


def wants_gradient(tensors: Tensors, *others: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of queries, documents, weights or `others`."""
    if not torch.is_grad_enabled():
        return False
    queries, documents, _, _, query_weights, _ = tensors
    if queries.requires_grad or documents.requires_grad:
        return True
    return any(tensor is not None and tensor.requires_grad for tensor in (query_weights, *others))


def run_forward(
    tensors: Tensors, switches: Switches, per_token: bool, need_winners: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores or maxima, winners, inverse norms of both sides, without autograd."""
    return ops.call(
        "maxsim_forward",
        *tensors,
        switches.candidates,
        switches.normalize,
        per_token,
        need_winners,
        switches.max_length,
        switches.backend,
    )


Saved = tuple[Tensor | None, ...]


def to_save(tensors: Tensors, switches: Switches, winners: Tensor, scales: tuple[Tensor, ...]) -> Saved:
    """The nine tensors that :func:`gradients` needs. Masks are kept only where the winners do not say who has none."""
    queries, documents, query_mask, document_mask, query_weights, cu_seqlens = tensors
    if query_mask is not None or document_mask is not None:
        if winner_code(documents, cu_seqlens, switches.max_length).marked:
            query_mask = document_mask = None
    kept_scales = scales if switches.normalize else (None, None)
    return queries, documents, winners, query_mask, document_mask, query_weights, cu_seqlens, *kept_scales


SAVED = 9


def gradients(
    saved: Saved, switches: Switches, rule: str, rule_tensors: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """d(queries), d(documents) and d(weights) (None without weights) from what :func:`to_save` gave."""
    grad_queries, grad_documents, grad_weights = ops.call(
        "maxsim_backward", rule_tensors, *saved, rule, switches.candidates, switches.max_length, switches.backend
    )
    return grad_queries, grad_documents, None if saved[5] is None else grad_weights


def _maxsim(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    normalize: bool,
    return_alignment: bool,
    backend: str,
    candidates: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    tensors, switches = prepare(
        queries,
        documents,
        query_mask,
        document_mask,
        query_weights,
        cu_seqlens,
        max_seqlen,
        normalize,
        candidates,
        backend,
    )
    if not return_alignment:
        return _forward(tensors, switches, False, False)[0]
    scores, winners = _forward(tensors, switches, False, True)
    _, documents, query_mask, document_mask, _, cu_seqlens = tensors
    code = winner_code(documents, cu_seqlens, switches.max_length)
    positions, valid = decode_winners(winners, code, query_mask, document_mask)
    return scores, positions if valid is None else positions.masked_fill(~valid, -1)


def _forward(tensors: Tensors, switches: Switches, per_token: bool, need_winners: bool) -> tuple[Tensor, ...]:
    """Scores or maxima, and the winners where they are needed."""
    if wants_gradient(tensors):
        return ops.apply(_MaxSim, *tensors, switches, per_token, need_winners)
    return run_forward(tensors, switches, per_token, need_winners)[: 1 + need_winners]


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
        switches: Switches,
        per_token: bool,
        need_winners: bool,
    ) -> tuple[Tensor, ...]:
        tensors = (queries, documents, query_mask, document_mask, query_weights, cu_seqlens)
        candidates, normalize, max_length, backend = switches
        scores, winners, query_scales, document_scales = ops.call(
            "maxsim_forward", *tensors, candidates, normalize, per_token, True, max_length, backend
        )
        ctx.save_for_backward(*to_save(tensors, switches, winners, (query_scales, document_scales)))
        ctx.switches, ctx.rule = switches, "tokens" if per_token else "scores"
        if not need_winners:
            return (scores,)
        ctx.mark_non_differentiable(winners)
        return scores, winners

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_scores: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_queries, grad_documents, grad_weights = gradients(ctx.saved_tensors, ctx.switches, ctx.rule, [grad_scores])
        return grad_queries, grad_documents, None, None, grad_weights, None, None, None, None


def fake_forward(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    candidates: bool,
    normalize: bool,
    per_token: bool,
    need_winners: bool,
    max_length: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the forward operation, for meta tensors and torch.compile."""
    sizes = layout_of(queries, documents, cu_seqlens, candidates)
    dtype = score_dtype(queries)
    shape = sizes.winners_shape if per_token else sizes.winners_shape[:2]
    code = winner_code(documents, cu_seqlens, max_length)
    return (
        queries.new_empty(shape, dtype=dtype),
        queries.new_empty(sizes.winners_shape if need_winners else (0,), dtype=code.dtype),
        queries.new_empty(queries.shape[:-1] if normalize else (0,), dtype=dtype),
        queries.new_empty(documents.shape[:-1] if normalize else (0,), dtype=dtype),
    )


def fake_backward(
    rule_tensors: list[Tensor],
    queries: Tensor,
    documents: Tensor,
    winners: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    query_weights: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the backward operation."""
    return (
        queries.new_empty(queries.shape),
        documents.new_empty(documents.shape),
        queries.new_empty(0) if query_weights is None else query_weights.new_empty(query_weights.shape),
    )
