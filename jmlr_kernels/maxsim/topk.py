"""Exact search: the k best documents of a corpus for every query, without ever storing all scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import from_jagged
from .function import maxsim

# Of one chunk: elements of its embeddings (128 MiB in 16 bits), and of its scores and their winners per query token.
_CHUNK_EMBEDDINGS = 2**26
_CHUNK_SCORES = 2**25


class _Part(NamedTuple):
    """Consecutive documents: padded [n, Ld, D], or packed [T, D] with offsets that start at 0."""

    number: int
    documents: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None


@torch.no_grad()
def maxsim_topk(
    queries: Tensor,
    corpus: Tensor | Iterable[Tensor | tuple[Tensor, Tensor | None]],
    k: int,
    *,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    query_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalize: bool = False,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k documents with the highest :func:`maxsim` of every query, best first, exactly and without gradient.

    The corpus is scored in chunks, each merged into the k best so far, so that memory is bounded by a chunk whatever
    the number of documents. Equal scores go to the lowest document index; NaN comes first, as in `torch.topk`.

    Args:
        queries: [Nq, Lq, D].
        corpus: [Nd, Ld, D]; packed [T, D] with `cu_seqlens`; a jagged nested tensor; or an iterable of padded tensors
            [n, L, D], each alone or with its mask [n, L] as a pair, whose lengths may differ. It may lie on another
            device than the queries: chunks are moved as they come, from a CPU through pinned memory.
        k: how many documents to return, at most as many as there are.
        query_mask: bool [Nq, Lq], True counts.
        document_mask: bool [Nd, Ld], or [T] for packed documents, on the corpus's device; not for an iterable.
        query_weights: floating [Nq, Lq].
        cu_seqlens: int32 [Nd + 1]. A CPU tensor is best: chunks are cut on the host, which waits once for a GPU's.
        normalize: scale every token of both sides to unit length first.
        chunk_size: documents scored at a time; by default as many as keep a chunk within a few hundred megabytes.
        backend: as in :func:`maxsim`.

    Returns:
        Scores [Nq, k], descending, float32 (float64 for float64 inputs), and document indices int64 [Nq, k], both on
        the queries' device.

    Raises:
        ValueError: k exceeds the number of documents, or a shape or option does not fit.
        TypeError: a dtype does not fit.
        RuntimeError: the forced backend cannot run here.
    """
    for name, value in (("k", k), ("chunk_size", chunk_size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r} must be a positive integer")
    if queries.dim() != 3:
        raise ValueError(f"queries must be [Nq, Lq, D], but its shape is {list(queries.shape)}")
    best = queries.new_empty((queries.shape[0], 0), dtype=torch.float32)
    indices = torch.empty(best.shape, dtype=torch.int64, device=queries.device)
    seen = 0
    for part in _parts(queries, corpus, document_mask, cu_seqlens, chunk_size):
        scores = maxsim(
            queries,
            _to_device(part.documents, queries.device),
            query_mask=query_mask,
            document_mask=None if part.mask is None else _to_device(part.mask, queries.device),
            query_weights=query_weights,
            cu_seqlens=None if part.cu_seqlens is None else _to_device(part.cu_seqlens, queries.device),
            normalize=normalize,
            backend=backend,
        )
        new = torch.arange(seen, seen + part.number, device=queries.device)
        best, indices = _merge(best, indices, scores, new, k)
        seen += part.number
    if k > seen:
        raise ValueError(f"k={k} exceeds the {seen} documents of the corpus; ask for at most {seen}")
    return best, indices


def _merge(best: Tensor, indices: Tensor, scores: Tensor, new: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of both. What was found before comes first and has the lower indices: a stable sort settles ties."""
    scores, order = torch.cat((best.to(scores.dtype), scores), 1).sort(dim=1, descending=True, stable=True)
    indices = torch.cat((indices, new.expand(len(indices), -1)), 1)
    # A copy of the first k: a view would keep the chunk's scores alive.
    return scores[:, :k].clone(), indices.gather(1, order[:, :k])


def _parts(
    queries: Tensor,
    corpus: Tensor | Iterable[Tensor | tuple[Tensor, Tensor | None]],
    document_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
) -> Iterator[_Part]:
    rows = max(1, queries.shape[0] * queries.shape[1])
    if not isinstance(corpus, Tensor):
        if document_mask is not None or cu_seqlens is not None:
            raise ValueError("corpus is an iterable of padded tensors; give each its mask as a pair (documents, mask)")
        for item in corpus:
            documents, mask = (item, None) if isinstance(item, Tensor) else item
            yield from _padded(rows, documents, mask, chunk_size)
        return
    if corpus.is_nested:
        corpus, cu_seqlens, _ = from_jagged(corpus, cu_seqlens, False)
    if cu_seqlens is None:
        yield from _padded(rows, corpus, document_mask, chunk_size)
    else:
        yield from _packed(rows, corpus, document_mask, cu_seqlens, chunk_size)


def _padded(rows: int, documents: Tensor, mask: Tensor | None, chunk_size: int | None) -> Iterator[_Part]:
    if documents.dim() != 3:
        raise ValueError(
            "corpus must be padded [Nd, Ld, D], packed [T, D] with cu_seqlens, or an iterable of padded tensors, but"
            f" its shape is {list(documents.shape)}"
        )
    if mask is not None and mask.shape != documents.shape[:2]:
        raise ValueError(f"document_mask must be {list(documents.shape[:2])}, but its shape is {list(mask.shape)}")
    count, length, dimension = documents.shape
    step = chunk_size or max(1, min(_CHUNK_EMBEDDINGS // max(1, length * dimension), _CHUNK_SCORES // rows))
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield _Part(stop - start, documents[start:stop], None if mask is None else mask[start:stop], None)


def _packed(
    rows: int, documents: Tensor, mask: Tensor | None, cu_seqlens: Tensor, chunk_size: int | None
) -> Iterator[_Part]:
    if documents.dim() != 2:
        raise ValueError(
            f"corpus must be packed [T, D], as cu_seqlens is given, but its shape is {list(documents.shape)}"
        )
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"cu_seqlens must be int32 [Nd + 1], but is {cu_seqlens.dtype} {list(cu_seqlens.shape)}; call .int() on it"
        )
    if mask is not None and mask.shape != documents.shape[:1]:
        raise ValueError(f"document_mask must be {list(documents.shape[:1])}, but its shape is {list(mask.shape)}")
    offsets = cu_seqlens.cpu()
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != documents.shape[0] or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"cu_seqlens must rise from 0 to T={documents.shape[0]} without decreasing, but runs from {first} to {last}"
        )
    count = offsets.shape[0] - 1
    tokens = max(1, _CHUNK_EMBEDDINGS // max(1, documents.shape[1]))
    most = chunk_size or max(1, _CHUNK_SCORES // rows)
    start = 0
    while start < count:
        stop = min(start + most, count)
        if chunk_size is None:  # as many documents as the tokens of a chunk hold, and at least one
            within = int(torch.searchsorted(offsets, int(offsets[start]) + tokens, right=True)) - 1
            stop = min(stop, max(start + 1, within))
        low, high = int(offsets[start]), int(offsets[stop])
        part_mask = None if mask is None else mask[low:high]
        yield _Part(stop - start, documents[low:high], part_mask, offsets[start : stop + 1] - low)
        start = stop


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. From a CPU to a GPU through pinned memory, so that copying overlaps with scoring."""
    if tensor.device == device:
        return tensor
    if tensor.device.type == "cpu" and device.type == "cuda":
        return (tensor if tensor.is_pinned() else tensor.contiguous().pin_memory()).to(device, non_blocking=True)
    return tensor.to(device)
