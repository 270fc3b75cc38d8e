"""Backward pass in Triton, without atomics: every gradient tile has one program that owns it.

The first launch owns query tiles: it computes ``delta = rowsum(grad_out * out)`` and dq. The second owns key tiles
of kv heads: it walks the query heads of its kv head, plain and shifted, in a fixed order, and keeps dk and dv in
registers. Two runs are bit-identical. The derivation is docs/shifted-attention-backward.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import launch
from . import config, triton_backward_tma
from .function import contiguous_like
from .triton_common import (
    LOG2_E,
    capability_of,
    compact,
    group_end,
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
def _walk_keys(
    dq,
    queries,
    grads,
    log_sum,
    delta,
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
    """Adds to dq (without the scale) what the keys at positions begin .. end - 1 contribute."""
    column = tl.arange(0, BLOCK_D)
    for tile in range(begin, end, BLOCK_N):
        key_position = tile + tl.arange(0, BLOCK_N)
        token = token_of(key_position, roll, length, WRAP)
        keys = load_tile(k, token, stride_k, column, key_position < end, MASKED, HEAD_DIM, BLOCK_D)
        values = load_tile(v, token, stride_v, column, key_position < end, MASKED, HEAD_DIM, BLOCK_D)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale_log2
        weights = tl.exp2(scores - log_sum[:, None])
        if MASKED:
            attends = (key_position[None, :] >= start[:, None]) & (key_position[None, :] <= position[:, None])
            weights = tl.where(attends, weights, 0.0)
        grad_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - delta[:, None])
        dq = tl.dot(grad_scores.to(keys.dtype), keys, dq, input_precision=PRECISION)
    return dq


@triton.jit
def backward_dq_kernel(
    grad_out,
    q,
    k,
    v,
    out,
    lse,
    delta,
    dq,
    cu_seqlens,
    seq_lens,
    stride_gb,
    stride_gs,
    stride_gh,
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

    head_long = tl.cast(head, tl.int64)
    kv_head = tl.cast(head // ratio, tl.int64)
    first_long = tl.cast(first, tl.int64)
    grad_out += batch * stride_gb + head_long * stride_gh
    q += batch * stride_qb + head_long * stride_qh
    k += batch * stride_kb + first_long * stride_ks + kv_head * stride_kh
    v += batch * stride_vb + first_long * stride_vs + kv_head * stride_vh
    out += (batch * rows * heads + head) * HEAD_DIM
    dq += (batch * rows * heads + head) * HEAD_DIM
    lse += (batch * heads + head) * rows
    delta += (batch * heads + head) * rows

    grads = load_tile(grad_out, row, stride_gs, column, inside, True, HEAD_DIM, BLOCK_D)
    outs = load_tile(out, row, heads * HEAD_DIM, column, inside, True, HEAD_DIM, BLOCK_D)
    delta_tile = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
    tl.store(delta + row, delta_tile, mask=position < owned)
    queries = load_tile(q, row, stride_qs, column, inside, True, HEAD_DIM, BLOCK_D)
    log_sum = tl.load(lse + row, mask=inside, other=float("inf")) * LOG2_E

    end = tl.minimum(tile + BLOCK_M, length)
    low = tl.minimum(group_start(tile, shift, group_size), end)
    one_group = group_start(tl.maximum(end - 1, tile), shift, group_size) == low
    unmasked = tl.where(one_group & (end > tile), low + (tile - low) // BLOCK_N * BLOCK_N, low)
    end = tl.where(end > tile, end, low)  # a tile of padding alone

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    scale_log2 = scale * LOG2_E
    acc = _walk_keys(
        acc, queries, grads, log_sum, delta_tile, position, start, k, v, stride_ks, stride_vs, low, unmasked, roll,
        length, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N, WRAP, PRECISION, False,
    )  # fmt: skip
    acc = _walk_keys(
        acc, queries, grads, log_sum, delta_tile, position, start, k, v, stride_ks, stride_vs, unmasked, end, roll,
        length, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N, WRAP, PRECISION, True,
    )  # fmt: skip
    acc = tl.where(inside[:, None], acc * scale, 0.0)
    store_tile(dq, row, heads * HEAD_DIM, column, acc, position < owned, HEAD_DIM)


@triton.jit
def _walk_queries(
    dk,
    dv,
    keys,
    values,
    key_position,
    key_end,
    q,
    grad_out,
    lse,
    delta,
    stride_q,
    stride_g,
    begin,
    end,
    roll,
    length,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WRAP: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds to dk (without the scale) and dv what one head's queries at positions begin .. end - 1 contribute."""
    column = tl.arange(0, BLOCK_D)
    for tile in range(begin, end, BLOCK_M):
        position = tile + tl.arange(0, BLOCK_M)
        token = token_of(position, roll, length, WRAP)
        queries = load_tile(q, token, stride_q, column, position < end, MASKED, HEAD_DIM, BLOCK_D)
        grads = load_tile(grad_out, token, stride_g, column, position < end, MASKED, HEAD_DIM, BLOCK_D)
        if MASKED:
            log_sum = tl.load(lse + token, mask=position < end, other=float("inf")) * LOG2_E
            delta_tile = tl.load(delta + token, mask=position < end, other=0.0)
        else:
            log_sum = tl.load(lse + token) * LOG2_E
            delta_tile = tl.load(delta + token)
        # Scores with keys as rows, so that the products below need no transposed accumulator.
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale_log2
        weights = tl.exp2(scores - log_sum[None, :])
        if MASKED:
            attends = (position[None, :] >= key_position[:, None]) & (position[None, :] < key_end[:, None])
            weights = tl.where(attends, weights, 0.0)
        dv = tl.dot(weights.to(grads.dtype), grads, dv, input_precision=PRECISION)
        grad_weights = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - delta_tile[None, :])
        dk = tl.dot(grad_scores.to(queries.dtype), queries, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def backward_dkdv_kernel(
    grad_out,
    q,
    k,
    v,
    lse,
    delta,
    dk,
    dv,
    cu_seqlens,
    seq_lens,
    stride_gb,
    stride_gs,
    stride_gh,
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
    program = tl.program_id(0)
    kv_heads = heads // ratio
    kv_head = program % kv_heads
    batch, first, tile, owned, length = locate(
        program // kv_heads, cu_seqlens, seq_lens, rows, documents, tiles, BLOCK_N, PACKED, HAS_LENS
    )
    if tile >= owned:
        return
    token = tile + tl.arange(0, BLOCK_N)
    inside = token < length
    row = first + token
    column = tl.arange(0, BLOCK_D)
    first_long = tl.cast(first, tl.int64)
    kv_long = tl.cast(kv_head, tl.int64)
    keys = load_tile(
        k + batch * stride_kb + kv_long * stride_kh, row, stride_ks, column, inside, True, HEAD_DIM, BLOCK_D
    )
    values = load_tile(
        v + batch * stride_vb + kv_long * stride_vh, row, stride_vs, column, inside, True, HEAD_DIM, BLOCK_D
    )
    grad_out += batch * stride_gb + first_long * stride_gs
    q += batch * stride_qb + first_long * stride_qs
    lse += batch * heads * rows + first
    delta += batch * heads * rows + first

    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    scale_log2 = scale * LOG2_E
    last_token = tl.minimum(tile + BLOCK_N, length) - 1
    for member in range(0, ratio):
        head = kv_head * ratio + member
        head_long = tl.cast(head, tl.int64)
        shift, roll = shift_and_roll(head, heads, group_size, length, WRAP)
        if WRAP:
            # The tile that holds token `roll` has its keys at both ends of the positions: walk all of them.
            both_ends = (roll > tile) & (roll <= last_token)
            key_position = tl.where(token >= roll, token - roll, token - roll + length)
            low = tl.where(tile >= roll, tile - roll, tile - roll + length)
            high = tl.where(both_ends, length, group_end(low + last_token - tile, shift, group_size, length))
            one_group = (group_end(low, shift, group_size, length) == high) & (both_ends == 0)
            low = tl.where(both_ends, 0, low)
        else:
            key_position = token
            low = tile
            high = group_end(last_token, shift, group_size, length)
            one_group = group_end(tile, shift, group_size, length) == high
        key_end = group_end(key_position, shift, group_size, length)
        high = tl.where(tile < length, high, low)  # a tile of padding alone
        below_diagonal = tl.minimum(low + tl.cdiv(BLOCK_N, BLOCK_M) * BLOCK_M, high)
        masked_again = below_diagonal + (high - below_diagonal) // BLOCK_M * BLOCK_M
        below_diagonal = tl.where(one_group, below_diagonal, high)
        masked_again = tl.where(one_group, masked_again, high)

        q_head = q + head_long * stride_qh
        grad_head = grad_out + head_long * stride_gh
        lse_head = lse + head_long * rows
        delta_head = delta + head_long * rows
        dk_tile, dv_tile = _walk_queries(
            dk_tile, dv_tile, keys, values, key_position, key_end, q_head, grad_head, lse_head, delta_head, stride_qs,
            stride_gs, low, below_diagonal, roll, length, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_M, WRAP, PRECISION, True,
        )  # fmt: skip
        dk_tile, dv_tile = _walk_queries(
            dk_tile, dv_tile, keys, values, key_position, key_end, q_head, grad_head, lse_head, delta_head, stride_qs,
            stride_gs, below_diagonal, masked_again, roll, length, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_M, WRAP,
            PRECISION, False,
        )  # fmt: skip
        dk_tile, dv_tile = _walk_queries(
            dk_tile, dv_tile, keys, values, key_position, key_end, q_head, grad_head, lse_head, delta_head, stride_qs,
            stride_gs, masked_again, high, roll, length, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_M, WRAP, PRECISION, True,
        )  # fmt: skip

    dk_tile = tl.where(inside[:, None], dk_tile * scale, 0.0)
    dv_tile = tl.where(inside[:, None], dv_tile, 0.0)
    dk += (batch * rows * kv_heads + kv_head) * HEAD_DIM
    dv += (batch * rows * kv_heads + kv_head) * HEAD_DIM
    store_tile(dk, row, kv_heads * HEAD_DIM, column, dk_tile, token < owned, HEAD_DIM)
    store_tile(dv, row, kv_heads * HEAD_DIM, column, dv_tile, token < owned, HEAD_DIM)


def backward(
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
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operation ``shifted_attention_backward``: (dq, dk, dv)."""
    dq, dk, dv = contiguous_like(q), contiguous_like(k), contiguous_like(v)
    if q.numel() == 0:
        return dq, dk, dv
    cu_seqlens, seq_lens, effective = compact(cu_seqlens), compact(seq_lens), longest_group(q, group_size, wrap)
    # Gradients come as autograd makes them: that of a sum is one number with stride 0.
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    out, lse = out.contiguous(), lse.contiguous()
    delta = torch.empty_like(lse)
    heads, kv_heads, head_dim = q.shape[-2], k.shape[-2], q.shape[-1]
    capability = capability_of(q)
    by_descriptor = has_descriptors(grad_out, q, k, v)
    group = (effective, cu_seqlens, seq_lens, scale)
    all_strides = (*strides(grad_out), *strides(q), *strides(k), *strides(v))
    sizes = (heads, heads // kv_heads, effective, scale)
    flags = (cu_seqlens is not None, seq_lens is not None, wrap, config.input_precision(q.dtype, head_dim))

    def by_copies(kernel: str) -> bool:
        name = config.tma_kernel(kernel, q.dtype, head_dim, capability, group_size, wrap, scale)
        return name is not None and by_descriptor

    if by_copies("backward_dq"):
        triton_backward_tma.launch_dq(grad_out, q, k, v, out, lse, delta, dq, *group)
    else:
        tiles = config.tiles("backward_dq", q.dtype, head_dim, capability, wrap)
        rows, documents, row_tiles, programs = layout(q, tiles.block_m, cu_seqlens)
        launch(
            backward_dq_kernel,
            programs * heads,
            (
                grad_out, q, k, v, out, lse, delta, dq, cu_seqlens, seq_lens, *all_strides,
                rows, documents, row_tiles, *sizes,
            ),
            (head_dim, config.block_d(head_dim), tiles.block_m, tiles.block_n, *flags),
            options(tiles),
        )  # fmt: skip
    if by_copies("backward_dkdv"):
        triton_backward_tma.launch_dkdv(grad_out, q, k, v, lse, delta, dk, dv, *group)
    else:
        tiles = config.tiles("backward_dkdv", q.dtype, head_dim, capability, wrap)
        rows, documents, row_tiles, programs = layout(q, tiles.block_n, cu_seqlens)
        launch(
            backward_dkdv_kernel,
            programs * kv_heads,
            (
                grad_out, q, k, v, lse, delta, dk, dv, cu_seqlens, seq_lens, *all_strides,
                rows, documents, row_tiles, *sizes,
            ),
            (head_dim, config.block_d(head_dim), tiles.block_m, tiles.block_n, *flags),
            options(tiles),
        )  # fmt: skip
    return dq, dk, dv
