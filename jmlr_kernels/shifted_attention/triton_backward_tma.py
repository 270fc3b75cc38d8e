"""Backward pass in Triton for chips with a tensor memory accelerator: triton_backward.py's two launches by bulk copies.

The first launch owns query tiles that start where groups start, as in triton_forward_tma.py; the second owns key tiles
of kv heads. Programs are persistent, longest walks first. Every gradient element has one owner and every sum one order:
no atomics, two runs are bit-identical.

As in the forward pass, rows past a document's end are never multiplied: the tile that crosses it is loaded by masked
loads instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import launch
from . import config
from .triton_common import (
    LOG2_E,
    capability_of,
    descriptor,
    group_end,
    group_tile,
    group_tiles,
    key_tile,
    key_tiles,
    load_rows,
    load_tile,
    options,
    programs_of,
    shift_and_roll,
    store_tile,
)


@triton.jit
def _add_keys(
    dq,
    queries,
    grads,
    log_sum,
    delta,
    keys,
    values,
    position,
    key_position,
    scale_log2,
    masked,
    PRECISION: tl.constexpr,
):
    """Adds to dq (without the scale) what one tile of keys contributes."""
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    weights = tl.exp2(scores * scale_log2 - log_sum[:, None])
    grad_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
    grad_scores = weights * (grad_weights - delta[:, None])
    if masked:
        grad_scores = tl.where(key_position[None, :] <= position[:, None], grad_scores, 0.0)
    return tl.dot(grad_scores.to(keys.dtype), keys, dq, input_precision=PRECISION)


@triton.jit
def backward_dq_tma_kernel(
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
    rows,
    documents,
    batches,
    heads,
    ratio,
    group_size,
    work,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_LENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    column = tl.arange(0, BLOCK_D)
    scale_log2 = scale * LOG2_E
    for item in tl.range(tl.program_id(0), work, tl.num_programs(0), disable_licm=True):
        head, batch, document, begin, tile, stop, length = group_tile(
            item, cu_seqlens, seq_lens, rows, documents, batches, heads, group_size, BLOCK_M, PACKED, HAS_LENS
        )
        if tile < stop:
            position = tile + tl.arange(0, BLOCK_M)
            # Past the group's end lie other groups' queries, which this tile carries along and never stores.
            inside = (position < length) & (position < stop)
            row = document + position
            kv_head = head // ratio
            head_rows = (tl.cast(batch, tl.int64) * heads + head) * rows
            head_out = (tl.cast(batch, tl.int64) * rows * heads + head) * HEAD_DIM
            queries = load_rows(q, batch, head, document + tile, BLOCK_M, BLOCK_D)
            grads = load_rows(grad_out, batch, head, document + tile, BLOCK_M, BLOCK_D)
            outs = load_tile(out + head_out, row, heads * HEAD_DIM, column, inside, True, HEAD_DIM, BLOCK_D)
            delta_tile = tl.where(inside, tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1), 0.0)
            tl.store(delta + head_rows + row, delta_tile, mask=position < stop)
            log_sum = tl.load(lse + head_rows + row, mask=inside, other=float("inf")) * LOG2_E

            end = tl.minimum(tl.minimum(tile + BLOCK_M, stop), length)
            end = tl.where(tile < length, end, begin)  # a tile of padding alone
            copied = end
            if PACKED or HAS_LENS:
                whole = begin + (end - begin) // BLOCK_N * BLOCK_N
                copied = tl.where((whole < end) & (whole + BLOCK_N > length), whole, end)
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for at in tl.range(begin, copied, BLOCK_N):
                keys = load_rows(k, batch, kv_head, document + at, BLOCK_N, BLOCK_D)
                values = load_rows(v, batch, kv_head, document + at, BLOCK_N, BLOCK_D)
                acc = _add_keys(
                    acc, queries, grads, log_sum, delta_tile, keys, values, position, at + tl.arange(0, BLOCK_N),
                    scale_log2, at + BLOCK_N > tile, PRECISION,
                )  # fmt: skip
            if PACKED or HAS_LENS:
                if copied < end:
                    key_position = copied + tl.arange(0, BLOCK_N)
                    keys = load_rows(k, batch, kv_head, document + copied, BLOCK_N, BLOCK_D)
                    values = load_rows(v, batch, kv_head, document + copied, BLOCK_N, BLOCK_D)
                    keys = tl.where((key_position < end)[:, None], keys, 0.0)
                    acc = _add_keys(
                        acc, queries, grads, log_sum, delta_tile, keys, values, position, key_position, scale_log2,
                        True, PRECISION,
                    )  # fmt: skip
            acc = tl.where(inside[:, None], acc * scale, 0.0)
            store_tile(dq + head_out, row, heads * HEAD_DIM, column, acc, position < stop, HEAD_DIM)


@triton.jit
def _add_queries(
    dk,
    dv,
    keys,
    values,
    queries,
    grads,
    log_sum,
    delta,
    position,
    key_position,
    key_end,
    scale_log2,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds to dk (without the scale) and dv what one tile of queries contributes; keys are rows, so that the products
    need no transposed accumulator."""
    scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
    weights = tl.exp2(scores * scale_log2 - log_sum[None, :])
    if MASKED:
        attends = (position[None, :] >= key_position[:, None]) & (position[None, :] < key_end[:, None])
        weights = tl.where(attends, weights, 0.0)
    dv = tl.dot(weights.to(grads.dtype), grads, dv, input_precision=PRECISION)
    grad_weights = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
    grad_scores = weights * (grad_weights - delta[None, :])
    dk = tl.dot(grad_scores.to(queries.dtype), queries, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def backward_dkdv_tma_kernel(
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
    rows,
    documents,
    batches,
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
    PRECISION: tl.constexpr,
):
    column = tl.arange(0, BLOCK_D)
    scale_log2 = scale * LOG2_E
    kv_heads = heads // ratio
    item = tl.program_id(0)
    kv_head, batch, document, tile, stop, length = key_tile(
        item, cu_seqlens, seq_lens, rows, documents, batches, heads, kv_heads, group_size, BLOCK_N, PACKED, HAS_LENS
    )
    if tile < stop:
        token = tile + tl.arange(0, BLOCK_N)
        keys = load_rows(k, batch, kv_head, document + tile, BLOCK_N, BLOCK_D)
        values = load_rows(v, batch, kv_head, document + tile, BLOCK_N, BLOCK_D)
        dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        last_token = tl.minimum(tile + BLOCK_N, length) - 1
        for member in tl.range(0, ratio, disable_licm=True):
            head = kv_head * ratio + member
            shift, roll = shift_and_roll(head, heads, group_size, length, False)
            key_end = group_end(token, shift, group_size, length)
            first_end = group_end(tile, shift, group_size, length)
            end = tl.where(tile < length, group_end(last_token, shift, group_size, length), tile)
            copied = end
            if PACKED or HAS_LENS:
                whole = tile + (end - tile) // BLOCK_M * BLOCK_M
                copied = tl.where((whole < end) & (whole + BLOCK_M > length), whole, end)
            # Tiles below the diagonal and before the first key's group ends need no mask. The others come first.
            below = tl.minimum(tile + tl.cdiv(BLOCK_N, BLOCK_M) * BLOCK_M, copied)
            rest = below + tl.maximum(tl.minimum(first_end, copied) - below, 0) // BLOCK_M * BLOCK_M
            skipped = rest - below
            head_rows = (tl.cast(batch, tl.int64) * heads + head) * rows + document
            for step in tl.range(tile, copied - skipped, BLOCK_M):
                at = tl.where(step < below, step, step + skipped)
                position = at + tl.arange(0, BLOCK_M)
                queries = load_rows(q, batch, head, document + at, BLOCK_M, BLOCK_D)
                grads = load_rows(grad_out, batch, head, document + at, BLOCK_M, BLOCK_D)
                log_sum = tl.load(lse + head_rows + position, mask=position < length, other=float("inf")) * LOG2_E
                delta_tile = tl.load(delta + head_rows + position, mask=position < length, other=0.0)
                dk_tile, dv_tile = _add_queries(
                    dk_tile, dv_tile, keys, values, queries, grads, log_sum, delta_tile, position, token, key_end,
                    scale_log2, PRECISION, True,
                )  # fmt: skip
            for at in tl.range(below, rest, BLOCK_M):
                position = at + tl.arange(0, BLOCK_M)
                queries = load_rows(q, batch, head, document + at, BLOCK_M, BLOCK_D)
                grads = load_rows(grad_out, batch, head, document + at, BLOCK_M, BLOCK_D)
                log_sum = tl.load(lse + head_rows + position) * LOG2_E
                delta_tile = tl.load(delta + head_rows + position)
                dk_tile, dv_tile = _add_queries(
                    dk_tile, dv_tile, keys, values, queries, grads, log_sum, delta_tile, position, token, key_end,
                    scale_log2, PRECISION, False,
                )  # fmt: skip
            if PACKED or HAS_LENS:
                if copied < end:
                    position = copied + tl.arange(0, BLOCK_M)
                    within = position < end
                    queries = load_rows(q, batch, head, document + copied, BLOCK_M, BLOCK_D)
                    grads = load_rows(grad_out, batch, head, document + copied, BLOCK_M, BLOCK_D)
                    queries = tl.where(within[:, None], queries, 0.0)
                    grads = tl.where(within[:, None], grads, 0.0)
                    log_sum = tl.load(lse + head_rows + position, mask=within, other=float("inf")) * LOG2_E
                    delta_tile = tl.load(delta + head_rows + position, mask=within, other=0.0)
                    dk_tile, dv_tile = _add_queries(
                        dk_tile, dv_tile, keys, values, queries, grads, log_sum, delta_tile, position, token,
                        key_end, scale_log2, PRECISION, True,
                    )  # fmt: skip
        inside = token < length
        row = document + token
        dk_tile = tl.where(inside[:, None], dk_tile * scale, 0.0)
        dv_tile = tl.where(inside[:, None], dv_tile, 0.0)
        head_out = (tl.cast(batch, tl.int64) * rows * kv_heads + kv_head) * HEAD_DIM
        store_tile(dk + head_out, row, kv_heads * HEAD_DIM, column, dk_tile, token < stop, HEAD_DIM)
        store_tile(dv + head_out, row, kv_heads * HEAD_DIM, column, dv_tile, token < stop, HEAD_DIM)


def launch_dq(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    dq: torch.Tensor,
    group_size: int,
    cu_seqlens: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    scale: float,
) -> None:
    """Writes delta and dq; the caller has asked ``config.tma_kernel`` and ``has_descriptors``."""
    heads, head_dim = q.shape[-2:]
    tiles = config.tiles("backward_dq_tma", q.dtype, head_dim, capability_of(q))
    block_d = config.block_d(head_dim)
    work = group_tiles(q, group_size, tiles.block_m, cu_seqlens)
    launch(
        backward_dq_tma_kernel,
        programs_of(work, tiles, q.device),
        (
            descriptor(grad_out, tiles.block_m, block_d), descriptor(q, tiles.block_m, block_d),
            descriptor(k, tiles.block_n, block_d), descriptor(v, tiles.block_n, block_d),
            out, lse, delta, dq, cu_seqlens, seq_lens,
            q.shape[-3], *_counts(q, cu_seqlens), heads, heads // k.shape[-2], group_size, work, scale,
        ),
        (
            head_dim, block_d, tiles.block_m, tiles.block_n, cu_seqlens is not None, seq_lens is not None,
            config.input_precision(q.dtype, head_dim),
        ),
        options(tiles),
    )  # fmt: skip


def launch_dkdv(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    group_size: int,
    cu_seqlens: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    scale: float,
) -> None:
    """Writes dk and dv from the delta of :func:`launch_dq` or of triton_backward.py's first kernel."""
    heads, head_dim = q.shape[-2:]
    kv_heads = k.shape[-2]
    tiles = config.tiles("backward_dkdv_tma", q.dtype, head_dim, capability_of(q))
    block_d = config.block_d(head_dim)
    work = key_tiles(q, kv_heads, group_size, tiles.block_n, cu_seqlens)
    launch(
        backward_dkdv_tma_kernel,
        work,
        (
            descriptor(grad_out, tiles.block_m, block_d), descriptor(q, tiles.block_m, block_d),
            descriptor(k, tiles.block_n, block_d), descriptor(v, tiles.block_n, block_d),
            lse, delta, dk, dv, cu_seqlens, seq_lens,
            q.shape[-3], *_counts(q, cu_seqlens), heads, heads // kv_heads, group_size, scale,
        ),
        (
            head_dim, block_d, tiles.block_m, tiles.block_n, cu_seqlens is not None, seq_lens is not None,
            config.input_precision(q.dtype, head_dim),
        ),
        options(tiles),
    )  # fmt: skip


def _counts(q: torch.Tensor, cu_seqlens: torch.Tensor | None) -> tuple[int, int]:
    """(documents of a packed batch, rows of a padded one)."""
    return (0, q.shape[0]) if cu_seqlens is None else (cu_seqlens.shape[0] - 1, 1)
