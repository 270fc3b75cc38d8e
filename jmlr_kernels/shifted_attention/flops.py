"""Exact work counts. A score pair is one (query, key) that may attend; every FLOP figure of the project counts pairs.

Convention (FlashAttention's): forward 4 * D per pair (two matrix products), backward 10 * D (five).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor


class AttentionPairs(NamedTuple):
    """Score pairs of one document in one plain head and in one shifted head."""

    plain: int
    shifted: int

    def total(self, heads: int) -> int:
        """Pairs over all query heads of one document: the first ``heads // 2`` are plain."""
        return heads // 2 * self.plain + (heads - heads // 2) * self.shifted


def _triangle(length: int) -> int:
    return length * (length + 1) // 2


def _grouped(length: int, group_size: int) -> int:
    return length // group_size * _triangle(group_size) + _triangle(length % group_size)


def attention_pairs(length: int, group_size: int, boundary: str = "split") -> AttentionPairs:
    """Exact number of score pairs in a document of `length` tokens, for one plain and for one shifted head.

    ``attention_pairs(S, G).total(H)`` is the count over H query heads. "wrap" has groups of the same sizes in both
    halves (in rolled order), so its shifted count equals the plain one.
    """
    plain = _grouped(length, group_size)
    if boundary == "wrap":
        return AttentionPairs(plain, plain)
    first = min(group_size // 2, length)
    return AttentionPairs(plain, _triangle(first) + _grouped(length - first, group_size))


def _values(lengths: torch.Tensor | None) -> list[int] | None:
    """The numbers in a tensor, or None where there are none to read (no tensor, or a fake one)."""
    if lengths is None or isinstance(lengths, FakeTensor) or lengths.device.type == "meta":
        return None
    return [int(value) for value in lengths.tolist()]


def _total_pairs(
    q: torch.Tensor, group_size: int, cu_seqlens: torch.Tensor | None, seq_lens: torch.Tensor | None, wrap: bool
) -> int:
    """Pairs of a whole call. Without readable lengths, every row counts as one full document (an upper bound)."""
    if q.dim() == 3:
        ends = _values(cu_seqlens) or [0, q.shape[0]]
        lengths = [end - start for start, end in zip(ends[:-1], ends[1:], strict=True)]
    else:
        batch, longest = q.shape[:2]
        read = _values(seq_lens)
        lengths = [longest] * batch if read is None else [max(0, min(length, longest)) for length in read]
    boundary = "wrap" if wrap else "split"
    return sum(attention_pairs(length, group_size, boundary).total(q.shape[-2]) for length in lengths)


def forward_flops(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group_size: int,
    cu_seqlens: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    wrap: bool,
    *_: Any,
) -> int:
    """Useful FLOPs of ``shifted_attention_forward``; same arguments as the operation."""
    return 4 * q.shape[-1] * _total_pairs(q, group_size, cu_seqlens, seq_lens, wrap)


def backward_flops(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    group_size: int,
    cu_seqlens: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    wrap: bool,
    *_: Any,
) -> int:
    """Useful FLOPs of ``shifted_attention_backward``; same arguments as the operation."""
    return 10 * q.shape[-1] * _total_pairs(q, group_size, cu_seqlens, seq_lens, wrap)
