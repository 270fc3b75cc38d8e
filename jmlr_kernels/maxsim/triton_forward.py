"""MaxSim forward in Triton: one program holds 128 query rows and streams documents past them.

A matrix tile of one query's 32 tokens would leave the tensor cores waiting for the second-level cache, so several
queries share a tile: rows never mix, since the maximum is per row and the sum over a query's rows comes after. Queries
longer than a tile are cut into row tiles whose partial sums are added afterwards, in order. No similarity leaves
the program; packed documents are read token by token, without padding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .layout import layout_of

_NO_TOKEN = tl.constexpr(2**31 - 1)


@triton.jit
def _larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _row_maxima(values, NAN_REDUCTION: tl.constexpr):
    """Maximum of each row, NaN if the row has one. tl.max alone drops NaN."""
    if NAN_REDUCTION:
        return tl.reduce(values, 1, _larger_or_nan)
    # The interpreter walks a custom reduction element by element; this says the same in two of its fast ones.
    has_nan = tl.max((values != values).to(tl.int32), axis=1) > 0
    return tl.where(has_nan, float("nan"), tl.max(values, axis=1))


@triton.jit
def _load_rows(rows, valid, offset, DIMENSION: tl.constexpr, BLOCK_DIMENSION: tl.constexpr):
    """[rows, BLOCK_DIMENSION] from row pointers, zeros outside."""
    dimensions = offset + tl.arange(0, BLOCK_DIMENSION)
    if DIMENSION % BLOCK_DIMENSION == 0:
        return tl.load(rows[:, None] + dimensions[None, :], mask=valid[:, None], other=0.0)
    inside = valid[:, None] & (dimensions < DIMENSION)[None, :]
    return tl.load(rows[:, None] + dimensions[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["query_count", "query_length", "document_count", "document_length", "row_tiles"])
def maxsim_forward_kernel(
    queries,
    documents,
    query_mask,
    document_mask,
    query_weights,
    cu_seqlens,
    scores,
    winners,
    query_count,
    query_length,
    document_count,
    document_length,
    row_tiles,
    row_chunks,
    queries_per_tile,
    documents_per_program,
    stride_query,
    stride_query_token,
    stride_document,
    stride_document_token,
    DIMENSION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIMENSION: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    PRECISION: tl.constexpr,
    NAN_REDUCTION: tl.constexpr,
):
    """Scores [row_chunks, Nq, N] and winners [Nq, N, Lq]; absent optional arguments are None.

    Program p serves row tile p % row_tiles and the p // row_tiles-th run of documents: neighbours share documents.
    `document_count` is N, the documents per query; with CANDIDATES a tile never holds two queries.
    """
    program = tl.program_id(0)
    tile = program % row_tiles
    first_document = (program // row_tiles) * documents_per_program
    first_query = (tile // row_chunks) * queries_per_tile

    rows = (tile % row_chunks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    segment = rows // query_length
    query = first_query + segment
    token = rows - segment * query_length
    row_valid = (segment < queries_per_tile) & (query < query_count)
    query_token = query.to(tl.int64) * query_length + token
    query_rows = queries + query.to(tl.int64) * stride_query + token.to(tl.int64) * stride_query_token
    row_counts = row_valid
    if query_mask is not None:
        row_counts = row_counts & (tl.load(query_mask + query_token, mask=row_valid, other=0) != 0)
    if query_weights is not None:
        weight = tl.load(query_weights + query_token, mask=row_counts, other=0.0).to(tl.float32)
    if BLOCK_DIMENSION >= DIMENSION:
        query_tile = _load_rows(query_rows, row_valid, 0, DIMENSION, BLOCK_DIMENSION)

    # 64 bits from here on: an offset into documents or winners may pass 2**31.
    first_place = first_query.to(tl.int64) * (document_count if CANDIDATES else 0)
    for document in range(first_document, tl.minimum(first_document + documents_per_program, document_count)):
        place = first_place + document
        if cu_seqlens is not None:
            start = tl.load(cu_seqlens + place).to(tl.int64)
            length = (tl.load(cu_seqlens + place + 1) - start).to(tl.int32)
            text = documents + start * stride_document_token
            mask_start = start
        else:
            length = document_length
            text = documents + place * stride_document
            mask_start = place * document_length

        best = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
        winner = tl.full([BLOCK_ROWS], -1, tl.int32)
        for token_start in range(0, length, BLOCK_TOKENS):
            positions = token_start + tl.arange(0, BLOCK_TOKENS)
            kept = positions < length
            token_rows = text + positions.to(tl.int64) * stride_document_token
            if BLOCK_DIMENSION >= DIMENSION:
                text_tile = _load_rows(token_rows, kept, 0, DIMENSION, BLOCK_DIMENSION)
                similarity = tl.dot(query_tile, tl.trans(text_tile), input_precision=PRECISION)
            else:
                similarity = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], tl.float32)
                for offset in range(0, DIMENSION, BLOCK_DIMENSION):
                    query_part = _load_rows(query_rows, row_valid, offset, DIMENSION, BLOCK_DIMENSION)
                    text_part = _load_rows(token_rows, kept, offset, DIMENSION, BLOCK_DIMENSION)
                    similarity = tl.dot(query_part, tl.trans(text_part), similarity, input_precision=PRECISION)
            if document_mask is not None:
                kept = kept & (tl.load(document_mask + mask_start + positions, mask=kept, other=0) != 0)
            similarity = tl.where(kept[None, :], similarity, float("-inf"))
            highest = _row_maxima(similarity, NAN_REDUCTION)
            # The lowest position of the maximum, or of the first NaN when the maximum is NaN.
            attains = kept[None, :] & ((similarity == highest[:, None]) | (similarity != similarity))
            position = tl.min(tl.where(attains, positions[None, :], _NO_TOKEN), axis=1)
            better = (winner < 0) | (highest > best) | ((highest != highest) & (best == best))
            better = better & (position != _NO_TOKEN)
            best = tl.where(better, highest, best)
            winner = tl.where(better, position, winner)

        best = tl.where(row_counts & (winner >= 0), best, 0.0)
        if query_weights is not None:
            best = best * weight
        if winners is not None:
            won = tl.where(row_counts, winner, -1)
            offset = (query.to(tl.int64) * document_count + document) * query_length + token
            tl.store(winners + offset, won, mask=row_valid)
        chunk = (tile % row_chunks).to(tl.int64)
        segments = tl.arange(0, SEGMENTS)
        if SEGMENTS == 1:
            sums = tl.sum(best, axis=0) + tl.zeros([SEGMENTS], tl.float32)
        else:
            mine = segments[:, None] == segment[None, :]
            sums = tl.sum(tl.where(mine, best[None, :], 0.0), axis=1)
        target = first_query + segments
        score_valid = (segments < queries_per_tile) & (target < query_count)
        offset = (chunk * query_count + target) * document_count + document
        tl.store(scores + offset, sums, mask=score_valid)


def forward(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    candidates: bool,
    need_winners: bool,
) -> tuple[Tensor, Tensor]:
    """Scores float32 [Nq, N] and winners int32 [Nq, N, Lq] (empty without `need_winners`).

    float16, bfloat16 or float32 inputs, checked by function.py; float32 is multiplied in full float32.
    """
    sizes = layout_of(queries, documents, cu_seqlens, candidates)
    winners = queries.new_empty(sizes.winners_shape if need_winners else (0,), dtype=torch.int32)
    if queries.numel() == 0 or sizes.documents_per_query == 0:
        return queries.new_zeros((sizes.query_count, sizes.documents_per_query), dtype=torch.float32), winners
    queries, documents = unit_stride(queries), as_list(documents)
    capability = config.capability_of(queries.device)
    sharing_rows = sizes.query_length * (1 if candidates else sizes.query_count)
    tiles = config.forward_tiles(capability, queries.element_size(), sizes.dimension, sharing_rows)
    row_chunks = -(-sizes.query_length // tiles.rows)
    per_tile = 1 if candidates else max(1, tiles.rows // sizes.query_length)
    row_tiles = -(-sizes.query_count // per_tile) * row_chunks
    run = config.documents_per_program(sizes.documents_per_query, row_tiles, config.processors_of(queries.device))
    partial = queries.new_empty((row_chunks, sizes.query_count, sizes.documents_per_query), dtype=torch.float32)
    maxsim_forward_kernel[(row_tiles * -(-sizes.documents_per_query // run),)](
        queries,
        documents,
        as_bytes(query_mask),
        as_bytes(document_mask),
        None if query_weights is None else query_weights.contiguous(),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        partial,
        winners if need_winners else None,
        sizes.query_count,
        sizes.query_length,
        sizes.documents_per_query,
        sizes.document_length or 0,
        row_tiles,
        row_chunks,
        per_tile,
        run,
        queries.stride(0),
        queries.stride(1),
        0 if cu_seqlens is not None else documents.stride(0),
        documents.stride(-2),
        DIMENSION=sizes.dimension,
        BLOCK_ROWS=tiles.rows,
        BLOCK_TOKENS=tiles.tokens,
        BLOCK_DIMENSION=tiles.dimension,
        SEGMENTS=config.next_power_of_two(per_tile),
        CANDIDATES=candidates,
        PRECISION=config.product_precision(queries.dtype),
        NAN_REDUCTION=not config.interpreted(),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        maxnreg=config.REGISTERS,
        enable_fp_fusion=True,
    )
    # One chunk, the usual case, is a view; several are added in order.
    return partial[0] if row_chunks == 1 else partial.sum(0), winners


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself when its embedding dimension is contiguous, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def as_list(documents: Tensor) -> Tensor:
    """Documents as [count, Ld, D] (candidates of all queries in one list) or packed [T, D], unit stride in D."""
    return unit_stride(documents.flatten(0, 1) if documents.dim() == 4 else documents)


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A boolean mask as contiguous bytes, which Triton loads without conversion."""
    return None if mask is None else mask.contiguous().view(torch.uint8)
