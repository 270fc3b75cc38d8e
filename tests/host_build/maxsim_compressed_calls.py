"""MaxSim against compressed documents on the emulated CUDA kernels: arguments and results of ``jmlr_kernels/ops.py``.

Work is divided, and threads take their turns, as ``maxsim_calls`` says."""

from __future__ import annotations

from contextlib import contextmanager

import maxsim_calls
import torch
from host_module import load

from jmlr_kernels.maxsim import residual
from jmlr_kernels.maxsim.layout import layout_of
from jmlr_kernels.maxsim.triton_forward import unit_stride


def _problem_and_scores(queries, stored, optional, candidates):
    sizes = layout_of(queries, stored, optional[3], candidates)
    scores = maxsim_calls.poisoned((sizes.query_count, sizes.documents_per_query), torch.float32)
    return maxsim_calls.problem(queries, stored, *optional, candidates, 0), scores


def quantized_forward(
    queries, values, scales, query_mask, document_mask, query_weights, cu_seqlens, candidates
):  # fmt: skip
    """Scores: as ``triton_compressed.quantized_forward``."""
    optional = (query_mask, document_mask, query_weights, cu_seqlens)
    problem, scores = _problem_and_scores(queries, values.view(torch.uint8), optional, candidates)
    (maxsim_calls.kernels or load()).maxsim_quantized_forward(
        problem, values.dtype != torch.int8, scales.contiguous(), scores, maxsim_calls.processors, maxsim_calls.seed
    )
    return scores


def residual_forward(
    queries, codes, residuals, centroids, field_weights, query_mask, document_mask, query_weights, cu_seqlens,
    normalize, candidates,
):  # fmt: skip
    """Scores: as ``triton_compressed.residual_forward``."""
    optional = (query_mask, document_mask, query_weights, cu_seqlens)
    problem, scores = _problem_and_scores(queries, residuals, optional, candidates)
    tables = {
        "codes": codes.contiguous(),
        "centroids": unit_stride(centroids),
        "field_weights": field_weights.contiguous(),
    }
    (maxsim_calls.kernels or load()).maxsim_residual_forward(
        problem, tables, normalize, scores, maxsim_calls.processors, maxsim_calls.seed
    )
    return scores


_IMPLEMENTATIONS = {"maxsim_quantized_forward": quantized_forward, "maxsim_residual_forward": residual_forward}


@contextmanager
def in_place_of_triton(monkeypatch):
    """``maxsim_calls.in_place_of_triton`` for these operations; residual codes of any D, which Triton does not take."""
    with maxsim_calls.in_place_of_triton(monkeypatch, _IMPLEMENTATIONS), monkeypatch.context() as patch:
        patch.setattr(residual, "RESIDUAL_DIMENSION", 2**31)
        yield
