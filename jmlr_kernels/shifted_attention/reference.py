"""Shifted sparse attention as a definition: dense masks, one document at a time, any dtype, autograd through it.

Written to be read and to be compared with, never to be fast: it stores a [H, S, S] score tensor per document.

LongLoRA (arXiv 2309.12307) cuts a sequence into groups of `group_size` tokens and attends causally inside each
group; half of the heads shift their groups by half a group, so that information flows between neighbours. Two
rules exist for the ends of the sequence. "split" (LongLoRA's flash path, which trained its models) leaves half
groups at both ends. "wrap" (its paper's pseudocode) rolls the sequence, so that the last group joins the last and
the first tokens in *rolled* order: the first tokens read the last ones. It leaks, and is kept for comparison.
"""

from __future__ import annotations

import torch


def order_of(length: int, group_size: int, boundary: str, device: torch.device | None = None) -> torch.Tensor:
    """The tokens in the order in which shifted heads walk them, int64 [length]: order[p] is a token's index.

    "split" walks them as they are; "wrap" starts `group_size // 2` tokens later and comes around. The first half
    group of "split" has `group_size // 2` tokens too, so both cut an odd group at the same places.
    """
    tokens = torch.arange(length, device=device)
    if boundary == "split":
        return tokens
    return (tokens + group_size // 2) % max(length, 1)


def allowed(
    length: int,
    group_size: int,
    heads: int,
    boundary: str = "split",
    device: torch.device | None = None,
) -> torch.Tensor:
    """Which query may attend to which key in a document of `length` tokens: bool [heads, length (i), length (j)]."""
    token = torch.arange(length, device=device)
    position = torch.empty_like(token)
    position[order_of(length, group_size, boundary, device)] = token
    shift = group_size - group_size // 2 if boundary == "split" else 0

    def one_half(position: torch.Tensor, shift: int) -> torch.Tensor:
        group = (position + shift) // group_size
        return (position[None, :] <= position[:, None]) & (group[None, :] == group[:, None])

    plain, shifted = one_half(token, 0), one_half(position, shift)
    return torch.stack([plain if head < heads // 2 else shifted for head in range(heads)])


def _document(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group_size: int, boundary: str, scale: float
) -> torch.Tensor:
    """One document without padding: q [S, H, D], k and v [S, Hkv, D] -> [S, H, D]."""
    length, heads, _ = q.shape
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    v = v.repeat_interleave(heads // v.shape[1], dim=1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    scores = scores.masked_fill(~allowed(length, group_size, heads, boundary, q.device), float("-inf"))
    return torch.einsum("hij,jhd->ihd", torch.softmax(scores, dim=-1), v)


def _nothing(padding: torch.Tensor) -> torch.Tensor:
    """Zeros with a zero gradient, whatever the padding holds (a product with 0 would keep NaN)."""
    return padding.masked_fill(torch.ones_like(padding, dtype=torch.bool), 0)


def shifted_sparse_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group_size: int,
    *,
    cu_seqlens: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    boundary: str = "split",
    scale: float | None = None,
) -> torch.Tensor:
    """The definition. Same arguments as :func:`jmlr_kernels.shifted_sparse_attention`, less the backend.

    Args:
        q: [B, S, H, D], or packed [T, H, D]. k, v: the same with Hkv heads, H a multiple of Hkv.
        group_size: G, in tokens.
        cu_seqlens: int32 [N + 1], the documents of a packed batch; grouping restarts in each.
        seq_lens: int32 [B], each row's number of tokens before its right padding; the row's groups end there.

    Returns:
        The shape and dtype of q; rows outside every document are zero.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        pieces = [
            _document(q[start:end], k[start:end], v[start:end], group_size, boundary, scale)
            for start, end in zip(ends[:-1], ends[1:], strict=True)
        ]
        return torch.cat([*pieces, _nothing(q[ends[-1] :])])
    rows = []
    for row in range(q.shape[0]):
        length = q.shape[1] if seq_lens is None else int(seq_lens[row])
        out = _document(q[row, :length], k[row, :length], v[row, :length], group_size, boundary, scale)
        rows.append(torch.cat([out, _nothing(q[row, length:])]))
    return torch.stack(rows) if rows else _nothing(q)
