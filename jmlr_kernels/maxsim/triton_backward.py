"""MaxSim backward in Triton: from the winners, deterministic, without atomics and without recomputed similarities.

Each output element has one owner, which adds in a fixed order and writes once, in the input's dtype: d(queries) in
triton_query_gradient.py, d(documents) in triton_document_gradient.py. Derivation: docs/maxsim-backward.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gradient_rule import unpack
from .layout import layout_of, winner_code
from .triton_document_gradient import document_gradient
from .triton_forward import as_bytes, as_list, unit_stride
from .triton_query_gradient import query_gradient


def backward(
    rule_tensors: list[Tensor],
    queries: Tensor,
    documents: Tensor,
    winners: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    query_scales: Tensor | None,
    document_scales: Tensor | None,
    rule: str,
    candidates: bool,
    max_length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, documents and query_weights in their shapes and dtypes; two runs are bit-identical.

    The third is an empty tensor when there are no weights.
    """
    sizes = layout_of(queries, documents, cu_seqlens, candidates)
    code = winner_code(documents, cu_seqlens, max_length)
    if winners.numel() == 0:
        none = torch.zeros(
            (0,) if query_weights is None else query_weights.shape,
            dtype=(queries if query_weights is None else query_weights).dtype,
            device=queries.device,
        )
        return _zeros(queries), _zeros(documents), none
    kept = None if code.marked or document_mask is None else as_bytes(document_mask.any(-1).flatten())
    common = (
        sizes,
        code,
        rule,
        unpack(rule, rule_tensors),
        unit_stride(queries),
        as_list(documents),
        winners.contiguous(),
        None if code.marked else as_bytes(query_mask),
        kept,
        None if query_weights is None else query_weights.contiguous(),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        query_scales,
        document_scales,
    )
    grad_queries, grad_weights = query_gradient(*common)
    return grad_queries, document_gradient(*common, documents.shape), grad_weights


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
