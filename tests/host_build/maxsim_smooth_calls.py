"""Smooth MaxSim on the emulated CUDA kernels: arguments and results of ``jmlr_kernels/ops.py``, CPU tensors.

Outputs are filled with NaN first. Work is divided, and threads take their turns, as ``maxsim_calls`` says."""

from __future__ import annotations

from contextlib import contextmanager

import maxsim_calls
import torch
from host_module import load
from maxsim_calls import poisoned

from jmlr_kernels.maxsim.layout import layout_of


def forward(
    queries, documents, query_mask, document_mask, query_weights, cu_seqlens, candidates, temperature, need_maxima
):
    """Scores and smooth maxima: as ``triton_smooth_forward.forward``."""
    sizes = layout_of(queries, documents, cu_seqlens, candidates)
    scores = poisoned(sizes.winners_shape[:2], torch.float32)
    maxima = poisoned(sizes.winners_shape if need_maxima else (0,), torch.float32)
    problem = maxsim_calls.problem(
        queries, documents, query_mask, document_mask, query_weights, cu_seqlens, candidates, 0
    )
    outputs = {"scores": scores, "maxima": maxima if need_maxima else None}
    (maxsim_calls.kernels or load()).maxsim_smooth_forward(
        problem, outputs, temperature, maxsim_calls.processors, maxsim_calls.seed
    )
    return scores, maxima


def backward(
    grad_scores, queries, documents, maxima, document_mask, query_weights, cu_seqlens, candidates, temperature
):
    """d(queries), d(documents), d(weights): as ``triton_smooth_backward.backward``."""
    grads = poisoned(queries.shape, queries.dtype), poisoned(documents.shape, documents.dtype)
    grad_weights = poisoned((0,) if query_weights is None else query_weights.shape, torch.float32)
    problem = maxsim_calls.problem(queries, documents, None, document_mask, query_weights, cu_seqlens, candidates, 0)
    given = {"grad_scores": grad_scores.float().contiguous(), "maxima": maxima.contiguous()}
    outputs = {
        "grad_queries": grads[0],
        "grad_documents": grads[1],
        "grad_weights": None if query_weights is None else grad_weights,
    }
    (maxsim_calls.kernels or load()).maxsim_smooth_backward(
        problem, given, outputs, temperature, maxsim_calls.processors, maxsim_calls.seed
    )
    return *grads, grad_weights.to(queries.dtype if query_weights is None else query_weights.dtype)


_IMPLEMENTATIONS = {"maxsim_smooth_forward": forward, "maxsim_smooth_backward": backward}


@contextmanager
def in_place_of_triton(monkeypatch):
    """``maxsim_calls.in_place_of_triton`` for these operations."""
    with maxsim_calls.in_place_of_triton(monkeypatch, _IMPLEMENTATIONS):
        yield
