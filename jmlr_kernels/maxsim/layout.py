"""The sizes that every MaxSim backend derives from its arguments, and the integers that winners are saved in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Sizes of one MaxSim problem.

    `documents_per_query` is Nd when every query meets every document, K for candidates; `document_length` is None
    for packed documents, whose lengths only `cu_seqlens` holds.
    """

    query_count: int
    query_length: int
    dimension: int
    documents_per_query: int
    document_length: int | None
    candidates: bool

    @property
    def document_count(self) -> int:
        """Documents in memory: Nd, or Nq * K."""
        return self.documents_per_query * (self.query_count if self.candidates else 1)

    @property
    def winners_shape(self) -> tuple[int, int, int]:
        return (self.query_count, self.documents_per_query, self.query_length)


def layout_of(queries: Tensor, documents: Tensor, cu_seqlens: Tensor | None, candidates: bool) -> Layout:
    """Sizes from checked arguments: queries [Nq, Lq, D]; documents [Nd, Ld, D], [Nq, K, Ld, D] or packed [T, D]."""
    query_count, query_length, dimension = queries.shape
    if cu_seqlens is None:
        per_query, length = documents.shape[-3], documents.shape[-2]
    else:
        per_query, length = cu_seqlens.shape[0] - 1, None
        if candidates:
            per_query = per_query // query_count if query_count else 0
    return Layout(query_count, query_length, dimension, per_query, length, candidates)


def score_dtype(queries: Tensor) -> torch.dtype:
    """Scores are float32 whatever the inputs; float64 inputs keep float64, so that gradcheck can see through."""
    return torch.float64 if queries.dtype == torch.float64 else torch.float32


class WinnerCode(NamedTuple):
    """How a winner's position is saved: `dtype`, the value `none` for "nobody won", and whether there is one.

    Documents of exactly 256 or 65,536 tokens use every value of their integer. They are not `marked`: who has no winner
    then follows from the masks alone.
    """

    dtype: torch.dtype
    none: int
    marked: bool


def winner_code(documents: Tensor, cu_seqlens: Tensor | None, max_length: int) -> WinnerCode:
    """The smallest integer that holds a position in any document; `max_length` (0: unknown) bounds packed ones."""
    if cu_seqlens is None:
        longest = documents.shape[-2]
    else:  # one value more, so that packed documents are always marked
        longest = 1 + (min(max_length, documents.shape[0]) if max_length else documents.shape[0])
    if longest <= 2**8:
        return WinnerCode(torch.uint8, 2**8 - 1, longest < 2**8 or cu_seqlens is not None)
    if longest <= 2**16:
        return WinnerCode(torch.uint16, 2**16 - 1, longest < 2**16 or cu_seqlens is not None)
    return WinnerCode(torch.int32, -1, True)


def decode_winners(
    winners: Tensor, code: WinnerCode, query_mask: Tensor | None, document_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Positions int32 [Nq, N, Lq] and where they hold (bool, broadcastable to that shape; None: everywhere).

    A position that does not hold is any number. `document_mask` is [Nd, Ld] or [Nq, K, Ld].
    """
    positions = winners.to(torch.int32)
    if code.marked:
        return positions, positions != code.none
    valid = None if query_mask is None else query_mask[:, None, :]
    if document_mask is not None:
        kept = document_mask.any(-1)[..., None]  # [Nd, 1] or [Nq, K, 1]
        valid = kept.expand(*winners.shape[:2], 1) if valid is None else kept & valid
    return positions, valid
