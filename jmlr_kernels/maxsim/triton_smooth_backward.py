"""Smooth MaxSim backward in Triton, without atomics: every gradient tile has one program that owns it.

The similarities are multiplied again, and with the saved smooth maxima give each document token's share of a query
token's gradient, exp((similarity - maximum) / temperature). One kernel owns query tokens and walks the documents, the
other owns document tokens and walks the query tokens; each multiplies the shares with the other side's rows on the
tensor cores. Two runs are bit-identical. Derivation: docs/maxsim-smooth-and-xtr.md. Not run on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from . import config, config_smooth
from .layout import Layout, layout_of
from .triton_forward import _load_rows, as_bytes, as_list, unit_stride
from .triton_smooth_forward import (
    LN_2,
    SIZES,
    contiguous,
    locate_document,
    row_layout,
)


@triton.jit(do_not_specialize=SIZES)
def maxsim_smooth_query_gradient_kernel(
    grad_scores,
    queries,
    documents,
    maxima,
    document_mask,
    query_weights,
    cu_seqlens,
    grad_queries,
    grad_weights,
    query_count,
    query_length,
    document_count,
    document_length,
    row_tiles,
    row_chunks,
    queries_per_tile,
    documents_per_program,
    exponent_scale,
    stride_query,
    stride_query_token,
    stride_document,
    stride_document_token,
    DIMENSION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIMENSION: tl.constexpr,
    BLOCK_OUTPUT: tl.constexpr,
    OUTPUT_TILES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d(queries) [splits, Nq, Lq, D] and d(weights) [splits, Nq, Lq], to be summed over the splits.

    A program owns one row tile and BLOCK_OUTPUT columns of its gradient, and walks one run of documents.
    """
    program = tl.program_id(0)
    tile = program % row_tiles
    column = (program // row_tiles) % OUTPUT_TILES
    split = program // (row_tiles * OUTPUT_TILES)
    first_query = (tile // row_chunks) * queries_per_tile

    rows = (tile % row_chunks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    segment = rows // query_length
    query = (first_query + segment).to(tl.int64)
    token = (rows - segment * query_length).to(tl.int64)
    row_valid = (segment < queries_per_tile) & (query < query_count)
    query_rows = queries + query * stride_query + token * stride_query_token
    if BLOCK_DIMENSION >= DIMENSION:
        query_tile = _load_rows(query_rows, row_valid, 0, DIMENSION, BLOCK_DIMENSION)

    total = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUT], tl.float32)
    touched = tl.zeros([BLOCK_ROWS], tl.int32)
    grad_weight = tl.zeros([BLOCK_ROWS], tl.float32)
    first_place = first_query.to(tl.int64) * (document_count if CANDIDATES else 0)
    first_document = split * documents_per_program
    for document in range(first_document, tl.minimum(first_document + documents_per_program, document_count)):
        text, mask_start, length = locate_document(
            first_place + document, documents, cu_seqlens, document_length, stride_document, stride_document_token
        )
        pair = query * document_count + document
        maximum = tl.load(maxima + pair * query_length + token, mask=row_valid, other=float("-inf"))
        counts = maximum != float("-inf")
        # Selected, not multiplied by zero: an infinite gradient times zero would be NaN.
        grad = tl.load(grad_scores + pair, mask=counts, other=0.0)
        maximum = tl.where(counts, maximum, 0.0)
        touched = touched | counts.to(tl.int32)
        if query_weights is not None:
            grad_weight += grad * maximum
        for token_start in range(0, length, BLOCK_TOKENS):
            positions = token_start + tl.arange(0, BLOCK_TOKENS)
            kept = positions < length
            if document_mask is not None:
                kept = kept & (tl.load(document_mask + mask_start + positions, mask=kept, other=0) != 0)
            # Excluded tokens are read as zeros, so that their NaN stays out of both products.
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
                text_tile = _load_rows(token_rows, kept, column * BLOCK_OUTPUT, DIMENSION, BLOCK_OUTPUT)
            share = tl.exp2((similarity - maximum[:, None]) * exponent_scale) * grad[:, None]
            share = tl.where(counts[:, None] & kept[None, :], share, 0.0)
            total = tl.dot(share.to(PRODUCT), text_tile.to(PRODUCT), total, input_precision=PRECISION)

    # A query token that never counted may have met NaN (zero times NaN, inside the product): zero it stays.
    total = tl.where((touched != 0)[:, None], total, 0.0)
    target = split.to(tl.int64) * query_count * query_length + query * query_length + token
    if query_weights is not None:
        counted = row_valid & (touched != 0)
        weight = tl.load(query_weights + query * query_length + token, mask=counted, other=0.0).to(tl.float32)
        total = total * weight[:, None]
        if column == 0:
            tl.store(grad_weights + target, grad_weight.to(grad_weights.dtype.element_ty), mask=row_valid)
    columns = column * BLOCK_OUTPUT + tl.arange(0, BLOCK_OUTPUT)
    inside = row_valid[:, None] & (columns < DIMENSION)[None, :]
    out = grad_queries + target[:, None] * DIMENSION + columns[None, :]
    tl.store(out, total.to(grad_queries.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def maxsim_smooth_document_gradient_kernel(
    grad_scores,
    queries,
    documents,
    maxima,
    document_mask,
    query_weights,
    cu_seqlens,
    grad_documents,
    query_count,
    query_length,
    document_count,
    document_length,
    tiles,
    exponent_scale,
    stride_query,
    stride_query_token,
    stride_document,
    stride_document_token,
    DIMENSION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIMENSION: tl.constexpr,
    BLOCK_OUTPUT: tl.constexpr,
    OUTPUT_TILES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d(documents), contiguous [documents, Ld, D] or [T, D].

    A program owns BLOCK_OUTPUT columns of every `tiles`-th token tile of one document, so that a packed document of any
    length is covered without telling the host how long it is.
    """
    program = tl.program_id(0)
    column = program % OUTPUT_TILES
    tile = (program // OUTPUT_TILES) % tiles
    place = (program // (OUTPUT_TILES * tiles)).to(tl.int64)
    text, start, length = locate_document(
        place, documents, cu_seqlens, document_length, stride_document, stride_document_token
    )
    if CANDIDATES:
        first_query = place // document_count
        document = place % document_count
        row_count = query_length
    else:
        first_query = place * 0
        document = place
        row_count = query_length * query_count
    columns = column * BLOCK_OUTPUT + tl.arange(0, BLOCK_OUTPUT)

    for token_start in range(tile * BLOCK_TOKENS, length, tiles * BLOCK_TOKENS):
        positions = token_start + tl.arange(0, BLOCK_TOKENS)
        inside = positions < length
        kept = inside
        if document_mask is not None:
            kept = kept & (tl.load(document_mask + start + positions, mask=inside, other=0) != 0)
        token_rows = text + positions.to(tl.int64) * stride_document_token
        if BLOCK_DIMENSION >= DIMENSION:
            text_tile = _load_rows(token_rows, kept, 0, DIMENSION, BLOCK_DIMENSION)
        total = tl.zeros([BLOCK_TOKENS, BLOCK_OUTPUT], tl.float32)
        for row_start in range(0, row_count, BLOCK_ROWS):
            rows = row_start + tl.arange(0, BLOCK_ROWS)
            row_valid = rows < row_count
            # Divided in 32 bits, which the hardware does well.
            query = first_query + rows // query_length
            token = rows % query_length
            pair = query * document_count + document
            maximum = tl.load(maxima + pair * query_length + token, mask=row_valid, other=float("-inf"))
            counts = maximum != float("-inf")
            maximum = tl.where(counts, maximum, 0.0)
            factor = tl.load(grad_scores + pair, mask=counts, other=0.0)
            if query_weights is not None:
                weight = tl.load(query_weights + query * query_length + token, mask=counts, other=0.0)
                factor = factor * weight.to(tl.float32)
            # Rows that do not count are read as zeros, so that their NaN stays out of both products.
            query_rows = queries + query * stride_query + token.to(tl.int64) * stride_query_token
            if BLOCK_DIMENSION >= DIMENSION:
                query_tile = _load_rows(query_rows, counts, 0, DIMENSION, BLOCK_DIMENSION)
                similarity = tl.dot(text_tile, tl.trans(query_tile), input_precision=PRECISION)
            else:
                similarity = tl.zeros([BLOCK_TOKENS, BLOCK_ROWS], tl.float32)
                for offset in range(0, DIMENSION, BLOCK_DIMENSION):
                    text_part = _load_rows(token_rows, kept, offset, DIMENSION, BLOCK_DIMENSION)
                    query_part = _load_rows(query_rows, counts, offset, DIMENSION, BLOCK_DIMENSION)
                    similarity = tl.dot(text_part, tl.trans(query_part), similarity, input_precision=PRECISION)
                query_tile = _load_rows(query_rows, counts, column * BLOCK_OUTPUT, DIMENSION, BLOCK_OUTPUT)
            share = tl.exp2((similarity - maximum[None, :]) * exponent_scale) * factor[None, :]
            share = tl.where(kept[:, None] & counts[None, :], share, 0.0)
            total = tl.dot(share.to(PRODUCT), query_tile.to(PRODUCT), total, input_precision=PRECISION)
        total = tl.where(kept[:, None], total, 0.0)
        target = grad_documents + (start + positions)[:, None] * DIMENSION + columns[None, :]
        stored = inside[:, None] & (columns < DIMENSION)[None, :]
        tl.store(target, total.to(grad_documents.dtype.element_ty), mask=stored)


def backward(
    grad_scores: Tensor,
    queries: Tensor,
    documents: Tensor,
    maxima: Tensor,
    document_mask: Tensor | None,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    candidates: bool,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, documents and query_weights in their shapes and dtypes; two runs are bit-identical.

    The third is an empty tensor when there are no weights.
    """
    sizes = layout_of(queries, documents, cu_seqlens, candidates)
    # Tokens of a packed list that no document covers have gradient zero and no owner to write it.
    allocate = torch.empty if cu_seqlens is None else torch.zeros
    grad_documents = allocate(documents.shape, dtype=documents.dtype, device=documents.device)
    if maxima.numel() == 0:
        weightless = queries.new_zeros(0) if query_weights is None else query_weights.new_zeros(query_weights.shape)
        return queries.new_zeros(queries.shape), grad_documents.zero_(), weightless
    tensors = (
        grad_scores.to(torch.float32).contiguous(),
        unit_stride(queries),
        as_list(documents),
        maxima.contiguous(),
        as_bytes(document_mask),
        contiguous(query_weights),
        contiguous(cu_seqlens),
    )
    exponent_scale = 1 / (temperature * LN_2)
    grad_queries, grad_weights = _query_gradient(sizes, tensors, exponent_scale)
    if documents.numel():
        _document_gradient(sizes, tensors, exponent_scale, grad_documents)
    return grad_queries, grad_documents, queries.new_empty(0) if grad_weights is None else grad_weights


_Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def _query_gradient(sizes: Layout, tensors: _Tensors, exponent_scale: float) -> tuple[Tensor, Tensor | None]:
    _, queries, documents, _, _, weights, cu_seqlens = tensors
    sharing_rows = sizes.query_length * (1 if sizes.candidates else sizes.query_count)
    tiles = config_smooth.query_gradient_tiles(*_precision_and_chip(queries), sizes.dimension, sharing_rows)
    row_tiles, row_chunks, per_tile = row_layout(sizes, tiles.rows)
    output_tiles = -(-sizes.dimension // tiles.output)
    splits = config_smooth.document_splits(
        sizes.documents_per_query, row_tiles * output_tiles, config.processors_of(queries.device)
    )
    run = -(-sizes.documents_per_query // splits)
    splits = -(-sizes.documents_per_query // run)
    # One split writes the result itself; several write float32 sums, which are added in order.
    shape = (splits, sizes.query_count, sizes.query_length)
    whole = splits == 1
    grad_queries = queries.new_empty((*shape, sizes.dimension), dtype=queries.dtype if whole else torch.float32)
    grad_weights = (
        None if weights is None else weights.new_empty(shape, dtype=weights.dtype if whole else torch.float32)
    )
    arguments = (
        *tensors,
        grad_queries,
        grad_weights,
        sizes.query_count,
        sizes.query_length,
        sizes.documents_per_query,
        sizes.document_length or 0,
        row_tiles,
        row_chunks,
        per_tile,
        run,
        exponent_scale,
        *_strides(queries, documents, cu_seqlens),
    )
    constants = _constants(sizes, tiles, output_tiles, queries.dtype)
    programs = row_tiles * output_tiles * splits
    launch(maxsim_smooth_query_gradient_kernel, programs, arguments, constants, tiles.options)
    if whole:
        return grad_queries[0], None if grad_weights is None else grad_weights[0]
    summed = None if grad_weights is None or weights is None else grad_weights.sum(0).to(weights.dtype)
    return grad_queries.sum(0).to(queries.dtype), summed


def _document_gradient(sizes: Layout, tensors: _Tensors, exponent_scale: float, grad_documents: Tensor) -> None:
    _, queries, documents, _, _, _, cu_seqlens = tensors
    tiles = config_smooth.document_gradient_tiles(*_precision_and_chip(queries), sizes.dimension)
    if sizes.document_length is not None:
        token_tiles = -(-sizes.document_length // tiles.tokens)
    else:  # the mean length decides how many programs share a document; each strides over its tiles
        mean = grad_documents.shape[0] / sizes.document_count
        token_tiles = max(1, round(2 * mean / tiles.tokens))
    output_tiles = -(-sizes.dimension // tiles.output)
    arguments = (
        *tensors,
        grad_documents,
        sizes.query_count,
        sizes.query_length,
        sizes.documents_per_query,
        sizes.document_length or 0,
        token_tiles,
        exponent_scale,
        *_strides(queries, documents, cu_seqlens),
    )
    constants = _constants(sizes, tiles, output_tiles, queries.dtype)
    programs = sizes.document_count * token_tiles * output_tiles
    launch(maxsim_smooth_document_gradient_kernel, programs, arguments, constants, tiles.options)


def _strides(queries: Tensor, documents: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, int]:
    document = 0 if cu_seqlens is not None else documents.stride(0)
    return queries.stride(0), queries.stride(1), document, documents.stride(-2)


def _constants(sizes: Layout, tiles: config_smooth.Tiles, output_tiles: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """The compile-time arguments that both kernels end with."""
    shape = (sizes.dimension, tiles.rows, tiles.tokens, tiles.dimension, tiles.output, output_tiles)
    return *shape, sizes.candidates, *product_types(dtype)


def _precision_and_chip(queries: Tensor) -> tuple[int, int, int]:
    """Compute capability, bytes per element, and bytes per element of the second product."""
    return config.capability_of(queries.device), queries.element_size(), product_size(queries.dtype)


def product_size(dtype: torch.dtype) -> int:
    """Bytes per element of the operands that :func:`product_types` names."""
    return 2 if dtype == torch.bfloat16 else 4


def product_types(dtype: torch.dtype) -> tuple[tl.dtype, str]:
    """Operand type and precision of the product of shares and rows.

    bfloat16 rounds gradient * share once, to the output's own precision. float16 goes through tf32, whose mantissa is
    as long, because small gradients would underflow in float16 before they are summed.
    """
    if dtype == torch.bfloat16:
        return tl.bfloat16, "tf32"
    return tl.float32, "tf32" if dtype == torch.float16 else "ieee"
