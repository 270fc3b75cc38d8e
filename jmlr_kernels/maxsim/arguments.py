"""What the public MaxSim functions ask of their arguments: one clear sentence for each that does not fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import any_autocast


def autocast(tensor: Tensor) -> Tensor:
    """The tensor in autocast's dtype where autocast is on; float64 stays."""
    if not any_autocast() or tensor.dtype == torch.float64:
        return tensor
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


def from_jagged(documents: Tensor, cu_seqlens: Tensor | None, candidates: bool) -> tuple[Tensor, Tensor, int]:
    """Values [T, D], offsets int32 [Nd + 1] and the longest document (0: unknown) of a jagged nested tensor."""
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
    longest = getattr(jagged, "_maybe_max_seqlen", None)  # known where the tensor was built from a list
    return jagged.values(), jagged.offsets().to(torch.int32), longest if isinstance(longest, int) else 0


def check(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    candidates: bool,
    max_seqlen: int | None = None,
) -> int:
    """Raise ValueError or TypeError where an argument does not fit.

    Returns the longest packed document's length where it is known without waiting for a GPU, else 0.
    """
    query_shape, document_shape = queries.shape, documents.shape
    dtype, device = queries.dtype, queries.device
    if len(query_shape) != 3 or query_shape[2] == 0:
        raise ValueError(f"queries must be [Nq, Lq, D] with D >= 1, but its shape is {list(query_shape)}")
    if cu_seqlens is not None:
        dims, wanted = 2, "packed [T, D], as cu_seqlens is given"
    elif candidates:
        dims, wanted = 4, "[Nq, K, Ld, D], or packed [T, D] with cu_seqlens"
    else:
        dims, wanted = 3, "[Nd, Ld, D], or packed [T, D] with cu_seqlens"
    if len(document_shape) != dims:
        raise ValueError(f"documents must be {wanted}, but its shape is {list(document_shape)}")
    if document_shape[-1] != query_shape[2]:
        raise ValueError(
            f"documents have D={document_shape[-1]} and queries D={query_shape[2]}; encode both to one dimension"
        )
    if dims == 4 and document_shape[0] != query_shape[0]:
        raise ValueError(
            f"documents hold candidates for {document_shape[0]} queries, but there are {query_shape[0]} queries"
        )
    if dtype != documents.dtype or not dtype.is_floating_point:
        raise TypeError(f"queries are {dtype} and documents {documents.dtype}; both must share one floating dtype")
    if documents.device != device:
        raise _elsewhere("documents", documents, device)
    longest = 0
    if cu_seqlens is not None:
        if cu_seqlens.device != device:
            raise _elsewhere("cu_seqlens", cu_seqlens, device)
        longest = _check_offsets(cu_seqlens, documents, query_shape[0] if candidates else None, max_seqlen)
    elif max_seqlen is not None:
        raise ValueError("max_seqlen is for packed documents; leave it out, or pass cu_seqlens")
    if query_mask is None and document_mask is None and query_weights is None:
        return longest
    _check_mask("query_mask", query_mask, query_shape[:2])
    _check_mask("document_mask", document_mask, document_shape[:-1])
    if query_weights is not None:
        if query_weights.shape != query_shape[:2]:
            raise ValueError(
                f"query_weights must be [Nq, Lq] = {list(query_shape[:2])}, but its shape is"
                f" {list(query_weights.shape)}"
            )
        if not query_weights.dtype.is_floating_point:
            raise TypeError(f"query_weights must be floating, but is {query_weights.dtype}; call .float() on it")
    for name, tensor in (
        ("query_mask", query_mask),
        ("document_mask", document_mask),
        ("query_weights", query_weights),
    ):
        if tensor is not None and tensor.device != device:
            raise _elsewhere(name, tensor, device)
    return longest


def _elsewhere(name: str, tensor: Tensor, device: torch.device) -> ValueError:
    return ValueError(f"{name} is on {tensor.device} and queries on {device}; move them together")


def _check_mask(name: str, mask: Tensor | None, shape: tuple[int, ...]) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool (True counts), but is {mask.dtype}; call .bool() on it")
    if mask.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, but its shape is {list(mask.shape)}")


def _check_offsets(cu_seqlens: Tensor, documents: Tensor, query_count: int | None, max_seqlen: int | None) -> int:
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
    if max_seqlen is not None and max_seqlen < 1:
        raise ValueError(f"max_seqlen must be the longest document's length in tokens, but is {max_seqlen}")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling() or _is_fake(cu_seqlens):
        return max_seqlen or 0
    first, last, lengths = int(cu_seqlens[0]), int(cu_seqlens[-1]), cu_seqlens.diff()
    if first != 0 or last != documents.shape[0] or bool((lengths < 0).any()):
        raise ValueError(
            f"cu_seqlens must rise from 0 to T={documents.shape[0]} without decreasing, but runs from {first} to {last}"
        )
    longest = max(1, int(lengths.max())) if lengths.numel() else 1
    if max_seqlen is not None and longest > max_seqlen:
        raise ValueError(f"max_seqlen={max_seqlen}, but cu_seqlens holds a document of {longest} tokens; raise it")
    return longest


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)
