"""MaxSim in plain torch, every form that a user might write, for all three layouts.

Each takes (queries, documents) and returns float32 scores; `mask` is bool [Nd, Ld] for padded documents of different
lengths. All keep similarities in the input dtype, as code under autocast does.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Similarities that chunk-and-recompute holds at a time.
CHUNK_BYTES = 128 * 1024 * 1024


def _summed(similarities: Tensor, mask: Tensor | None, query_tokens: int, dtype: torch.dtype) -> Tensor:
    """Maximum over the last dimension, then the sum over query tokens in `dtype`."""
    if mask is not None:
        shape = (1, mask.shape[0], 1, mask.shape[1]) if query_tokens == 2 else (1, 1, *mask.shape)
        similarities = similarities.masked_fill(~mask.view(shape), float("-inf"))
    return similarities.amax(-1).sum(query_tokens, dtype=dtype).float()


def einsum(
    queries: Tensor, documents: Tensor, mask: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The definition in one line over a stored [Nq, N, Lq, Ld] tensor."""
    pattern = "qld,qkmd->qklm" if documents.dim() == 4 else "qld,nmd->qnlm"
    return _summed(torch.einsum(pattern, queries, documents), mask, 2, dtype)


def einsum_input_dtype(queries: Tensor, documents: Tensor, mask: Tensor | None = None) -> Tensor:
    """As libraries write it: the sum over query tokens in the input dtype too."""
    return einsum(queries, documents, mask, queries.dtype)


def gemm(queries: Tensor, documents: Tensor, mask: Tensor | None = None) -> Tensor:
    """One matrix product over all tokens (one per query for candidates), then the maximum over each document's."""
    if documents.dim() == 4:
        similarities = queries @ documents.flatten(1, 2).transpose(1, 2)
        return _summed(similarities.unflatten(2, documents.shape[1:3]), mask, 1, torch.float32)
    similarities = queries.flatten(0, 1) @ documents.flatten(0, 1).T
    return _summed(similarities.view(*queries.shape[:2], *documents.shape[:2]), mask, 1, torch.float32)


def recompute(queries: Tensor, documents: Tensor, mask: Tensor | None = None) -> Tensor:
    """Blocks of documents, each recomputed in the backward: the fair baseline for memory."""
    along = documents.dim() - 3  # the documents' own dimension
    tokens = queries.shape[0] * queries.shape[1] * documents.shape[along + 1]
    block = max(1, CHUNK_BYTES // (tokens * queries.element_size()))
    parts = []
    for first in range(0, documents.shape[along], block):
        some = documents.narrow(along, first, min(block, documents.shape[along] - first))
        scores = partial(gemm, mask=None if mask is None else mask[first : first + block])
        # Nothing is random in there, and reading the generator's state would forbid a CUDA graph.
        part = checkpoint(scores, queries, some, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(part, Tensor)
        parts.append(part)
    return torch.cat(parts, dim=1)
