"""MaxSim against int8 or float8 documents with one scale per token: half the memory and traffic of 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from .arguments import autocast
from .compressed import check_compressed

# The largest magnitude that is used of each type: int8 symmetrically, e4m3 to its largest finite number.
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize_documents(documents: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Document tokens with a scale each: ``scales[..., None] * values`` is near `documents`.

    The scale is the token's largest magnitude over the type's (127 for int8, 448 for float8 e4m3). An int8 element is
    off by half a scale at most; a float8 element by one part in 16, or by 2**-10 scales where that is more. A zero
    token decodes to zero exactly. A token that holds NaN or infinity gets scale NaN, so that its scores are NaN.

    Args:
        documents: floating [..., D]: [Nd, Ld, D], [Nq, K, Ld, D] or packed [T, D].
        dtype: torch.int8 or torch.float8_e4m3fn.

    Returns:
        values of `dtype` [..., D] and scales float32 [...], for :func:`maxsim_quantized`. Neither has a gradient.

    Raises:
        TypeError: `documents` are not floating, or `dtype` is neither type.
        ValueError: `documents` have no dimension of embeddings.
    """
    if dtype not in _LARGEST:
        raise TypeError(f"dtype={dtype}: documents are quantised to torch.int8 or torch.float8_e4m3fn")
    if not documents.dtype.is_floating_point:
        raise TypeError(f"documents are {documents.dtype}; pass the floating embeddings")
    if documents.dim() < 2 or documents.shape[-1] == 0:
        raise ValueError(f"documents must be [..., tokens, D] with D >= 1, but its shape is {list(documents.shape)}")
    precise = documents.detach().float()
    largest = precise.abs().amax(-1)
    # Not below the smallest normal number: a subnormal scale would be off by more than its rounding.
    scales = (largest / _LARGEST[dtype]).clamp_min(torch.finfo(torch.float32).tiny)
    scales = scales.masked_fill(~largest.isfinite(), torch.nan)
    values = (precise / scales[..., None]).nan_to_num_(0)
    if dtype == torch.int8:
        values = values.round_()
    return values.clamp_(-_LARGEST[dtype], _LARGEST[dtype]).to(dtype), scales


def maxsim_quantized(
    queries: Tensor,
    values: Tensor,
    scales: Tensor,
    *,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    query_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    candidates: bool = False,
    backend: str = "auto",
) -> Tensor:
    """MaxSim of queries against ``scales[..., None] * values``, which is never stored: see :func:`jmlr_kernels.maxsim`.

    The values are exact in every query dtype and the scale is applied to the float32 product, so that the score differs
    from the definition's on decoded documents by float32 sums alone. Forward only: reranking needs no gradient.

    Args:
        queries: [Nq, Lq, D], float16, bfloat16 or float32 (float64 with backend="torch").
        values: int8 or float8_e4m3fn [Nd, Ld, D]; [Nq, K, Ld, D] with `candidates`; packed [T, D] with `cu_seqlens`.
        scales: float32, the shape of `values` without D.
        query_mask: bool [Nq, Lq], True counts; holes are allowed.
        document_mask: bool of `scales`' shape, True counts, holes are allowed; excluded tokens are not read.
        query_weights: floating [Nq, Lq], one factor per query token.
        cu_seqlens: int32 [Nd + 1] ([Nq * K + 1] with `candidates`), token offsets of packed documents.
        candidates: each query meets its own K documents only.
        backend: "auto", "cuda", "triton", "cpu" or "torch"; a named backend that cannot run raises.

    Returns:
        Scores [Nq, Nd] ([Nq, K] with `candidates`), float32 (float64 for float64 queries). A document or a query
        without kept tokens scores 0; NaN in a kept token or its scale propagates.

    Raises:
        ValueError: shapes or offsets do not fit, or an argument requires a gradient while gradients are enabled.
        TypeError: a dtype does not fit.
        RuntimeError: the forced backend cannot run here.
    """
    if values.dtype not in _LARGEST:
        raise TypeError(f"values are {values.dtype}; pass int8 or float8_e4m3fn, as quantize_documents gives")
    if scales.dtype != torch.float32:
        raise TypeError(f"scales are {scales.dtype}; pass float32, as quantize_documents gives")
    check_compressed(
        "values",
        values,
        queries.shape[-1],
        queries,
        query_mask,
        document_mask,
        query_weights,
        cu_seqlens,
        candidates,
        {"scales": scales},
    )
    if scales.shape != values.shape[:-1]:
        raise ValueError(
            f"scales must be {list(values.shape[:-1])}, one per token, but its shape is {list(scales.shape)}"
        )
    queries = autocast(queries)
    return ops.call(
        "maxsim_quantized_forward",
        queries,
        values,
        scales,
        query_mask,
        document_mask,
        query_weights,
        cu_seqlens,
        candidates,
        ops.resolve_backend(backend, queries, "maxsim_quantized_forward"),
    )
