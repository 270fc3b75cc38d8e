"""MaxSim's operations on the emulated CUDA kernels: arguments and results of ``jmlr_kernels/ops.py``, CPU tensors.

Every output is filled with NaN (or an integer's highest value) first, so that what no kernel writes shows."""

from __future__ import annotations

from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from host_module import device, load

from jmlr_kernels import ops
from jmlr_kernels.maxsim.gradient_rule import unpack
from jmlr_kernels.maxsim.layout import layout_of, winner_code
from jmlr_kernels.maxsim.triton_forward import unit_stride

# How blocks and warps take their turns, and how many multiprocessors work is divided for.
seed = 0
processors = 2
# Another build of the kernels than load() gives, for seeded bugs.
kernels: ModuleType | None = None
# The kernels of the backward pass, by their name in the module.
backward_kernels = "maxsim_backward"


def poisoned(shape, dtype):
    if dtype.is_floating_point:
        return torch.full(tuple(shape), torch.nan, dtype=dtype)
    return torch.full(tuple(shape), torch.iinfo(dtype).max, dtype=dtype)


def problem(queries, documents, query_mask, document_mask, query_weights, cu_seqlens, candidates, max_length):
    return {
        "queries": unit_stride(queries),
        "documents": unit_stride(documents),
        "query_mask": query_mask,
        "document_mask": document_mask,
        "query_weights": None if query_weights is None else query_weights.float(),
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.contiguous(),
        "candidates": candidates,
        "max_length": max_length,
    }


def forward(
    queries, documents, query_mask, document_mask, query_weights, cu_seqlens, candidates, normalize, per_token,
    need_winners, max_length,
):  # fmt: skip
    """Scores, winners, inverse norms: as ``triton_forward.forward``."""
    sizes = layout_of(queries, documents, cu_seqlens, candidates)
    code = winner_code(documents, cu_seqlens, max_length)
    scales = [poisoned(side.shape[:-1] if normalize else (0,), torch.float32) for side in (queries, documents)]
    scores = poisoned(sizes.winners_shape if per_token else sizes.winners_shape[:2], torch.float32)
    winners = poisoned(sizes.winners_shape if need_winners else (0,), code.dtype)
    arguments = problem(
        queries, documents, query_mask, document_mask, query_weights, cu_seqlens, candidates, max_length
    )
    outputs = {
        "scores": scores,
        "winners": winners if need_winners else None,
        "query_scales": scales[0] if normalize else None,
        "document_scales": scales[1] if normalize else None,
    }
    (kernels or load()).maxsim_forward(
        {**arguments, "per_token": per_token, "normalize": normalize}, outputs, code.none, code.marked, processors, seed
    )
    return scores, winners, *scales


ROLES = {
    "scores": ("grad",),
    "tokens": ("grad",),
    "labels": ("grad", "scores", "row", "temperatures", "labels"),
    "teacher": ("grad", "scores", "row", "temperatures", "teacher", "teacher_row"),
    "margins": ("grad", "scores", "row", "teacher"),
}


def backward(
    rule_tensors, queries, documents, winners, query_mask, document_mask, query_weights, cu_seqlens, query_scales,
    document_scales, rule, candidates, max_length,
):  # fmt: skip
    """d(queries), d(documents), d(weights): as ``triton_backward.backward``."""
    code = winner_code(documents, cu_seqlens, max_length)
    grads = poisoned(queries.shape, queries.dtype), poisoned(documents.shape, documents.dtype)
    grad_weights = poisoned((0,) if query_weights is None else query_weights.shape, torch.float32)
    inputs = [tensor for tensor in unpack(rule, rule_tensors) if tensor is not None]
    arguments = problem(
        queries, documents, query_mask, document_mask, query_weights, cu_seqlens, candidates, max_length
    )
    given = {
        "rule": rule,
        **dict(zip(ROLES[rule], inputs, strict=False)),
        "winners": winners.contiguous(),
        "query_scales": query_scales,
        "document_scales": document_scales,
    }
    outputs = {
        "grad_queries": grads[0],
        "grad_documents": grads[1],
        "grad_weights": None if query_weights is None else grad_weights,
    }
    run = getattr(kernels or load(), backward_kernels)
    run(arguments, given, outputs, code.none, code.marked, processors, seed)
    return *grads, grad_weights.to(queries.dtype if query_weights is None else query_weights.dtype)


def loss_rows(scores, target, temperatures, rule):
    """Statistics [Nq, 6]: as ``triton_losses.loss_rows``."""
    statistics = poisoned((scores.shape[0], 6), torch.float32)
    target = None if target is None else target.contiguous()
    (kernels or load()).maxsim_loss_rows(rule, scores.contiguous(), target, temperatures, statistics, seed)
    return statistics


_IMPLEMENTATIONS = {"maxsim_forward": forward, "maxsim_backward": backward, "maxsim_loss_rows": loss_rows}


@contextmanager
def in_place_of_triton(monkeypatch, implementations=_IMPLEMENTATIONS, kilobytes=99):
    """Within it, ``backend="triton"`` of MaxSim's public functions runs the emulated CUDA kernels, bfloat16 too.

    The GPU has the least shared memory that one may have: but for those of compute capability 9.0 alone, MaxSim's tiles
    are the same everywhere."""
    original, original_why = ops._implementation, ops._why_not

    def replaced(name: str, backend: str) -> Any:  # in front of the cache, which outlives this
        own = implementations.get(name) if backend == "triton" else None
        return own or original(name, backend)

    with monkeypatch.context() as patch, device(kernels or load(), kilobytes=kilobytes):
        patch.setattr(ops, "_implementation", replaced)
        patch.setattr(
            ops, "_why_not", lambda backend, *rest: None if backend == "triton" else original_why(backend, *rest)
        )
        yield
