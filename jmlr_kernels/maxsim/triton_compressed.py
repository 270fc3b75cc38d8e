"""MaxSim against compressed documents in Triton: decoded tile by tile in registers, never written anywhere.

One kernel for three formats that differ in how a tile of document tokens is made: int8 with a scale per token, float8
e4m3 with a scale per token, and ColBERT's residual codes (centroid + bucket weight, PLAID). Document tokens are the
rows of the matrix product and query tokens its columns, so that a decoded tile goes from registers into the tensor
cores, and one short query fills a narrow tile without waste. No winner is needed without gradients: the maximum is
kept element by element over the tiles of a document and reduced over its tokens once, at its end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from . import config, config_compressed
from .config_compressed import FLOAT8_BITS, RESIDUAL
from .layout import layout_of
from .triton_forward import _NORM_FLOOR, _larger_or_nan, _load_rows, as_bytes, as_list, unit_stride

_FLOAT8_BITS = tl.constexpr(FLOAT8_BITS)
_RESIDUAL = tl.constexpr(RESIDUAL)


@triton.jit
def _column_maxima(values, NAN_REDUCTION: tl.constexpr):
    """Maximum of each column, NaN if the column has one. tl.max alone drops NaN."""
    if NAN_REDUCTION:
        return tl.reduce(values, 0, _larger_or_nan)
    # The interpreter walks a custom reduction element by element; this says the same in two of its fast ones.
    has_nan = tl.max((values != values).to(tl.int32), axis=0) > 0
    return tl.where(has_nan, float("nan"), tl.max(values, axis=0))


@triton.jit
def _float8_from_bits(code):
    """float16 values of e4m3 codes held as uint8, exactly, for chips without the conversion.

    Sign, exponent and mantissa move to float16's places; its exponent bias is larger by 8, hence the factor 2**8, with
    which subnormal codes come out right too. The code of all ones is NaN.
    """
    bits = code.to(tl.uint16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    value = half.to(tl.float16, bitcast=True) * 256.0
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def _values_tile(rows, kept, offset, DIMENSION: tl.constexpr, BLOCK: tl.constexpr, FORMAT: tl.constexpr, dtype):
    """[tokens, BLOCK] of int8 or float8 values in the queries' dtype, which holds every one of them exactly."""
    tile = _load_rows(rows, kept, offset, DIMENSION, BLOCK)
    if FORMAT == _FLOAT8_BITS:
        return _float8_from_bits(tile).to(dtype)
    return tile.to(dtype)


@triton.jit
def _residual_tile(
    rows,
    kept,
    code,
    centroids,
    field_weights,
    centroid_count,
    stride_centroid,
    DIMENSION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIMENSION: tl.constexpr,
    BITS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    dtype,
):
    """[tokens, BLOCK_DIMENSION] of decoded residual codes: centroid + weight of each bit field, at unit length."""
    FIELDS: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = BLOCK_DIMENSION // FIELDS
    # A code outside the table must not read outside it: its token is NaN, and so is the score.
    known = (code >= 0) & (code < centroid_count)
    centroid_rows = centroids + code.to(tl.int64) * stride_centroid
    centroid = _load_rows(centroid_rows, kept & known, 0, DIMENSION, BLOCK_DIMENSION).to(tl.float32)
    packed = _load_rows(rows, kept, 0, DIMENSION // FIELDS, BYTES).to(tl.int32)
    if FIELDS > 1:
        # The first field of a byte is in its highest bits.
        shifts = 8 - BITS * (1 + tl.arange(0, FIELDS))
        packed = (packed[:, :, None] >> shifts[None, None, :]) & (2**BITS - 1)
    field = tl.reshape(packed, [BLOCK_TOKENS, BLOCK_DIMENSION])
    value = centroid + tl.load(field_weights + field)
    if DIMENSION != BLOCK_DIMENSION:
        value = tl.where((tl.arange(0, BLOCK_DIMENSION) < DIMENSION)[None, :], value, 0.0)
    factor = tl.where(known, 1.0, float("nan"))
    if NORMALIZE:
        factor = factor / tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), _NORM_FLOOR)
    return (value * factor[:, None]).to(dtype)


@triton.jit(do_not_specialize=["query_count", "query_length", "document_count", "document_length", "row_tiles"])
def maxsim_compressed_kernel(
    queries,
    values,
    scales,
    codes,
    centroids,
    field_weights,
    query_mask,
    document_mask,
    query_weights,
    cu_seqlens,
    scores,
    query_count,
    query_length,
    document_count,
    document_length,
    row_tiles,
    row_chunks,
    queries_per_tile,
    documents_per_program,
    centroid_count,
    stride_query,
    stride_query_token,
    stride_document,
    stride_document_token,
    stride_centroid,
    DIMENSION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIMENSION: tl.constexpr,
    SEGMENTS: tl.constexpr,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CANDIDATES: tl.constexpr,
    PRECISION: tl.constexpr,
    NAN_REDUCTION: tl.constexpr,
):
    """Scores [row_chunks, Nq, N]; absent optional arguments are None.

    `values` are int8, float8 (or its bits) with `scales`, or residual bytes with `codes`, `centroids` and
    `field_weights`. Program p serves row tile p % row_tiles and the p // row_tiles-th run of documents: neighbours
    share documents. `document_count` is N, the documents per query; with CANDIDATES a tile never holds two queries.
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
        query_tile = tl.trans(_load_rows(query_rows, row_valid, 0, DIMENSION, BLOCK_DIMENSION))

    # 64 bits from here on: an offset into the documents may pass 2**31.
    first_place = first_query.to(tl.int64) * (document_count if CANDIDATES else 0)
    for document in range(first_document, tl.minimum(first_document + documents_per_program, document_count)):
        place = first_place + document
        if cu_seqlens is not None:
            start = tl.load(cu_seqlens + place).to(tl.int64)
            length = (tl.load(cu_seqlens + place + 1) - start).to(tl.int32)
            text = values + start * stride_document_token
        else:
            start = place * document_length
            length = document_length
            text = values + place * stride_document

        best = tl.full([BLOCK_TOKENS, BLOCK_ROWS], float("-inf"), tl.float32)
        any_kept = tl.zeros([BLOCK_TOKENS], tl.int32)
        for token_start in range(0, length, BLOCK_TOKENS):
            positions = token_start + tl.arange(0, BLOCK_TOKENS)
            kept = positions < length
            if document_mask is not None:  # known before the tile is loaded: an excluded token costs no traffic
                kept = kept & (tl.load(document_mask + start + positions, mask=kept, other=0) != 0)
                any_kept = any_kept | kept.to(tl.int32)
            token_rows = text + positions.to(tl.int64) * stride_document_token
            if FORMAT == _RESIDUAL:
                text_tile = _residual_tile(
                    token_rows,
                    kept,
                    tl.load(codes + start + positions, mask=kept, other=0),
                    centroids,
                    field_weights,
                    centroid_count,
                    stride_centroid,
                    DIMENSION,
                    BLOCK_TOKENS,
                    BLOCK_DIMENSION,
                    BITS,
                    NORMALIZE,
                    queries.dtype.element_ty,
                )
                similarity = tl.dot(text_tile, query_tile, input_precision=PRECISION)
            else:
                if BLOCK_DIMENSION >= DIMENSION:
                    text_tile = _values_tile(
                        token_rows, kept, 0, DIMENSION, BLOCK_DIMENSION, FORMAT, queries.dtype.element_ty
                    )
                    similarity = tl.dot(text_tile, query_tile, input_precision=PRECISION)
                else:
                    similarity = tl.zeros([BLOCK_TOKENS, BLOCK_ROWS], tl.float32)
                    for offset in range(0, DIMENSION, BLOCK_DIMENSION):
                        query_part = tl.trans(_load_rows(query_rows, row_valid, offset, DIMENSION, BLOCK_DIMENSION))
                        text_part = _values_tile(
                            token_rows, kept, offset, DIMENSION, BLOCK_DIMENSION, FORMAT, queries.dtype.element_ty
                        )
                        similarity = tl.dot(text_part, query_part, similarity, input_precision=PRECISION)
                scale = tl.load(scales + start + positions, mask=kept, other=0.0)
                similarity = similarity * scale[:, None]
            similarity = tl.where(kept[:, None], similarity, float("-inf"))
            best = tl.maximum(best, similarity, propagate_nan=tl.PropagateNan.ALL)

        highest = _column_maxima(best, NAN_REDUCTION)
        found = length > 0
        if document_mask is not None:
            found = tl.max(any_kept, axis=0) > 0
        highest = tl.where(row_counts & found, highest, 0.0)
        if query_weights is not None:
            highest = highest * weight
        segments = tl.arange(0, SEGMENTS)
        if SEGMENTS == 1:
            sums = tl.sum(highest, axis=0) + tl.zeros([SEGMENTS], tl.float32)
        else:
            mine = segments[:, None] == segment[None, :]
            sums = tl.sum(tl.where(mine, highest[None, :], 0.0), axis=1)
        target = first_query + segments
        score_valid = (segments < queries_per_tile) & (target < query_count)
        chunk = (tile % row_chunks).to(tl.int64)
        tl.store(scores + (chunk * query_count + target) * document_count + document, sums, mask=score_valid)


def quantized_forward(
    queries: Tensor,
    values: Tensor,
    scales: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    candidates: bool,
) -> Tensor:
    """Scores float32 [Nq, N] against scales * values; arguments are checked by quantized.py."""
    form = config_compressed.format_of(values.dtype, config.capability_of(queries.device), config.interpreted())
    stored = values.view(torch.uint8) if form == FLOAT8_BITS else values
    optional = (query_mask, document_mask, query_weights, cu_seqlens)
    return _launch(queries, stored, scales.contiguous(), None, None, None, *optional, candidates, form, False)


def residual_forward(
    queries: Tensor,
    codes: Tensor,
    residuals: Tensor,
    centroids: Tensor,
    field_weights: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    normalize: bool,
    candidates: bool,
) -> Tensor:
    """Scores float32 [Nq, N] against decoded residual codes, D up to 256; arguments are checked by residual.py."""
    tables = (codes.contiguous(), unit_stride(centroids), field_weights)
    optional = (query_mask, document_mask, query_weights, cu_seqlens)
    return _launch(queries, residuals, None, *tables, *optional, candidates, RESIDUAL, normalize)


def _launch(
    queries: Tensor,
    stored: Tensor,
    scales: Tensor | None,
    codes: Tensor | None,
    centroids: Tensor | None,
    field_weights: Tensor | None,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    candidates: bool,
    form: int,
    normalize: bool,
) -> Tensor:
    sizes = layout_of(queries, stored, cu_seqlens, candidates)
    if queries.numel() == 0 or sizes.documents_per_query == 0:
        return queries.new_zeros((sizes.query_count, sizes.documents_per_query), dtype=torch.float32)
    queries, stored = unit_stride(queries), as_list(stored)
    capability = config.capability_of(queries.device)
    sharing_rows = sizes.query_length * (1 if candidates else sizes.query_count)
    tiles = config_compressed.compressed_tiles(
        capability,
        form,
        queries.element_size(),
        sizes.dimension,
        sharing_rows,
        2 if centroids is None else centroids.element_size(),
    )
    row_chunks = -(-sizes.query_length // tiles.rows)
    per_tile = 1 if candidates else max(1, tiles.rows // sizes.query_length)
    row_tiles = -(-sizes.query_count // per_tile) * row_chunks
    processors = config.processors_of(queries.device)
    run = config_compressed.documents_per_program(sizes.documents_per_query, row_tiles, processors)
    partial = queries.new_empty((row_chunks, sizes.query_count, sizes.documents_per_query), dtype=torch.float32)
    launch(
        maxsim_compressed_kernel,
        row_tiles * -(-sizes.documents_per_query // run),
        (
            queries,
            stored,
            scales,
            codes,
            centroids,
            field_weights,
            as_bytes(query_mask),
            as_bytes(document_mask),
            None if query_weights is None else query_weights.contiguous(),
            None if cu_seqlens is None else cu_seqlens.contiguous(),
            partial,
            sizes.query_count,
            sizes.query_length,
            sizes.documents_per_query,
            sizes.document_length or 0,
            row_tiles,
            row_chunks,
            per_tile,
            run,
            0 if centroids is None else centroids.shape[0],
            queries.stride(0),
            queries.stride(1),
            0 if cu_seqlens is not None else stored.stride(0),
            stored.stride(-2),
            0 if centroids is None else centroids.stride(0),
        ),
        (
            sizes.dimension,
            tiles.rows,
            tiles.tokens,
            tiles.dimension,
            config.next_power_of_two(per_tile),
            form,
            0 if field_weights is None else field_weights.shape[0].bit_length() - 1,
            normalize,
            candidates,
            config.product_precision(queries.dtype),
            not config.interpreted(),
        ),
        (tiles.warps, tiles.stages, tiles.registers),
    )
    # One chunk, the usual case, is a view; several are added in order.
    return partial[0] if row_chunks == 1 else partial.sum(0)
