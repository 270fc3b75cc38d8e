"""Forward pass in Triton: one launch over all query heads of both halves, no copy of q, k or v.

A program owns BLOCK_M query positions of one head and walks the keys of its group(s) only, with FlashAttention-2's
running maximum and sum (Dao, arXiv 2307.08691). Key tiles before the diagonal need no mask when all the program's
queries lie in one group; the rest are masked by ``start(p_i) <= p_j <= p_i``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import launch
from . import config, triton_forward_tma
from .function import contiguous_like, lse_like
from .triton_common import (
    LN_2,
    LOG2_E,
    capability_of,
    compact,
    group_start,
    has_descriptors,
    layout,
    load_tile,
    locate,
    longest_group,
    options,
    shift_and_roll,
    store_tile,
    strides,
    token_of,
)


@triton.jit
def _attend(
    acc,
    total,
    largest,
    queries,
    position,
    start,
    k,
    v,
    stride_k,
    stride_v,
    begin,
    end,
    roll,
    length,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WRAP: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Takes the keys at positions begin .. end - 1 into the running softmax (base 2) of the query tile."""
    column = tl.arange(0, BLOCK_D)
    for tile in range(begin, end, BLOCK_N):
        key_position = tile + tl.arange(0, BLOCK_N)
        token = token_of(key_position, roll, length, WRAP)
        keys = load_tile(k, token, stride_k, column, key_position < end, MASKED, HEAD_DIM, BLOCK_D)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale_log2
        if MASKED:
            attends = (key_position[None, :] >= start[:, None]) & (key_position[None, :] <= position[:, None])
            scores = tl.where(attends, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        # A tile over several groups holds rows that see none of these keys yet: -inf minus -inf must not appear.
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest) if MASKED else new_largest
        weights = tl.exp2(scores - reference[:, None])
        rescale = tl.exp2(largest - reference)
        total = total * rescale + tl.sum(weights, 1)
        values = load_tile(v, token, stride_v, column, key_position < end, MASKED, HEAD_DIM, BLOCK_D)
        acc = tl.dot(weights.to(values.dtype), values, acc * rescale[:, None], input_precision=PRECISION)
        largest = new_largest
    return acc, total, largest


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    cu_seqlens,
    seq_lens,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    rows,
    documents,
    tiles,
    heads,
    ratio,
    group_size,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_LENS: tl.constexpr,
    WRAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Heads vary fastest: programs that run together share kv heads, and differ in length as little as possible.
    program = tl.program_id(0)
    head = program % heads
    batch, first, tile, owned, length = locate(
        program // heads, cu_seqlens, seq_lens, rows, documents, tiles, BLOCK_M, PACKED, HAS_LENS
    )
    if tile >= owned:
        return
    shift, roll = shift_and_roll(head, heads, group_size, length, WRAP)
    position = tile + tl.arange(0, BLOCK_M)
    start = group_start(position, shift, group_size)
    inside = position < length
    row = first + token_of(position, roll, length, WRAP)
    column = tl.arange(0, BLOCK_D)

    q += batch * stride_qb + tl.cast(head, tl.int64) * stride_qh
    k += batch * stride_kb + tl.cast(first, tl.int64) * stride_ks + tl.cast(head // ratio, tl.int64) * stride_kh
    v += batch * stride_vb + tl.cast(first, tl.int64) * stride_vs + tl.cast(head // ratio, tl.int64) * stride_vh
    queries = load_tile(q, row, stride_qs, column, inside, True, HEAD_DIM, BLOCK_D)

    end = tl.minimum(tile + BLOCK_M, length)
    low = tl.minimum(group_start(tile, shift, group_size), end)
    one_group = group_start(tl.maximum(end - 1, tile), shift, group_size) == low
    unmasked = tl.where(one_group & (end > tile), low + (tile - low) // BLOCK_N * BLOCK_N, low)
    end = tl.where(end > tile, end, low)  # a tile of padding alone

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    scale_log2 = scale * LOG2_E
    acc, total, largest = _attend(
        acc, total, largest, queries, position, start, k, v, stride_ks, stride_vs, low, unmasked, roll, length,
        scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N, WRAP, PRECISION, False,
    )  # fmt: skip
    acc, total, largest = _attend(
        acc, total, largest, queries, position, start, k, v, stride_ks, stride_vs, unmasked, end, roll, length,
        scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N, WRAP, PRECISION, True,
    )  # fmt: skip

    total = tl.where(inside, total, 1.0)
    acc = tl.where(inside[:, None], acc * (1.0 / total)[:, None], 0.0)
    log_sum = tl.where(inside, (largest + tl.log2(total)) * LN_2, float("inf"))
    out += (batch * rows * heads + head) * HEAD_DIM
    lse += (batch * heads + head) * rows
    store_tile(out, row, heads * HEAD_DIM, column, acc, position < owned, HEAD_DIM)
    tl.store(lse + row, log_sum, mask=position < owned)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group_size: int,
    cu_seqlens: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    wrap: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operation ``shifted_attention_forward``: (out, lse); lse of padding is +inf."""
    out, lse = contiguous_like(q), lse_like(q)
    if q.numel() == 0:
        return out, lse
    cu_seqlens, seq_lens, effective = compact(cu_seqlens), compact(seq_lens), longest_group(q, group_size, wrap)
    heads, head_dim = q.shape[-2:]
    capability = capability_of(q)
    if config.tma_kernel("forward", q.dtype, head_dim, capability, group_size, wrap, scale) and has_descriptors(
        q, k, v
    ):
        triton_forward_tma.launch_forward(q, k, v, out, lse, effective, cu_seqlens, seq_lens, scale)
        return out, lse
    tiles = config.tiles("forward", q.dtype, head_dim, capability, wrap)
    rows, documents, row_tiles, programs = layout(q, tiles.block_m, cu_seqlens)
    launch(
        forward_kernel,
        programs * heads,
        (
            q, k, v, out, lse, cu_seqlens, seq_lens, *strides(q), *strides(k), *strides(v),
            rows, documents, row_tiles, heads, heads // k.shape[-2], effective, scale,
        ),
        (
            head_dim, config.block_d(head_dim), tiles.block_m, tiles.block_n, cu_seqlens is not None,
            seq_lens is not None, wrap, config.input_precision(q.dtype, head_dim),
        ),
        options(tiles),
    )  # fmt: skip
    return out, lse
