"""Smooth MaxSim forward in Triton: one program holds 128 query rows and streams documents past them.

As in the forward of the hard maximum, several queries share a tile of document tokens, because rows never mix. The sum
of exponentials is taken online: each tile rescales what came before to its own maximum, so no similarity leaves the
program and none is looked at twice. Derivation: docs/maxsim-smooth-and-xtr.md. Not run on a GPU yet.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from . import config, config_smooth
from .layout import Layout, layout_of
from .triton_forward import _load_rows, as_bytes, as_list, unit_stride

LN_2 = math.log(2)

# Run-time integers that no kernel is compiled anew for.
SIZES = ["query_count", "query_length", "document_count", "document_length", "row_tiles", "row_chunks"]
SIZES += ["queries_per_tile", "documents_per_program", "tiles"]


@triton.jit
def locate_document(place, documents, cu_seqlens, document_length, stride_document, stride_token):
    """First row pointer, first mask index and length of document `place` (64 bits)."""
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + place).to(tl.int64)
        length = (tl.load(cu_seqlens + place + 1) - start).to(tl.int32)
        text = documents + start * stride_token
    else:
        start = place * document_length
        length = document_length
        text = documents + place * stride_document
    return text, start, length


@triton.jit(do_not_specialize=SIZES)
def maxsim_smooth_forward_kernel(
    queries,
    documents,
    query_mask,
    document_mask,
    query_weights,
    cu_seqlens,
    scores,
    maxima,
    query_count,
    query_length,
    document_count,
    document_length,
    row_tiles,
    row_chunks,
    queries_per_tile,
    documents_per_program,
    exponent_scale,
    logarithm_scale,
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
):
    """Scores [row_chunks, Nq, N] and smooth maxima [Nq, N, Lq]; absent optional arguments are None.

    Program p serves row tile p % row_tiles and the p // row_tiles-th run of documents: neighbours share documents.
    `document_count` is N, the documents per query; with CANDIDATES a tile never holds two queries. The two scales are
    1 / (temperature * ln 2) and temperature * ln 2: powers and logarithms of two are what the hardware has.
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

    # 64 bits from here on: an offset into documents or maxima may pass 2**31.
    first_place = first_query.to(tl.int64) * (document_count if CANDIDATES else 0)
    for document in range(first_document, tl.minimum(first_document + documents_per_program, document_count)):
        text, mask_start, length = locate_document(
            first_place + document, documents, cu_seqlens, document_length, stride_document, stride_document_token
        )
        best = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_ROWS], tl.float32)
        kept_count = 0
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
                kept_count += tl.sum(kept.to(tl.int32), axis=0)
            similarity = tl.where(kept[None, :], similarity, float("-inf"))
            # A NaN that the maximum drops comes back through the sum.
            higher = tl.maximum(best, tl.max(similarity, axis=1))
            # Infinite maxima: the difference of two infinities would be NaN.
            centre = tl.where(tl.abs(higher) == float("inf"), 0.0, higher)
            decay = tl.where(higher == best, 1.0, tl.exp2((best - higher) * exponent_scale))
            exponentials = tl.exp2((similarity - centre[:, None]) * exponent_scale)
            total = total * decay + tl.sum(exponentials, axis=1)
            best = higher

        if document_mask is None:
            kept_count = length
        counts = row_counts & (kept_count > 0)
        centre = tl.where(tl.abs(best) == float("inf"), 0.0, best)
        smooth = centre + tl.log2(tl.where(counts, total, 1.0)) * logarithm_scale
        if maxima is not None:
            offset = (query.to(tl.int64) * document_count + document) * query_length + token
            tl.store(maxima + offset, tl.where(counts, smooth, float("-inf")), mask=row_valid)
        if query_weights is not None:
            smooth = smooth * weight
        smooth = tl.where(counts, smooth, 0.0)
        chunk = (tile % row_chunks).to(tl.int64)
        segments = tl.arange(0, SEGMENTS)
        if SEGMENTS == 1:
            sums = tl.sum(smooth, axis=0) + tl.zeros([SEGMENTS], tl.float32)
        else:
            mine = segments[:, None] == segment[None, :]
            sums = tl.sum(tl.where(mine, smooth[None, :], 0.0), axis=1)
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
    temperature: float,
    need_maxima: bool,
) -> tuple[Tensor, Tensor]:
    """Scores float32 [Nq, N] and smooth maxima float32 [Nq, N, Lq], -inf where nothing counts.

    The second tensor is empty without `need_maxima`. float16, bfloat16 or float32 inputs, checked by smooth.py.
    """
    sizes = layout_of(queries, documents, cu_seqlens, candidates)
    shape = (sizes.query_count, sizes.documents_per_query)
    maxima = queries.new_empty((*shape, sizes.query_length) if need_maxima else (0,), dtype=torch.float32)
    if queries.numel() == 0 or sizes.documents_per_query == 0:
        return queries.new_zeros(shape, dtype=torch.float32), maxima
    queries, documents = unit_stride(queries), as_list(documents)
    capability = config.capability_of(queries.device)
    sharing_rows = sizes.query_length * (1 if candidates else sizes.query_count)
    tiles = config_smooth.forward_tiles(capability, queries.element_size(), sizes.dimension, sharing_rows)
    row_tiles, row_chunks, per_tile = row_layout(sizes, tiles.rows)
    processors = config.processors_of(queries.device)
    run = config_smooth.documents_per_program(sizes.documents_per_query, row_tiles, processors)
    partial = queries.new_empty((row_chunks, *shape), dtype=torch.float32)
    arguments = (
        queries,
        documents,
        as_bytes(query_mask),
        as_bytes(document_mask),
        contiguous(query_weights),
        contiguous(cu_seqlens),
        partial,
        maxima if need_maxima else None,
        sizes.query_count,
        sizes.query_length,
        sizes.documents_per_query,
        sizes.document_length or 0,
        row_tiles,
        row_chunks,
        per_tile,
        run,
        1 / (temperature * LN_2),
        temperature * LN_2,
        queries.stride(0),
        queries.stride(1),
        0 if cu_seqlens is not None else documents.stride(0),
        documents.stride(-2),
    )
    segments, precision = config.next_power_of_two(per_tile), config.product_precision(queries.dtype)
    constants = (sizes.dimension, tiles.rows, tiles.tokens, tiles.dimension, segments, candidates, precision)
    programs = row_tiles * -(-sizes.documents_per_query // run)
    launch(maxsim_smooth_forward_kernel, programs, arguments, constants, tiles.options)
    # One chunk, the usual case, is a view; several are added in order.
    return partial[0] if row_chunks == 1 else partial.sum(0), maxima


def row_layout(sizes: Layout, rows: int) -> tuple[int, int, int]:
    """Row tiles in all, row tiles of one query (1 unless it is longer than a tile), and queries in a tile."""
    chunks = -(-sizes.query_length // rows)
    per_tile = 1 if sizes.candidates else max(1, rows // sizes.query_length)
    return -(-sizes.query_count // per_tile) * chunks, chunks, per_tile


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """A contiguous tensor, or None for None."""
    return None if tensor is None else tensor.contiguous()
