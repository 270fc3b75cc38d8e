"""Forward pass in Triton for chips with a tensor memory accelerator: descriptors, persistent programs.

The same function as triton_forward.py for 16-bit inputs whose groups are at least a tile long. What differs:

* Tiles start where groups start, so a tile lies in one group: the only mask is the diagonal's, and a group's edges cost
  at most one partial tile of queries.
* q, k and v come by bulk copies that the hardware addresses, from their own strides.
* Programs are persistent: each takes every n-th tile of (tile in group, batch, group, head), longest walks first.

A bulk copy cannot mask rows inside of the tensor. Rows past a document's end may hold anything, and zero times NaN is
NaN, so with padding or packed documents the one key tile that crosses the end is loaded by masked loads instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import launch
from . import config
from .triton_common import (
    LN_2,
    LOG2_E,
    capability_of,
    descriptor,
    group_tile,
    group_tiles,
    load_rows,
    options,
    programs_of,
    store_tile,
)


@triton.jit
def _attend(
    acc,
    total,
    largest,
    queries,
    keys,
    values,
    position,
    key_position,
    scale_log2,
    masked,
    PRECISION: tl.constexpr,
):
    """Takes one tile of keys into the running softmax (base 2) of a query tile, of which every row has seen a key."""
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    if masked:
        scores = tl.where(key_position[None, :] <= position[:, None], scores, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, 1) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - new_largest[:, None])
    rescale = tl.exp2(largest - new_largest)
    total = total * rescale + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * rescale[:, None], input_precision=PRECISION)
    return acc, total, new_largest


@triton.jit
def forward_tma_kernel(
    q,
    k,
    v,
    out,
    lse,
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
            inside = position < length
            kv_head = head // ratio
            queries = load_rows(q, batch, head, document + tile, BLOCK_M, BLOCK_D)
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
            end = tl.minimum(tl.minimum(tile + BLOCK_M, stop), length)
            end = tl.where(tile < length, end, begin)  # a tile of padding alone
            copied = end
            if PACKED or HAS_LENS:
                whole = begin + (end - begin) // BLOCK_N * BLOCK_N
                copied = tl.where((whole < end) & (whole + BLOCK_N > length), whole, end)
            for at in tl.range(begin, copied, BLOCK_N):
                keys = load_rows(k, batch, kv_head, document + at, BLOCK_N, BLOCK_D)
                values = load_rows(v, batch, kv_head, document + at, BLOCK_N, BLOCK_D)
                acc, total, largest = _attend(
                    acc, total, largest, queries, keys, values, position, at + tl.arange(0, BLOCK_N), scale_log2,
                    at + BLOCK_N > tile, PRECISION,
                )  # fmt: skip
            if PACKED or HAS_LENS:
                if copied < end:
                    key_position = copied + tl.arange(0, BLOCK_N)
                    keys = load_rows(k, batch, kv_head, document + copied, BLOCK_N, BLOCK_D)
                    values = load_rows(v, batch, kv_head, document + copied, BLOCK_N, BLOCK_D)
                    values = tl.where((key_position < end)[:, None], values, 0.0)
                    acc, total, largest = _attend(
                        acc, total, largest, queries, keys, values, position, key_position, scale_log2, True, PRECISION
                    )

            total = tl.where(inside, total, 1.0)
            acc = tl.where(inside[:, None], acc * (1.0 / total)[:, None], 0.0)
            log_sum = tl.where(inside, (largest + tl.log2(total)) * LN_2, float("inf"))
            row = document + position
            out_head = out + (tl.cast(batch, tl.int64) * rows * heads + head) * HEAD_DIM
            store_tile(out_head, row, heads * HEAD_DIM, column, acc, position < stop, HEAD_DIM)
            lse_head = lse + (tl.cast(batch, tl.int64) * heads + head) * rows
            tl.store(lse_head + row, log_sum, mask=position < stop)


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    group_size: int,
    cu_seqlens: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    scale: float,
) -> None:
    """Writes out and lse; the caller has asked ``config.tma_kernel`` and ``has_descriptors``."""
    heads, head_dim = q.shape[-2:]
    tiles = config.tiles("forward_tma", q.dtype, head_dim, capability_of(q))
    block_d = config.block_d(head_dim)
    work = group_tiles(q, group_size, tiles.block_m, cu_seqlens)
    documents, batches = (0, q.shape[0]) if cu_seqlens is None else (cu_seqlens.shape[0] - 1, 1)
    launch(
        forward_tma_kernel,
        programs_of(work, tiles, q.device),
        (
            descriptor(q, tiles.block_m, block_d), descriptor(k, tiles.block_n, block_d),
            descriptor(v, tiles.block_n, block_d), out, lse, cu_seqlens, seq_lens,
            q.shape[-3], documents, batches, heads, heads // k.shape[-2], group_size, work, scale,
        ),
        (
            head_dim, block_d, tiles.block_m, tiles.block_n, cu_seqlens is not None, seq_lens is not None,
            config.input_precision(q.dtype, head_dim),
        ),
        options(tiles),
    )  # fmt: skip
